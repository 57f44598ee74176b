"""The proposal that leaves out what the steps so far have shown to be of a worse kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from ftw_optim._matching.selection import Selection
from ftw_optim.proposals.contrast import Contrast
from ftw_optim.proposals.drawing import BEST_SHARE, apart, best_and_uniform, explored, salt
from ftw_optim.proposals.features import keys_of, likeness_of, sources_of
from ftw_optim.proposals.interface import Proposal, Sample, check_best_share, check_count, check_explore, check_state
from ftw_optim.proposals.kinds import Kinds
from ftw_optim.proposals.scoring import ScoreRegression
from ftw_optim.proposals.trust import LikenessTrust

_PLAIN = 256  # columns in which records are compared with the stream


@final
class VettedProposal(Proposal):
    """Records that are alike to the target rows, but for those of a kind that is shown to be worth less.

    Likeness finds records that *look* like the target and cannot see whether they are any good: a prompt of the right
    kind may have an empty, cut-off or wrong answer. What a record is *worth* is the product of its gradient and the
    target's: its score, the cosine of the two, times the length of its gradient. Regressions of both on the record's
    features, as in :class:`LearnedProposal` but without likeness, know that within a few steps: an answer that teaches
    nothing has a gradient that points elsewhere, or one that is soon short. Where what they expect shows two kinds of
    records, far apart, and what comes then bears it out, records of the worse kind are left out, until those of it
    that are tried all the same are worth no less than the others. Where there are no two kinds, nothing is left out
    and ``order`` alone decides, by default as in :class:`SimilarityProposal`: among good records scores are too noisy
    to choose by.

    Scores are only honest of a target that is not trained on meanwhile, see :class:`~ftw_optim.TargetGradient`.

    Args:
        target_samples: the target rows; None: no likeness.
        order: ``"likeness"``: alike ones first. ``"uniform"``: at random. ``"tested"``: alike ones for a share of the
            candidates, and the others at random: half of them at first, nearly all a few steps later where scores rise
            with likeness, few or none where they do not. Until likeness is trusted no kind is left out, and the
            candidates are a mixed lot, so give the optimizer stages that choose among them:
            ``filter=FilterUnless(condition=proposal.trusts_likeness)`` and
            ``weight=WeightUnless(condition=proposal.trusts_likeness)``. Steps of one candidate tell nothing.
        floor: with ``order="tested"`` the least share of the candidates that is drawn at random, however much likeness
            is trusted. With 0 there are others as far as the scores leave likeness in doubt: once trusted, only when
            they no longer rise with it. Where it is no whole number, rounded up or down at random.
        contrast: whether likeness is that beyond the likeness to the stream, see :class:`SimilarityProposal`. What
            ``order="tested"`` tests is likeness alone, in which candidates differ more.
        best_share: see :class:`SimilarityProposal`; where a kind is left out, a share of the others.
        dim, embedding, use_source, ridge, forgetting: of the regression, see :class:`LearnedProposal`.
        explore: share of the candidates that are of the kind left out, by which it is seen whether it is still worse:
            all of it while that is barely known, and less the surer it is, as these records are trained on too. No
            more than the kind has of the records read; where it is no whole number, rounded up or down at random. With
            0 nothing that was left out comes back.
        seed: seed of the draws and of the features.

    Raises:
        ValueError: an argument is not as described above.
    """

    def __init__(
        self,
        target_samples: Sequence[Sample] | None = None,
        *,
        order: Literal["likeness", "uniform", "tested"] = "likeness",
        contrast: bool = True,
        best_share: float = BEST_SHARE,
        dim: int = 256,
        embedding: Tensor | None = None,
        use_source: bool = False,
        ridge: float = 8.0,
        forgetting: float = 0.98,
        explore: float = 0.125,
        floor: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_explore(explore, "record")
        check_best_share(best_share)
        if not 0.0 <= floor <= 1.0:
            raise ValueError(f"floor must be a share, from 0 to 1, got {floor}.")
        if order not in ("likeness", "uniform", "tested"):
            raise ValueError(f"order must be 'likeness', 'uniform' or 'tested', got {order!r}.")
        if order != "uniform" and target_samples is None:
            raise ValueError(f"order={order!r} needs target_samples to be alike to; or pass order='uniform'.")
        self.order, self.best_share, self.explore, self.floor, self.seed = order, best_share, explore, floor, seed
        self._regression = ScoreRegression(
            target_samples,
            dim=dim,
            embedding=embedding,
            use_source=use_source,
            ridge=ridge,
            forgetting=forgetting,
            prior=0.0,
            seed=seed,
            by_likeness=False,  # else it would find the kind of the target, which likeness has found
            plain=_PLAIN if contrast and order != "uniform" else 0,
            with_sizes=True,
        )
        self._trust = LikenessTrust()
        self._kinds = Kinds(self._regression)
        self._contrast = Contrast(self._regression.features.target_mean) if self._regression.features.plain else None
        self._calls = 0

    @property
    def vetoes(self) -> bool:
        """Whether a kind of records is left out now."""
        return self._kinds.veto

    def trusts_likeness(self) -> bool:
        """Whether likeness is trusted; the condition of :class:`~ftw_optim.proposals.FilterUnless`.

        It is from when it is 0.9 probable that scores rise by more than 0.05 from no likeness to equality, and that
        they are positive; until it is as probable that they fall by so much, or are negative.
        """
        return self._trust.trusts

    def features(self, samples: Sequence[Sample]) -> Tensor:
        """The features of samples, to keep and to pass to the other calls; a row depends on its sample alone."""
        return self._regression.features(samples)

    def propose(self, samples: Sequence[Sample], count: int, *, features: Tensor | None = None) -> Tensor:
        """See :class:`Proposal`; with ``features`` the samples themselves are not looked at.

        Of the kind that is left out, those come last that exploring asks for. Where there are too few others, those
        that are expected to be worth most are taken as well.
        """
        check_count(count)
        known = self._regression.features.given(samples, features)
        count = min(count, len(known))
        guess = likeness_of(known) if self.order != "uniform" else torch.zeros(len(known), dtype=torch.float64)
        expected, worse = self._kinds.judged(known)
        keys, draw = apart(keys_of(known)), salt("vetted", self.seed, self._calls)
        self._calls += 1
        if self._contrast is not None:
            columns = self._regression.features.plain_columns(known)
            self._contrast.see(columns, keys, draw)
            guess = self._contrast.likeness(columns)
        if self.order == "tested" and not self.trusts_likeness():
            worse = torch.zeros_like(worse)  # worth about zero parts into kinds that are none

        def best(
            places: Tensor, values: Tensor, number: int, at_random: float = 0.0, as_good: float = self.best_share
        ) -> Tensor:
            found = best_and_uniform(
                values[places],
                keys[places],
                sources_of(known)[places],
                number,
                explore=at_random,
                explore_by="record",
                salt=draw,
                as_good=as_good,
            )
            return places[found]

        share = min(self.explore * self._kinds.doubt(), float(worse.double().mean())) if len(known) else 0.0
        of_worse, others = worse.nonzero()[:, 0], (~worse).nonzero()[:, 0]
        tried = best(of_worse, guess, min(explored(count, share, draw), len(of_worse)))
        at_random = max(self.floor, 1.0 - self._trust.share()) if self.order == "tested" else 0.0
        chosen = best(others, guess, count - len(tried), at_random)
        left = worse.clone()
        left[tried] = False
        more = best(left.nonzero()[:, 0], expected, count - len(chosen) - len(tried), as_good=0.0)
        return torch.cat([chosen, more, tried])

    def observe(self, samples: Sequence[Sample], selection: Selection, *, features: Tensor | None = None) -> None:
        """See :class:`Proposal`; as for :class:`LearnedProposal`, a guide that is blind or stale teaches nothing."""
        told = self._regression.told(samples, selection, features)
        if told is None:
            return
        _, worse = self._kinds.judged(told.features)
        likeness = likeness_of(told.features)
        self._trust.observe(likeness[~worse], told.scores[~worse])  # the others' are low whatever their likeness
        self._kinds.observe(self._regression.columns(told.features), told.scores, told.sizes)

    def state_dict(self) -> dict[str, Any]:
        """The number of calls, what was learned, and the settings that must be equal on resume."""
        return {
            "kind": type(self).__name__,
            "settings": {
                **self._regression.settings(),
                "order": self.order,
                "contrast": self._contrast is not None,
                "best_share": self.best_share,
                "explore": self.explore,
                "floor": self.floor,
                "seed": self.seed,
            },
            "calls": self._calls,
            "learned": self._regression.learned.state_dict(),
            "trust": self._trust.state_dict(),
            "kinds": self._kinds.state_dict(),
            "stream": {} if self._contrast is None else self._contrast.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See :class:`Proposal`."""
        check_state(state_dict, self.state_dict())
        calls = int(state_dict["calls"])
        kinds, trust = Kinds(self._regression), LikenessTrust()
        kinds.load_state_dict(state_dict["kinds"])
        trust.load_state_dict(state_dict["trust"])
        contrast = None if self._contrast is None else Contrast(self._regression.features.target_mean)
        if contrast is not None:
            contrast.load_state_dict(state_dict["stream"])
        self._regression.learned.load_state_dict(state_dict["learned"])
        self._contrast = contrast
        self._calls, self._kinds, self._trust = calls, kinds, trust
