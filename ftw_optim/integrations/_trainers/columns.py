"""Columns of the training data that reach the selection log, and never the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True)
class WithColumns:
    """A collator that carries some columns past another one.

    Attributes:
        collator: makes the batch of the rest.
        columns: key in the batch to column of the data.
    """

    collator: Callable[[list[Any]], Any]
    columns: Mapping[str, str]

    def __call__(self, examples: list[Any]) -> Any:
        """The batch.

        Raises:
            KeyError: an example without one of the columns.
        """
        for name in self.columns.values():
            if any(name not in example for example in examples):
                raise KeyError(f"Expected a column {name!r} in the training data, got {sorted(examples[0])}.")
        names = set(self.columns.values())
        batch = self.collator(
            [{key: value for key, value in example.items() if key not in names} for example in examples]
        )
        return {**batch, **{key: [example[name] for example in examples] for key, name in self.columns.items()}}
