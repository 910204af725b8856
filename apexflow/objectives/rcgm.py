"""RCGM (Sun & Lin, 2025): any-step generation by a velocity field that agrees with itself recursively.

The mean direction from t to s, times its length, must be a short step along the path's velocity and then N jumps of
theta-minus. We had no text of the paper at hand but its abstract: this follows the method as its authors released it with
TwinFlow (Cheng et al., 2025), with their constants: short step 0.01 (the paper's), N = 2, an EMA for theta-minus at that
order, clip 1, `short_tailed`, `length_weight`, and 0.8 of the guidance difference added to the sample's velocity.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from apexflow.conditioning import Condition
from apexflow.objectives import Batch, Field, Losses, Networks
from apexflow.objectives.apex import move
from apexflow.objectives.cm import direction
from apexflow.objectives.derivative import speed
from apexflow.transport import expand


def short_tailed(error: Tensor, c: float) -> Tensor:
    """Barron's loss with alpha = 1 of each row's mean square, over c: near the root mean square where that is above c."""
    squared = error.float().flatten(1).square().mean(1) / c**2
    return c * squared / (squared + 1).sqrt()


def length_weight(t: Tensor, s: Tensor) -> Tensor:
    """`1 + tan((1 - (t - s)) pi / 2.5)`: short jumps weigh more."""
    return 1 + ((1 - (t - s)) * (math.pi / 2.5)).tan()


@dataclass(frozen=True)
class RCGM:
    """`F - clip((t - s) F / h - (jumps of theta-minus from t - h to s) / h - v)` is the target of F(x_t, t, c, s).

    order: N, how many jumps lead from t - h to s. stride: h. clip: of the correction, elementwise. c: of `short_tailed`.
    target: theta-minus is the EMA "reference" (theirs, from second order on) or the student itself (where memory lacks).
    velocity: v is the sample's own, or the teacher's field. guidance: scale that is trained in: from samples
        `v + (guidance - 1) (F(c) - F(null))` at s = t by theta-minus, of the teacher its guided answer.
    """

    order: int = 2
    stride: float = 0.01
    clip: float | None = 1.0
    target: Literal["reference", "student"] = "reference"
    velocity: Literal["sample", "teacher"] = "sample"
    guidance: float = 1.8
    c: float = 1e-3

    citation: ClassVar[str] = (
        "Sun & Lin, Any-step Generation via N-th Order Recursive Consistent Velocity Field Estimation, 2025"
    )
    sampler: ClassVar[dict[str, float]] = {"kappa": 0.0, "rho": 1.0, "order": 1}

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ValueError(f"order must be at least 1, got {self.order}")
        if not 0 < self.stride < 0.5:
            raise ValueError(f"stride must lie in (0, 0.5), got {self.stride}")
        if self.c <= 0 or (self.clip is not None and self.clip <= 0):
            raise ValueError(f"c and clip must be above 0, got {self.c} and {self.clip}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Whoever gives the velocity and theta-minus."""
        teacher, reference = self.velocity == "teacher", self.target == "reference"
        return ("teacher",) * teacher + ("reference",) * reference + ("second_time",)

    def __call__(self, networks: Networks, batch: Batch, memory: MutableMapping[str, Tensor]) -> Losses:
        """One micro-batch; t uniform, and s uniform below it."""
        t = batch.random.uniform().clamp(1e-3, 1 - 1e-5)
        s = t - batch.random.uniform() * t
        t, s = networks.round_time(t), networks.round_time(s)
        z = batch.random.normal(batch.x.shape[1:]).to(batch.x)
        losses, _ = self.rows(networks, batch.x, z, t, s, batch.c)
        loss = losses.sum() / batch.total
        return Losses(loss, {"loss": loss.detach()})

    def rows(
        self, networks: Networks, x: Tensor, z: Tensor, t: Tensor, s: Tensor, c: Condition
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss (n,) of some rows with jumps from t to s, and the student's predictions."""
        x_t = networks.transport.interpolate(x, z, t)
        F = networks.student(x_t, t, c, s)
        minus = self._minus(networks)

        def guided(v: Tensor, x_t: Tensor, null: Condition) -> Tensor:
            return v + (self.guidance - 1) * (minus(x_t, t, c, t) - minus(x_t, t, null, t))

        with torch.no_grad():
            v = direction(networks, (x, z), t, c, self.velocity, self.guidance, guided)
            correction = self._correction(networks, F.detach(), v, x_t, t, s, c)
            target = F - (correction if self.clip is None else correction.clamp(-self.clip, self.clip))
        return length_weight(t, s) * short_tailed(F - target, self.c), F

    def _minus(self, networks: Networks) -> Field:
        return networks.student if self.target == "student" else networks.reference

    def _correction(
        self, networks: Networks, F: Tensor, v: Tensor, x_t: Tensor, t: Tensor, s: Tensor, c: Condition
    ) -> Tensor:
        """How far F leads astray of the short step and the N jumps, per unit of h; F - v where s is within h."""
        transport, minus = networks.transport, self._minus(networks)
        start = networks.round_time((t - self.stride).maximum(s))
        x, time = move(v, x_t, t, start, transport), start
        for index in range(1, self.order + 1):
            following = networks.round_time(start + (s - start) * (index / self.order))
            x, time = move(minus(x, time, c, following), x, time, following, transport), following
        astray = x - move(F, x_t, t, s, transport)
        long = expand(t - s, F) > self.stride
        return torch.where(long, astray / expand((t - start).clamp_min(1e-6) * speed(t, transport), F), F - v)
