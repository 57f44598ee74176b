"""Losses of preference pairs, one for each, by the names that TRL's trainer has for them.

Each is a function of a pair alone, so that every pair has a gradient of its own. What the trainer makes of a batch in
another way is in :data:`COUPLED`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu, softplus

COUPLED: Mapping[str, str] = {
    "aot": "sorts the log-ratios of a batch",
    "aot_unpaired": "sorts the log-ratios of a batch",
}
"""Losses of a batch that are no sum over its pairs, each with the reason."""


class Settings(Protocol):
    """The settings of TRL's ``DPOConfig`` that losses depend on."""

    beta: float
    label_smoothing: float
    discopop_tau: float
    f_divergence_type: str
    f_alpha_divergence_coef: float
    loss_type: list[str]
    loss_weights: list[float] | None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """What the losses of ``b`` pairs are computed from; each tensor has the shape ``(b,)``.

    Attributes:
        chosen: log-probability of the chosen answer, less that under the reference.
        rejected: the same of the rejected answer.
        chosen_score: ``chosen`` as the f-divergence has it.
        rejected_score: ``rejected`` as the f-divergence has it.
        chosen_length: number of tokens of the chosen answer, 1 at least.
        rejected_length: the same of the rejected answer.
        chosen_nll: negative log-probability of the chosen answer, divided by the mean number of tokens of such answers
            in the batch.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_score: Tensor
    rejected_score: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    chosen_nll: Tensor

    @property
    def difference(self) -> Tensor:
        """How much more the chosen answer is preferred than the rejected one, relative to the reference."""
        return self.chosen_score - self.rejected_score

    @property
    def mean_difference(self) -> Tensor:
        """The same for a mean token of each."""
        return self.chosen_score / self.chosen_length - self.rejected_score / self.rejected_length


def _exo(pairs: Pairs, settings: Settings) -> Tensor:
    """The divergence of the softmax over both answers from the smoothed label."""
    smoothing = torch.tensor(settings.label_smoothing, dtype=pairs.chosen.dtype, device=pairs.chosen.device)
    margin = settings.beta * pairs.difference
    wins = margin.sigmoid() * (logsigmoid(margin) - torch.log1p(-smoothing))
    return wins + (-margin).sigmoid() * (logsigmoid(-margin) - smoothing.log())


def _nca(pairs: Pairs, settings: Settings) -> Tensor:
    chosen, rejected = settings.beta * pairs.chosen, settings.beta * pairs.rejected
    return softplus(-chosen) + softplus(chosen) / 2 + softplus(rejected) / 2


def _robust(pairs: Pairs, settings: Settings) -> Tensor:
    margin, flipped = settings.beta * pairs.difference, settings.label_smoothing
    return ((1 - flipped) * softplus(-margin) - flipped * softplus(margin)) / (1 - 2 * flipped)


def _sppo(pairs: Pairs, settings: Settings) -> Tensor:
    half = 0.5 / settings.beta
    return (pairs.chosen - half).square() + (pairs.rejected + half).square()


def _apo_down(pairs: Pairs, settings: Settings) -> Tensor:
    margin = settings.beta * (pairs.chosen - pairs.rejected)
    return (settings.beta * pairs.chosen).sigmoid() + (-margin).sigmoid()


def _discopop(pairs: Pairs, settings: Settings) -> Tensor:
    margin = settings.beta * pairs.difference
    share = (margin / settings.discopop_tau).sigmoid()
    return softplus(-margin) * (1 - share) + (-margin).exp() * share


LOSSES: Mapping[str, Callable[[Pairs, Settings], Tensor]] = {
    "sigmoid": lambda pairs, settings: softplus(-settings.beta * pairs.difference),
    "sigmoid_norm": lambda pairs, settings: softplus(-settings.beta * pairs.mean_difference),
    "hinge": lambda pairs, settings: relu(1 - settings.beta * pairs.difference),
    "ipo": lambda pairs, settings: (pairs.mean_difference - 0.5 / settings.beta).square(),
    "exo_pair": _exo,
    "nca_pair": _nca,
    "robust": _robust,
    "bco_pair": lambda pairs, settings: (
        softplus(-settings.beta * pairs.chosen) + softplus(settings.beta * pairs.rejected)
    ),
    "sppo_hard": _sppo,
    "apo_zero": lambda pairs, settings: (
        (-settings.beta * pairs.chosen).sigmoid() + (settings.beta * pairs.rejected).sigmoid()
    ),
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": lambda pairs, settings: pairs.chosen_nll,
}
"""Functions ``(pairs, settings of the trainer) -> losses (b,)``."""


def _alpha(ratio: Tensor, coefficient: float) -> Tensor:
    power = coefficient - 1.0
    if abs(power) < 1e-6:  # the limit
        return ratio
    wide = ratio.to(torch.promote_types(ratio.dtype, torch.float32))
    most = 11.0 if ratio.dtype == torch.float16 else 80.0  # whose exponential has a number in the dtype
    return (((power * wide).clamp(max=most).exp() - 1.0) / power).to(ratio.dtype)


SCORES: Mapping[str, Callable[[Tensor, Settings], Tensor]] = {
    "reverse_kl": lambda ratio, settings: ratio,
    "forward_kl": lambda ratio, settings: 1 - (-ratio).exp(),
    "js_divergence": lambda ratio, settings: math.log(2) + logsigmoid(ratio),
    "alpha_divergence": lambda ratio, settings: _alpha(ratio, settings.f_alpha_divergence_coef),
}
"""Functions ``(log-ratios, settings of the trainer) -> scores``, by the name of an f-divergence."""


def preference_losses(
    chosen: Tensor, rejected: Tensor, *, lengths: tuple[Tensor, Tensor], chosen_nll: Tensor, settings: Settings
) -> Tensor:
    """The loss of each pair, the weighted sum of the losses that the settings name, shape ``(b,)``.

    Args:
        chosen: see :class:`Pairs`.
        rejected: see :class:`Pairs`.
        lengths: the numbers of tokens of the chosen and of the rejected answers.
        chosen_nll: see :class:`Pairs`.
        settings: the arguments of TRL's DPO trainer.
    """
    score = SCORES[settings.f_divergence_type]
    pairs = Pairs(
        chosen=chosen,
        rejected=rejected,
        chosen_score=score(chosen, settings),
        rejected_score=score(rejected, settings),
        chosen_length=lengths[0].clamp(min=1),
        rejected_length=lengths[1].clamp(min=1),
        chosen_nll=chosen_nll,
    )
    weights = settings.loss_weights or [1.0] * len(settings.loss_type)
    terms = [weight * LOSSES[kind](pairs, settings) for kind, weight in zip(settings.loss_type, weights, strict=True)]
    return torch.stack(terms).sum(0)


def shared_length_weights(mask: Tensor, alpha: float | None) -> Tensor:
    """The weight of each token of pairs' answers: ``alpha`` behind the length that both answers have, else 1.

    Args:
        mask: shape ``(2 b, t)``, the tokens of answers, the chosen ones first.
        alpha: the weight of the tokens behind; None: 1.

    Source: length-desensitized DPO, Liu et al. (2024).
    """
    if alpha is None:
        return torch.ones_like(mask, dtype=torch.float32)
    shared = torch.minimum(*mask.sum(dim=1).chunk(2)).repeat(2)
    return torch.where(mask.cumsum(dim=1) <= shared[:, None], 1.0, alpha)
