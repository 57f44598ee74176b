"""Checks of a preference trainer's settings, beside those of all trainers: refused before anything is constructed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ftw_optim.integrations._trainers.preference_losses import COUPLED, LOSSES, SCORES


def refuse_preference_settings(args: Any) -> None:
    """Refuse settings of TRL's DPO trainer under which a pair has no loss of its own, or another than is known here.

    Args:
        args: the trainer's arguments; None: its defaults.

    Raises:
        NotImplementedError: there is such a setting; the message lists all of them.
    """
    reasons = [] if args is None else list(_reasons(args))
    if reasons:
        raise NotImplementedError("SelectiveDPOTrainer cannot be used like this: " + "; ".join(reasons) + ".")


def _reasons(args: Any) -> Iterator[str]:
    kinds = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    for kind in kinds:
        if kind in COUPLED:
            yield f'loss_type="{kind}" {COUPLED[kind]}, so that no pair has a gradient of its own: use "sigmoid"'
        elif kind not in LOSSES:
            yield f'loss_type="{kind}" is not known: use one of {", ".join(LOSSES)}'
    if args.f_divergence_type not in SCORES:
        yield f'f_divergence_type="{args.f_divergence_type}" is not known: use one of {", ".join(SCORES)}'
    if args.padding_free:
        yield ("padding_free=True is not known for pairs (TRL 1.16 itself falls back to padding): leave it out")
    if args.sync_ref_model:
        yield ("sync_ref_model changes the reference, which no checkpoint holds: no run could be resumed; leave it out")
