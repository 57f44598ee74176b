"""The records of a comparison: what every arm reads, trains on and is judged by."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from .damage import MARK, damaged
from .records import Encoder, Example, Record, encoder, first_examples, in_random_order, shuffled_examples

VALIDATION_SHARE = 0.25


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """The records of all arms and seeds.

    Attributes:
        pool: records that the stream is drawn from.
        guide: target rows that arms may use, to guide or to train.
        validation: target rows that choose a checkpoint, and nothing else.
        test: rows of the reported loss.
        pool_test: records of the pool that are in no stream.
        encode: record to example; None for one that is too long.
        own_source: prefix of the sources that the target is related to; empty where none is given.
    """

    pool: Sequence[Record]
    guide: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    pool_test: Sequence[Example]
    encode: Encoder
    own_source: str = ""

    def stream(self, *, steps: int, read_ahead: int, seed: int) -> list[list[Example]]:
        """The records read at each step, the same for every arm; a longer stream starts with the shorter one."""
        flat, _ = shuffled_examples(self.pool, self.encode, steps * read_ahead, seed=seed)
        return [flat[at : at + read_ahead] for at in range(0, len(flat), read_ahead)]

    def own_examples(self) -> list[Example]:
        """All records of the target's own source that are not damaged; empty where none is named."""
        if not self.own_source:
            return []
        sources = [(record, str(record.get("source") or "")) for record in self.pool]
        records = [record for record, name in sources if name.startswith(self.own_source) and not name.endswith(MARK)]
        return first_examples(records, self.encode, sys.maxsize)[0]


def build_setting(
    pool: Sequence[Record],
    target: Sequence[Record],
    test: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    target_rows: int,
    test_rows: int,
    pool_rows: int,
    own_source: str = "",
    dirt: Sequence[Record] = (),
    dirt_share: float = 0.0,
    damage: Mapping[str, float] | None = None,
) -> Setting:
    """The splits, by a fixed order of the records: the same for all seeds.

    The stream's records are those of the pool, a share of them replaced by ``dirt``, and a share damaged in each of
    some ways, see :mod:`pays.damage`; what is held out is clean.

    Raises:
        ValueError: a split would be empty.
    """
    encode = within(tokenizer, max_length)
    order = list(in_random_order(pool, seed=0))
    pool_test, skipped = first_examples(order, encode, pool_rows)
    given, _ = first_examples(in_random_order(target, seed=0), encode, target_rows)
    held_back = math.ceil(VALIDATION_SHARE * len(given))
    stream = _mixed(order[len(pool_test) + skipped :], list(in_random_order(dirt, seed=0)), dirt_share)
    setting = Setting(
        pool=damaged(stream, damage) if damage else stream,
        guide=given[held_back:],
        validation=given[:held_back],
        test=first_examples(in_random_order(test, seed=0), encode, test_rows)[0],
        pool_test=pool_test,
        encode=encode,
        own_source=own_source,
    )
    for name in ("pool", "guide", "validation", "test", "pool_test"):
        if not getattr(setting, name):
            raise ValueError(f"No record of {max_length} tokens at most is left for {name}; raise --max-length.")
    return setting


def _mixed(clean: Sequence[Record], dirt: Sequence[Record], share: float) -> list[Record]:
    """The most records of which a share is dirt, without any of them twice."""
    if not 0.0 <= share < 1.0 or (share > 0.0 and not dirt):
        raise ValueError(f"The share of dirt must be in [0, 1), and dirt be given where it is not 0, got {share}.")
    if share == 0.0:
        return list(clean)
    count = min(len(dirt) / share, len(clean) / (1 - share))
    return [*clean[: round(count * (1 - share))], *dirt[: round(count * share)]]


def within(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoder:
    """An encoder that leaves out records longer than ``max_length`` instead of cutting them.

    A response without its end would teach something that no arm should be praised or blamed for.
    """
    longer = encoder(tokenizer, max_length + 1)

    def encode(record: Record) -> Example | None:
        example = longer(record)
        return None if example is None or len(example.tokens) > max_length else example

    return encode
