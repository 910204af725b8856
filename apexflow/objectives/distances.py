"""How far rows lie from their targets: the mean square, and pseudo-Huber distances, lengths of all but small errors."""

from __future__ import annotations

import math

from torch import Tensor


def mean_square(error: Tensor) -> Tensor:
    """The mean over the elements of each row of an error (B, ...), squared, in float32: (B,)."""
    return error.float().flatten(1).square().mean(1)


def pseudo_huber(error: Tensor, c: float | None) -> Tensor:
    """iCT, section 3.3: `sqrt(||e||^2 + (c sqrt d)^2) - c sqrt d` for each row of d elements; None: their mean square."""
    if c is None:
        return mean_square(error)
    squared = error.float().flatten(1).square()
    offset = c * math.sqrt(squared.shape[1])
    return (squared.sum(1) + offset**2).sqrt() - offset


def mean_huber(error: Tensor, c: float) -> Tensor:
    """Pseudo-Huber by element, `sqrt(e^2 + c^2) - c`, averaged over each row."""
    return ((error.float().square() + c**2).sqrt() - c).flatten(1).mean(1)
