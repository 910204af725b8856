"""What the tests of APEX share: draws, and Eq. (14) as plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

# Path loss of Eq. 12-13 with theta-minus = theta, along the sample's own path, as plain least squares without clip.
PLAIN = {"reference": "student", "path_velocity": "sample", "clip": None, "p": 0.0}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ten_times(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, 10, dtype=torch.float64)


def plain_adaptive(values: list[float], p: float, c: float, reduction: str) -> float:
    norm = sum(value * value for value in values) / (len(values) if reduction == "mean" else 1)
    return norm / (norm + c) ** p


def plain_multi_scale(error: Tensor, p: float, c: float, reduction: str) -> list[float]:
    rows = []
    for row in error.tolist():
        losses = []
        for s in (1, 2, 4):
            pooled = [
                sum(plane[i + k][j + m] for k in range(s) for m in range(s)) / s**2
                for plane in row
                for i in range(0, len(plane), s)
                for j in range(0, len(plane[0]), s)
            ]
            losses.append(plain_adaptive(pooled, p, c, reduction))
        rows.append(sum(losses) / 3)
    return rows
