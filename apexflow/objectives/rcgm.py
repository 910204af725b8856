"""RCGM (Sun & Lin, 2025): any-step generation by a velocity field that agrees with itself recursively.

The mean direction from t to s, times its length, must be a short step along the path's velocity and then N jumps of
theta-minus. We had no text of the paper at hand but its abstract: this follows the method as its authors released it with
TwinFlow (Cheng et al., 2025), with their constants: short step 0.01 (the paper's), N = 2, an EMA for theta-minus at that
order, clip 1, `short_tailed`, `length_weight`, rows in thirds (what they call their practice), and 0.8 of the guidance
difference added to the sample's velocity. As the network that takes part in the difference learns the sum, that ends at a
scale of 1 / (1 - 0.8) = 5, and at none from a ratio of 1 on; the authors' UCGM turns scales into ratios in the same way.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from apexflow.conditioning import Condition
from apexflow.objectives import Batch, Field, Losses, Networks, Objective
from apexflow.objectives.derivative import speed
from apexflow.objectives.distances import mean_square
from apexflow.objectives.teacher import direction
from apexflow.objectives.times import off_the_ends
from apexflow.transport import expand

JUMP, ANY, SHORT = range(3)
# Up to four steps lead to data each, with fresh noise between; eight and more each to the next time.
ANY_STEP: dict[int, dict[str, float]] = {8: {"kappa": 0.0, "rho": 0.0, "order": 1}}


def short_tailed(error: Tensor, c: float) -> Tensor:
    """Each row's mean square, over c, by the weight of Barron's loss with alpha = 1: near the root mean square above c.

    The weight has no gradient.
    """
    squared = mean_square(error) / c**2
    return c * squared / (squared.detach() + 1).sqrt()


def length_weight(t: Tensor, s: Tensor) -> Tensor:
    """`1 + tan((1 - (t - s)) pi / 2.5)`: short jumps weigh more."""
    return 1 + ((1 - (t - s)) * (math.pi / 2.5)).tan()


@dataclass(frozen=True)
class RCGM(Objective):
    """`F - clip((t - s) F / h - (jumps of theta-minus from t - h to s) / h - v)` is the target of F(x_t, t, c, s).

    order: N, how many jumps lead from t - h to s. stride: h, in (0, 0.5).
    clip: of the correction, elementwise; null: no clip.
    target: theta-minus is the EMA "reference" (theirs, from second order on) or the student itself (where memory lacks).
    velocity: v is the sample's own, or the teacher's field. guidance: scale that is trained in: from samples, in the end, by
        `v + (1 - 1 / guidance) (F(c) - F(null))` at s = t by theta-minus; of the teacher its guided answer.
    c: of the loss `short_tailed`: squares for errors below it, lengths above.
    jumps: what rows learn: "thirds" jump from noise to data, between any two times, and over a stretch of at most `short` of
        their t (the authors' practice), or all jump between "any" two times (their theory).
    short: the longest of the short stretches, as a share of t.
    """

    order: int = 2
    stride: float = 0.01
    clip: float | None = 1.0
    target: Literal["reference", "student"] = "reference"
    velocity: Literal["sample", "teacher"] = "sample"
    guidance: float = 5.0
    c: float = 1e-3
    jumps: Literal["thirds", "any"] = "thirds"
    short: float = 0.05

    citation: ClassVar[str] = (
        "Sun & Lin, Any-step Generation via N-th Order Recursive Consistent Velocity Field Estimation, 2025"
    )
    sampler: ClassVar[dict[str, float]] = {"kappa": 0.0, "rho": 1.0, "order": 1}
    longer: ClassVar[dict[int, dict[str, float]]] = ANY_STEP

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order < 1:
            raise ValueError(f"order must be at least 1, got {self.order}")
        if not 0 < self.stride < 0.5:
            raise ValueError(f"stride must lie in (0, 0.5), got {self.stride}")
        if self.c <= 0 or (self.clip is not None and self.clip <= 0):
            raise ValueError(f"c and clip must be above 0, got {self.c} and {self.clip}")
        if self.guidance <= 0 or not 0 < self.short <= 1:
            raise ValueError(f"guidance must be above 0 and short in (0, 1], got {self.guidance} and {self.short}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Whoever gives the velocity and theta-minus."""
        teacher, reference = self.velocity == "teacher", self.target == "reference"
        return ("teacher",) * teacher + ("reference",) * reference + ("second_time",)

    def __call__(self, networks: Networks, batch: Batch, memory: MutableMapping[str, Tensor]) -> Losses:
        """One micro-batch: a mean over the global batch."""
        kind = batch.rows.remainder(3) if self.jumps == "thirds" else torch.full_like(batch.rows, ANY)
        t, s = (networks.round_time(time) for time in self.times(batch, kind))
        z = batch.random.normal(batch.x.shape[1:]).to(batch.x)
        losses, _ = self.rows(networks, batch.x, z, t, s, batch.c)
        loss = losses.sum() / batch.total
        return Losses(loss, {"loss": loss.detach()})

    def times(self, batch: Batch, kind: Tensor, where: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """t and s of some rows by their `kind` (n,): 1 and 0, any two, or two that lie near each other."""
        t = off_the_ends(batch.random.uniform(where))
        part = batch.random.uniform(where) * torch.where(kind == SHORT, self.short, 1.0)
        jump = kind == JUMP
        return torch.where(jump, torch.ones_like(t), t), torch.where(jump, torch.zeros_like(t), t - part * t)

    def rows(
        self, networks: Networks, x: Tensor, z: Tensor, t: Tensor, s: Tensor, c: Condition
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss (n,) of some rows with jumps from t to s, and the student's predictions."""
        x_t = networks.transport.interpolate(x, z, t)
        F = networks.student(x_t, t, c, s)
        minus = self._minus(networks)

        def guided(v: Tensor, x_t: Tensor, null: Condition) -> Tensor:
            return v + (1 - 1 / self.guidance) * (minus(x_t, t, c, t) - minus(x_t, t, null, t))

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
        x, time = transport.move(v, x_t, t, start), start
        for index in range(1, self.order + 1):
            following = networks.round_time(start + (s - start) * (index / self.order))
            x, time = transport.move(minus(x, time, c, following), x, time, following), following
        astray = x - transport.move(F, x_t, t, s)
        long = expand(t - s, F) > self.stride
        return torch.where(long, astray / expand((t - start).clamp_min(1e-6) * speed(t, transport), F), F - v)
