"""Which rows of a set stand in which global batch: a function of step and seed alone, so that every process agrees on it and a
resumed run needs no saved position."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from apexflow.randomness import mix


def batch_rows(sizes: Sequence[int], step: int, rows: Sequence[int], batch: int, seed: int) -> tuple[int, list[int]]:
    """The bucket that a step's global batch of `batch` rows comes from, and the positions in it of some `rows` of the batch.

    sizes: how many pictures each bucket holds. Each bucket is an endless stream of shuffled epochs, and gets as many batches
    as its pictures are worth, to the batch: no picture is left out, however small its bucket.
    """
    bucket, start = _place(tuple(sizes), step, batch, seed)
    stream = seed if bucket == 0 else mix(seed, 4, bucket)
    return bucket, [data_row(start + row, sizes[bucket], stream) for row in rows]


def mixed_rows(
    places: Sequence[Sequence[int]],
    counts: Sequence[Sequence[int]],
    step: int,
    rows: Sequence[int],
    batch: int,
    seed: int,
) -> tuple[int, list[tuple[int, int]]]:
    """As `batch_rows` over several sets: the bucket, and for each row which set it comes from and the position there.

    places: by bucket, how many of an epoch's rows each set gets. counts: how many pictures it has there. An epoch is shuffled
    as a whole, and each set beneath it is an endless stream of shuffled epochs of its own, so that each of its pictures is
    seen as often as the others, however many places the set has.
    """
    bucket, start = _place(tuple(sum(each) for each in places), step, batch, seed)
    ends = list(accumulate(places[bucket]))
    stream = seed if bucket == 0 else mix(seed, 4, bucket)
    found = []
    for row in rows:
        epoch, offset = divmod(start + row, ends[-1])
        place = int(epoch_order(epoch, ends[-1], stream)[offset])
        part = bisect_right(ends, place)
        own = places[bucket][part]
        position = epoch * own + place - (ends[part] - own)
        found.append((part, data_row(position, counts[bucket][part], mix(stream, 5, part))))
    return bucket, found


def data_row(position: int, count: int, seed: int) -> int:
    """Which picture stands at a position of an endless, shuffled stream of epochs."""
    epoch, offset = divmod(position, count)
    return int(epoch_order(epoch, count, seed)[offset])


@lru_cache(maxsize=64)
def epoch_order(epoch: int, count: int, seed: int) -> Tensor:
    """The pictures of an epoch, (count,), shuffled."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, 2, epoch)))


def _place(sizes: tuple[int, ...], step: int, batch: int, seed: int) -> tuple[int, int]:
    """The bucket of a step, and where in the bucket's stream its batch begins."""
    if len(sizes) == 1:
        return 0, step * batch
    epochs = range((step + 1 + len(sizes)) * batch // sum(sizes) + 2)  # by the last of them the step is past
    epoch = bisect_right(epochs, step, key=lambda e: sum(_batches(sizes, e, batch))) - 1
    before, after = _batches(sizes, epoch, batch), _batches(sizes, epoch + 1, batch)
    buckets = _epoch_buckets(tuple(b - a for a, b in zip(before, after, strict=True)), mix(seed, 3, epoch))
    index = step - sum(before)
    bucket = int(buckets[index])
    return bucket, (before[bucket] + int((buckets[:index] == bucket).sum())) * batch


def _batches(sizes: tuple[int, ...], epochs: int, batch: int) -> list[int]:
    """How many whole batches of each bucket the first `epochs` epochs hold."""
    return [epochs * size // batch for size in sizes]


@lru_cache(maxsize=4)
def _epoch_buckets(counts: tuple[int, ...], seed: int) -> Tensor:
    """The buckets of an epoch's batches, shuffled."""
    buckets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return buckets[torch.randperm(len(buckets), generator=torch.Generator().manual_seed(seed))]
