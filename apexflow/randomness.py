"""Random numbers that belong to a row of a step, not to a process or a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RowRandom:
    """One CPU generator for each row, seeded by (seed, step, row).

    The same row of the same step gets the same numbers whatever the micro-batch, the accumulation or the number of
    processes, and a resumed run needs no saved random state.
    """

    def __init__(self, seed: int, step: int, rows: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._generators = [torch.Generator().manual_seed(mix(seed, step, row)) for row in rows]
        self._device = torch.device(device)

    @classmethod
    def of_pictures(
        cls, seeds: Sequence[tuple[int, int]], stream: int, device: torch.device | str = "cpu"
    ) -> RowRandom:
        """Rows that belong to pictures, each with its own (seed, index); streams of one picture are unrelated."""
        rows = cls(0, stream, [], device)
        rows._generators = [torch.Generator().manual_seed(mix(seed, stream, index)) for seed, index in seeds]
        return rows

    def normal(self, shape: Sequence[int], where: Tensor | None = None) -> Tensor:
        """Standard normal (B, *shape), or (n, *shape) for the n rows that the boolean `where` (B,) marks."""
        drawn = [torch.randn(tuple(shape), generator=g) for g in self._rows(where)]
        return self._there(drawn) if drawn else torch.empty(0, *shape, device=self._device)

    def uniform(self, where: Tensor | None = None) -> Tensor:
        """Uniform in [0, 1), one for each row (or each marked row), in float32."""
        drawn = [torch.rand((), generator=g) for g in self._rows(where)]
        return self._there(drawn) if drawn else torch.empty(0, device=self._device)

    def _there(self, drawn: list[Tensor]) -> Tensor:
        # Nobody writes to these again, so that nobody need wait until a GPU has fetched them.
        return torch.stack(drawn).to(self._device, non_blocking=True)

    def _rows(self, where: Tensor | None) -> list[torch.Generator]:
        if where is None:
            return self._generators
        return [g for g, keep in zip(self._generators, where.tolist(), strict=True) if keep]


def mix(*numbers: int) -> int:
    """One 63-bit seed from several integers (splitmix64 rounds), so that neighbouring steps and rows are unrelated."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
