"""Checks of a trainer's class: methods that selection would leave out are refused when the class is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

FRAMEWORKS = (
    "transformers.trainer",
    "transformers.trainer_seq2seq",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
    "trl.trainer.reward_trainer",
)
"""The modules whose training step is known: the selective one does all that it does."""


def of_framework(function: Callable[..., Any]) -> bool:
    """Whether a method is as the framework defines it."""
    return function.__module__ in FRAMEWORKS


def refuse_overrides(kind: type, mixin: type) -> None:
    """Refuse a class whose training step hides the selective one, or is hidden by it.

    Args:
        kind: the class that has just been made.
        mixin: the class that defines the selective training step.

    Raises:
        TypeError: there is such a training step; the message names it.
    """
    place = kind.__mro__.index(mixin)
    for above in kind.__mro__[:place]:
        step = vars(above).get("training_step")
        if step is not None and not _goes_on(step):
            raise TypeError(
                f"Expected {kind.__name__} to train by {mixin.__name__}.training_step, which selects, but "
                f"{above.__name__}.training_step hides it. Call super().training_step in it, and define losses of your "
                f"own in position_losses; name {mixin.__name__} before {_base(kind, mixin)}."
            )
    for below in kind.__mro__[place + 1 :]:
        step = vars(below).get("training_step")
        if step is None:
            continue
        if not of_framework(step):
            raise TypeError(
                f"{kind.__name__} would never call {below.__name__}.training_step, since {mixin.__name__}'s selects in "
                f"its place. Name {below.__name__} before the selective class, where its super().training_step is the "
                f"selective one; terms that it adds to the loss belong into position_losses."
            )
        return


def _goes_on(step: Any) -> bool:
    """Whether the function may call the training step that it hides: it has no backward of its own, or ``super()``.

    A decorated one, or one that delegates, may; before the first step it is seen whether it did.
    """
    code = getattr(inspect.unwrap(getattr(step, "__func__", step)), "__code__", None)
    if code is None or "__class__" in code.co_freevars or "training_step" in code.co_names:
        return True
    return "backward" not in code.co_names


def _base(kind: type, mixin: type) -> str:
    """The trainer's class that the mixin is combined with."""
    after = kind.__mro__[kind.__mro__.index(mixin) + 1 :]
    return after[0].__name__ if after else "the trainer's class"
