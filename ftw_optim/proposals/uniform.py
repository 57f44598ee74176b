"""The proposal that knows nothing: a uniform draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from ftw_optim._matching.selection import Selection
from ftw_optim.proposals.drawing import apart, best_and_uniform, salt
from ftw_optim.proposals.features import Features, keys_of, sources_of
from ftw_optim.proposals.interface import Proposal, Sample, check_count, check_state


@final
class UniformProposal(Proposal):
    """A uniform draw without replacement: what other proposals must beat.

    Args:
        seed: seed of the draws.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._features = Features(None, dim=0)
        self._calls = 0

    def features(self, samples: Sequence[Sample]) -> Tensor:
        """The features of samples, to keep and to pass to :meth:`propose`: a row for each, which names the record."""
        return self._features(samples)

    def propose(self, samples: Sequence[Sample], count: int, *, features: Tensor | None = None) -> Tensor:
        """See :class:`Proposal`; with ``features`` the samples themselves are not looked at."""
        check_count(count)
        known = self._features.given(samples, features)
        chosen = best_and_uniform(
            torch.zeros(len(known)),
            apart(keys_of(known)),
            sources_of(known),
            count,
            explore=1.0,
            explore_by="record",
            salt=salt("uniform", self.seed, self._calls),
        )
        self._calls += 1
        return chosen

    def observe(self, samples: Sequence[Sample], selection: Selection, *, features: Tensor | None = None) -> None:
        """See :class:`Proposal`; nothing is learned."""

    def state_dict(self) -> dict[str, Any]:
        """The number of calls, and the settings that must be equal on resume."""
        return {"kind": type(self).__name__, "settings": {"seed": self.seed}, "calls": self._calls}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See :class:`Proposal`."""
        check_state(state_dict, self.state_dict())
        self._calls = state_dict["calls"]
