"""Several cached sets in one run, which asks them as it asks one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from apexflow.conditioning import Condition
from apexflow.data.cache import CachedSet, padded
from apexflow.data.order import mixed_rows
from apexflow.errors import UserError

PLACES = 1_000  # of an epoch at least for each bucket, so that a share is met to a tenth of a percent


class Mixture:
    """Finished caches as one set, which answers what a `CachedSet` does. Rows are numbered over all of them, in their order."""

    def __init__(self, sets: Sequence[CachedSet], shares: Sequence[float] = ()) -> None:
        """shares: the parts of the rows that come from each, of whatever sum; by default as many as it has, so that the sets are
        shuffled together. UserError for sets that cannot stand in one batch."""
        check_sizes(sets)
        self.sets = list(sets)
        self.size = sets[0].size
        self._ends = list(accumulate(len(one) for one in sets))
        self._buckets = sorted({name for one in sets for name in one.buckets})
        self._counts = [[one.count(name) for one in sets] for name in self._buckets]
        self._places = [self._places_of(counts, shares) for counts in self._counts] if shares else self._counts

    def _places_of(self, counts: Sequence[int], shares: Sequence[float]) -> list[int]:
        """How many rows of an epoch each set gets in a bucket where it has so many pictures."""
        epoch = max(len(self), PLACES * len(self._buckets))
        parts = [share / sum(shares) / one.trained for share, one in zip(shares, self.sets, strict=True)]
        # No bucket is left out, however few its pictures.
        return [max(round(epoch * part * n), min(1, n)) if part else 0 for part, n in zip(parts, counts, strict=True)]

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def trained(self) -> int:
        """How many rows there are to train on: all but what is held out of each."""
        return sum(one.trained for one in self.sets)

    @property
    def shares(self) -> list[float]:
        """The part of the rows that each set gives; together 1."""
        given = [sum(column) for column in zip(*self._places, strict=True)]
        return [one / sum(given) for one in given]

    def batch_rows(self, step: int, rows: Sequence[int], batch: int, seed: int) -> list[int]:
        """The rows of this set that stand at `rows` of a step's global batch: all of one bucket, so of one shape."""
        bucket, found = mixed_rows(self._places, self._counts, step, rows, batch, seed)
        name, starts = self._buckets[bucket], [0, *self._ends]
        return [starts[part] + self.sets[part].row_of(name, position) for part, position in found]

    def spread(self, most: int) -> list[int]:
        """Rows from all over each set that has a share, as many of one as of another: `most` of them, or all there are."""
        used = [part for part, share in enumerate(self.shares) if share]
        turns = [part for turn in range(most) for part in used if turn < len(self.sets[part])][:most]
        starts = [0, *self._ends]
        return [starts[part] + row for part in used for row in self.sets[part].spread(turns.count(part))]

    def latents(self, rows: Sequence[int]) -> Tensor:
        """Latents (B, C, h, w) in float32 of rows of one bucket; zeros for those of a list of prompts."""
        return torch.cat([one.latents([row]) for one, row in map(self._locate, rows)])

    def condition(self, rows: Sequence[int]) -> Condition:
        """Embeddings of some captions in float32, padded to the longest of them; without a mask where none is padded."""
        found = [one.condition([row]) for one, row in map(self._locate, rows)]
        return padded([c.embeds[0] for c in found], [c.pooled[0] for c in found if c.pooled is not None])

    def null(self) -> Condition | None:
        """The condition of the empty prompt, (1, L, D), which is the same in all; None when only captions are kept."""
        return self.sets[0].null()

    def captions(self, rows: Iterable[int]) -> list[str]:
        """The captions of some rows."""
        return [one.captions([row])[0] for one, row in map(self._locate, rows)]

    def _locate(self, row: int) -> tuple[CachedSet, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        part = bisect_right(self._ends, row)
        return self.sets[part], row - (self._ends[part - 1] if part else 0)


Cached = CachedSet | Mixture


def check_sizes(sets: Sequence[CachedSet]) -> None:
    """UserError for caches that were made at different sizes."""
    for one, other in pairwise(sets):
        if one.size != other.size:
            raise UserError(
                f"cache {other.folder} was made at size {other.size} and cache {one.folder} at {one.size}: make them at one size "
                "(apexflow cache --size)"
            )
