"""Damage to records of the stream that likeness hardly sees: the prompt stays, and the response is spoiled.

Each kind is one that pools really have: answers to another question, answers that stop early or go round in circles,
placeholders, and refusals.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence

from .records import Record

MARK = " (damaged)"
"""The end of a damaged record's source, which no arm but an oracle is told."""

Damage = Callable[[str, str, random.Random], str]
"""A function of a response, of that of another record, and of a source of random numbers."""

_PLACEHOLDERS = ("N/A", "...", "TODO", "I don't know.", "None")
# As long as an ordinary short answer, so that means over tokens do not hide them.
_REFUSALS = (
    "I'm sorry, but I am not able to help with this request.",
    "As a language model, I do not have enough information to answer that question.",
    "This request cannot be answered. Please ask an expert in the field instead.",
    "I cannot give an answer to that. Is there anything else I can help you with?",
    "Something went wrong while your request was being processed. Please try again later.",
)


def _foreign(response: str, other: str, draw: random.Random) -> str:
    return other


def _truncated(response: str, other: str, draw: random.Random) -> str:
    words = response.split(" ")
    return " ".join(words[: max(1, int(len(words) * draw.uniform(0.1, 0.5)))])


def _looped(response: str, other: str, draw: random.Random) -> str:
    words = response.split(" ")
    start = words[: draw.randint(1, 2)]
    return " ".join((start * len(words))[: max(4, len(words))])


def _placeholder(response: str, other: str, draw: random.Random) -> str:
    return draw.choice(_PLACEHOLDERS)


def _refusal(response: str, other: str, draw: random.Random) -> str:
    return draw.choice(_REFUSALS)


DAMAGES: Mapping[str, Damage] = {
    "foreign": _foreign,
    "truncated": _truncated,
    "looped": _looped,
    "placeholder": _placeholder,
    "refusal": _refusal,
}


def damaged(records: Sequence[Record], shares: Mapping[str, float], *, seed: int = 0) -> list[Record]:
    """The records, of which a share is damaged in each way; which ones depends on the seed and the prompt alone.

    Raises:
        ValueError: a way is not known, or the shares are not positive and below one together.
    """
    if unknown := shares.keys() - DAMAGES.keys():
        raise ValueError(f"Damage must be one of {', '.join(DAMAGES)}, got {', '.join(sorted(unknown))}.")
    if not all(share > 0.0 for share in shares.values()) or sum(shares.values()) >= 1.0:
        raise ValueError(f"Shares of damage must be positive and sum to less than one, got {dict(shares)}.")
    result = []
    for number, record in enumerate(records):
        digest = hashlib.blake2b(f"{seed}/{record['prompt']}".encode(), digest_size=8).digest()
        draw = random.Random(int.from_bytes(digest, "little"))
        left = draw.random()
        for kind, share in shares.items():
            left -= share
            if left < 0.0:
                other = records[(number + 1 + draw.randrange(len(records) - 1)) % len(records)]
                response = DAMAGES[kind]((record["response"] or "").strip(), other["response"] or "", draw)
                record = {**record, "response": response, "source": f"{record.get('source') or 'unnamed'}{MARK}"}
                break
        result.append(record)
    return result
