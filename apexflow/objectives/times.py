"""Laws of the time t: where on the path a method trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apexflow.randomness import RowRandom
from apexflow.sampler import shift_times


@dataclass(frozen=True)
class TimeLaw:
    """A law of times between data (0) and noise (1).

    kind: "uniform" in [0, 1], or "logit_normal", a normal law of log(t / (1 - t)).
    mean: of that normal law; above 0 is nearer to noise. spread: of that normal law, above 0.
    shift: above 1 moves the drawn times towards noise, as the backbone's scheduler does: `t' = s t / (1 + (s - 1) t)`.
    """

    kind: str = "logit_normal"
    mean: float = 0.0
    spread: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("uniform", "logit_normal"):
            raise ValueError(f"time law must be uniform or logit_normal, got {self.kind!r}")
        if self.spread <= 0 or self.shift <= 0:
            raise ValueError(f"spread and shift of a time law must be above 0, got {self.spread} and {self.shift}")

    def draw(self, random: RowRandom, where: Tensor | None = None) -> Tensor:
        """Times (n,) in (0, 1), float32, one for each row that `where` marks (all rows when None)."""
        t = (
            random.uniform(where)
            if self.kind == "uniform"
            else torch.sigmoid(self.mean + self.spread * random.normal((), where))
        )
        return shift_times(off_the_ends(t), self.shift)


def off_the_ends(t: Tensor) -> Tensor:
    """Times kept off 0 and 1 by a hair: at t = 0 nothing is left to predict, and a secant needs a step."""
    return t.clamp(1e-3, 1 - 1e-5)
