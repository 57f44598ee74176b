"""Columns of the training data that go to the selection log and never to the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True)
class WithColumns:
    """A collator that adds some columns to the batch of another collator, which never sees them.

    Attributes:
        collator: makes the batch from all other columns.
        columns: keys in the batch, mapped to columns of the data.
    """

    collator: Callable[[list[Any]], Any]
    columns: Mapping[str, str]

    def __call__(self, examples: list[Any]) -> Any:
        """The batch of some examples, with the columns.

        Raises:
            KeyError: an example lacks one of the columns.
        """
        for name in self.columns.values():
            if any(name not in example for example in examples):
                raise KeyError(f"Expected a column {name!r} in the training data, got {sorted(examples[0])}.")
        names = set(self.columns.values())
        batch = self.collator(
            [{key: value for key, value in example.items() if key not in names} for example in examples]
        )
        return {**batch, **{key: [example[name] for example in examples] for key, name in self.columns.items()}}
