"""What a run's data are, source by source: told beforehand by `apexflow plan`, and kept beside the run for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apexflow.data.cache import INDEX, CachedSet
from apexflow.data.mixture import Cached, Mixture
from apexflow.training.config import Data
from apexflow.training.prepare import finished_sets


def used(data: Data, cached: Cached) -> list[dict[str, Any]]:
    """Of each source: its name, how many rows it has, which share of a run's rows it gives, and whether it has pictures."""
    sets, shares = _sets(cached), cached.shares if isinstance(cached, Mixture) else [1.0]
    return [
        {"source": part.told, "rows": len(one), "share": round(share, 6), "pictures": one.has_pictures}
        for part, one, share in zip(data.parts, sets, shares, strict=True)
    ]


def skipped_lines(data: Data, cached: Cached) -> list[str]:
    """A line for each source of which records could not be used: how many, which was the first, and where all are listed."""
    lines = []
    for part, one in zip(data.parts, _sets(cached), strict=True):
        found = {**one.index["broken"], **one.index["skipped"]}
        if found:
            name, reason = next(iter(found.items()))
            count = f"{len(found):,} of {one.index['seen']:,} records skipped"
            lines.append(
                f"{part.told}: {count}; first: {name}: {reason}; fix or remove them; the full list is in {one.folder / INDEX}"
            )
    return lines


def _sets(cached: Cached) -> list[CachedSet]:
    return cached.sets if isinstance(cached, Mixture) else [cached]


def foreseen(data: Data) -> list[dict[str, Any]]:
    """The same before a run, without what only a cache tells: rows and share are None where they are not known yet."""
    found = zip(data.parts, finished_sets(data), strict=True)
    rows = [len(one) if one is not None else part.count if part.drawn else None for part, one in found]
    weights: Sequence[float | None] = data.shares or (rows if len(rows) > 1 else [1.0])
    known = [weight for weight in weights if weight is not None]
    shares = [round(weight / sum(known), 6) for weight in known] if len(known) == len(weights) else [None] * len(rows)
    return [
        {"source": part.told, "rows": count, "share": share}
        for part, count, share in zip(data.parts, rows, shares, strict=True)
    ]


def source_line(source: Mapping[str, Any]) -> str:
    """One source in words."""
    rows = "rows are counted during caching" if source["rows"] is None else f"{source['rows']:,} rows"
    share = "in proportion to its size" if source["share"] is None else f"{source['share']:.1%} of a run's rows"
    return f"{source['source']}: {rows}, {share}"
