"""What is shown of a ranking: the sources, the best and the worst records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftw_optim.score._ranking import Ranking

SOURCES = 20


def shown(found: Ranking) -> str:
    """The ranking as text."""
    parts = [
        f"{found.ranked:,} of {found.records:,} records ranked towards {found.target_rows:,} rows",
        _sources(found),
        _records("best", found.best),
        _records("worst", found.worst),
    ]
    if found.sketch_error:
        parts.append(
            f"scores are estimates from sketches: an inner product is within {found.sketch_error:.1%} of the norms of "
            "its gradients (standard error, at most)"
        )
    return "\n\n".join(parts)


def _sources(found: Ranking) -> str:
    """The sources by mean rank, as a share of all ranks."""
    rows = []
    ranked = [(name, one) for name, one in found.sources.items() if one.ranked]
    for name, one in sorted(ranked, key=lambda item: item[1].ranks / item[1].ranked):
        mean = f"{one.ranks / one.ranked / found.ranked:.0%}"
        front = f"{one.in_front / one.ranked:.0%}"
        rows.append([name, f"{one.records:,}", mean, front, f"{one.scores / one.ranked:+.3g}"])
    more = [] if len(rows) <= SOURCES else [f"... and {len(rows) - SOURCES} more sources"]
    lines = _table(["source", "records", "mean rank", "in best tenth", "mean score"], rows[:SOURCES])
    return "\n".join([*lines, *more])


def _records(what: str, lines: Sequence[dict[str, Any]]) -> str:
    rows = []
    for one in lines:
        error = "" if one["standard_error"] is None else f" ± {one['standard_error']:.1g}"
        begins = " ".join(one["begins"].split())
        rows.append(
            [
                f"{one['rank']:,}",
                f"{one['score']:+.3g}{error}",
                f"{one['cosine']:+.2f}",
                f"{one['redundancy']:.2f}",
                one["source"],
                one["id"],
                begins,
            ]
        )
    return "\n".join(_table([what, "score", "cosine", "redundancy", "source", "id", "prompt"], rows))


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of columns that are as wide as their widest entry."""
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    return [
        "  ".join(entry.ljust(width) for entry, width in zip(row, widths, strict=True)).rstrip()
        for row in [heads, *rows]
    ]
