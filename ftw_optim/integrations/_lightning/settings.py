"""Settings of a trainer that a module may bring along."""

from __future__ import annotations

from typing import Any, final

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import GradClipAlgorithmType

_DEFAULTS: dict[str, Any] = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "gradient_clip_algorithm": None}


@final
class Settings:
    """The settings that a module gives its trainer for a fit, until :meth:`restore`.

    Args:
        trainer: it has the settings of ``Trainer(...)``.
        module: its attributes of the same names; None leaves the trainer's.

    Raises:
        ValueError: a setting has no meaning, or the two disagree.
        TypeError: a limit is no number.
    """

    def __init__(self, trainer: Trainer, module: Any) -> None:
        self._before = {name: getattr(trainer, name) for name in _DEFAULTS}
        wanted = {name: getattr(module, name) for name in _DEFAULTS if getattr(module, name) is not None}
        for name, value in wanted.items():
            _check(name, value)
            if self._before[name] not in (_DEFAULTS[name], value):
                raise ValueError(
                    f"Expected {name} to be set once, got {value!r} on the module and {self._before[name]!r} in the "
                    "Trainer: leave out one."
                )
        for name, value in wanted.items():
            setattr(trainer, name, GradClipAlgorithmType(value) if name == "gradient_clip_algorithm" else value)
        self._trainer, self._given = trainer, wanted

    def restore(self) -> None:
        """Put the trainer's own settings back."""
        for name in self._given:
            setattr(self._trainer, name, self._before[name])


def _check(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == "accumulate_grad_batches" and not (number and isinstance(value, int) and value >= 1):
        raise ValueError(f"accumulate_grad_batches must be a positive integer, got {value!r}.")
    if name == "gradient_clip_val" and not number:
        raise TypeError(f"gradient_clip_val must be a number or None, got {value!r}.")
    if name == "gradient_clip_algorithm" and value not in ("norm", "value"):
        raise ValueError(f'gradient_clip_algorithm must be "norm" or "value", got {value!r}.')
