"""Log-probabilities of the tokens of answers, and what a preference trainer logs of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, final

import torch
from torch import Tensor

from ftw_optim._step.label_head import IGNORED, LabelLogits

AT_ONCE = 512
"""Number of positions whose probabilities exist beside their logits at a time."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class TokenValues:
    """Values of the next tokens of ``r`` rows, shape ``(r, t - 1)`` each; zero where a token is not predicted.

    Attributes:
        log_probs: log-probability of the token.
        entropy: of its distribution, without a graph.
        mean_logits: mean logit of all tokens at its position, without a graph.
        is_top1: whether it is the most likely one.
        log_sum_sq_probs: logarithm of the sum of the squared probabilities of all tokens at its position, without a
            graph; None where it was not asked for.
    """

    log_probs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    log_sum_sq_probs: Tensor | None = None

    @classmethod
    def of_fused(cls, output: Any, length: int) -> TokenValues:
        """The values that TRL's fused output layer gives, at the last ``length`` positions: adapters may add others."""
        return cls._each(output, lambda value: value[:, -length:])

    @classmethod
    def _each(cls, values: Any, change: Callable[[Tensor], Tensor]) -> TokenValues:
        given: dict[str, Any] = {one.name: getattr(values, one.name) for one in fields(cls)}
        changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in given.items()}
        return cls(**changed)

    @classmethod
    def of_logits(cls, found: LabelLogits, *, squares: bool) -> TokenValues:
        """The values from logits, which the output layer gave as a module; those of ``squares`` where asked for."""
        losses, _ = found.losses()
        logits, targets = found.logits.detach().flatten(0, 1), found.targets.flatten()
        where = (targets != IGNORED).nonzero()[:, 0]
        places = where if found.index is None else found.index[where]
        names = ("entropy", "mean_logits", "is_top1", *(["log_sum_sq_probs"] if squares else []))
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        with torch.no_grad():
            for some in torch.split(where, AT_ONCE):
                each = logits[some].to(torch.promote_types(logits.dtype, torch.float32))
                log_probs = each.log_softmax(dim=-1)
                parts["entropy"].append(-(log_probs.exp() * log_probs).sum(dim=-1))
                parts["mean_logits"].append(each.mean(dim=-1))
                parts["is_top1"].append(each.argmax(dim=-1) == targets[some])
                if squares:
                    parts["log_sum_sq_probs"].append((2 * log_probs).logsumexp(dim=-1))

        def grid(name: str) -> Tensor:
            dtype = torch.bool if name == "is_top1" else losses.dtype
            flat = torch.zeros(found.grid.numel(), dtype=dtype, device=logits.device)
            if parts[name]:
                flat[places] = torch.cat(parts[name]).to(dtype)
            return flat.view(found.grid)[:, :-1]

        return cls(log_probs=-losses[:, :-1], **{name: grid(name) for name in parts})

    def likelihoods(self, counted: Tensor) -> Tensor:
        """How likely each row's tokens are beside those drawn from the model, a weight without a graph, ``(r,)``.

        Args:
            counted: shape ``(r, t - 1)``, the tokens that count.

        Source: weighted preference optimization, Zhou et al. (2024), equation 2.
        """
        assert self.log_sum_sq_probs is not None
        apart = (self.log_probs.detach() - self.log_sum_sq_probs) * counted
        return (apart.sum(dim=1) / counted.sum(dim=1).clamp(min=1)).exp()

    def detached(self) -> TokenValues:
        """The values without a graph."""
        return self._each(self, Tensor.detach)

    def sums(self, counted: Tensor) -> dict[str, Tensor]:
        """Sums over the tokens that count, of the chosen rows or the rejected ones; scalars for :meth:`means`."""
        chosen, rejected = counted.bool().chunk(2)
        logits = self.mean_logits.chunk(2)
        return {
            "entropy": (self.entropy * counted).sum(),
            "tokens": counted.sum(),
            "logits/chosen": (logits[0] * chosen).sum(),
            "logits/rejected": (logits[1] * rejected).sum(),
            "hits": (self.is_top1.chunk(2)[0].bool() & chosen).sum(),
            "chosen": chosen.sum(),
            "rejected": rejected.sum(),
        }

    @staticmethod
    def means(sums: Mapping[str, float]) -> dict[str, float]:
        """The metrics of a token, by the names that TRL's trainer gives them."""
        wanted = {
            "entropy": ("entropy", "tokens"),
            "logits/chosen": ("logits/chosen", "chosen"),
            "logits/rejected": ("logits/rejected", "rejected"),
            "mean_token_accuracy": ("hits", "chosen"),
        }
        return {name: sums[total] / sums[count] if sums[count] else 0.0 for name, (total, count) in wanted.items()}
