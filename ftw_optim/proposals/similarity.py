"""The proposal by likeness to the target rows: retrieval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

from torch import Tensor

from ftw_optim._matching.selection import Selection
from ftw_optim.proposals.contrast import Contrast
from ftw_optim.proposals.drawing import BEST_SHARE, apart, best_and_uniform, salt, uniforms
from ftw_optim.proposals.features import Features, keys_of, likeness_of, sources_of
from ftw_optim.proposals.interface import Proposal, Sample, check_best_share, check_count, check_explore, check_state


@final
class SimilarityProposal(Proposal):
    """Records that are alike to the target rows; it costs no pass and learns nothing.

    Args:
        target_samples: the target rows; likeness is explained in
            :class:`~ftw_optim.proposals.features.Features`.
        contrast: whether likeness is that beyond the likeness to the stream, see
            :class:`~ftw_optim.proposals.contrast.Contrast`; else a short record of the commonest words is alike to
            everything.
        dim: number of columns in which records are compared with the stream; fewer than the width of an embedding are
            random directions of it.
        embedding: shape ``(vocabulary, width)``: likeness of mean embeddings; None: of the tokens themselves.
        best_share: share of the records read, the most alike ones, among which the candidates are drawn at random; no
            fewer than are taken. The very most alike of very many records all say the same. Of a kind that is rarer
            than this it takes others, too: then pass the share that it has. 0: the most alike.
        temperature: 0: as ``best_share`` says. Above, records are drawn without replacement with probabilities
            proportional to ``exp(likeness / temperature)`` from all; likeness is a cosine, so 0.02 is mild.
        explore: share of the candidates drawn uniformly from the rest; where it is no whole number, rounded up or down
            at random.
        explore_by: ``"source"``: every ``source`` is equally likely, where samples name theirs, so that a larger one
            starves none. ``"record"``: every record of the rest is.
        seed: seed of the draws.

    Raises:
        ValueError: there is no target row, or an argument is not as described above.
    """

    def __init__(
        self,
        target_samples: Sequence[Sample],
        *,
        contrast: bool = True,
        dim: int = 256,
        embedding: Tensor | None = None,
        best_share: float = BEST_SHARE,
        temperature: float = 0.0,
        explore: float = 0.0,
        explore_by: Literal["record", "source"] = "source",
        seed: int = 0,
    ) -> None:
        check_explore(explore, explore_by)
        check_best_share(best_share)
        if not 0.0 <= temperature < math.inf:
            raise ValueError(
                f"temperature must be finite and not negative, got {temperature}; 0 draws as best_share says."
            )
        self.best_share, self.temperature = best_share, temperature
        self.explore, self.explore_by, self.seed = explore, explore_by, seed
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}.")
        self._features = Features(target_samples, dim=0, plain=dim if contrast else 0, seed=seed, embedding=embedding)
        self._contrast = Contrast(self._features.target_mean) if contrast else None
        self._calls = 0

    def features(self, samples: Sequence[Sample]) -> Tensor:
        """The features of samples, to keep and to pass to :meth:`propose`; a row depends on its sample alone."""
        return self._features(samples)

    def propose(self, samples: Sequence[Sample], count: int, *, features: Tensor | None = None) -> Tensor:
        """See :class:`Proposal`; with ``features`` the samples themselves are not looked at."""
        check_count(count)
        known = self._features.given(samples, features)
        keys, scores = apart(keys_of(known)), likeness_of(known)
        if self._contrast is not None:
            columns = self._features.plain_columns(known)
            self._contrast.see(columns, keys, salt("stream", self.seed, self._calls))
            scores = self._contrast.likeness(columns)
        if self.temperature > 0.0:
            # The largest of scores with Gumbel noise are a draw without replacement.
            noise = uniforms(keys, salt("temperature", self.seed, self._calls))
            scores = scores / self.temperature - (-noise.log()).log()
        chosen = best_and_uniform(
            scores,
            keys,
            sources_of(known),
            count,
            explore=self.explore,
            explore_by=self.explore_by,
            salt=salt("similarity", self.seed, self._calls),
            as_good=0.0 if self.temperature else self.best_share,
        )
        self._calls += 1
        return chosen

    def observe(self, samples: Sequence[Sample], selection: Selection, *, features: Tensor | None = None) -> None:
        """See :class:`Proposal`; nothing is learned."""

    def state_dict(self) -> dict[str, Any]:
        """The number of calls, what the stream was like, and the settings that must be equal on resume."""
        settings = {
            "contrast": self._contrast is not None,
            "best_share": self.best_share,
            "temperature": self.temperature,
            "explore": self.explore,
            "explore_by": self.explore_by,
            "seed": self.seed,
            "features": self._features.settings(),
        }
        stream = {} if self._contrast is None else self._contrast.state_dict()
        return {"kind": type(self).__name__, "settings": settings, "calls": self._calls, "stream": stream}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See :class:`Proposal`."""
        check_state(state_dict, self.state_dict())
        if self._contrast is not None:
            self._contrast.load_state_dict(state_dict["stream"])
        self._calls = state_dict["calls"]
