"""Consistency trajectory models (Kim et al., 2023): jumps from any time to any earlier one, compared after a last jump to data.

`move` of `F(x_t, t, c, s)` is the paper's `G(x_t, t, s) = (s / t) x_t + (1 - s / t) g(x_t, t, s)`, with g the endpoint.

This is the paper's "CTM w/o GAN" (its Table 3). Its distance is LPIPS, and its GAN, which joins halfway on CIFAR-10, is
StyleGAN-XL's: both are made of networks pretrained on ImageNet's pictures, and know nothing of latents. The pseudo-Huber metric
of iCT takes the place of LPIPS. The paper balances its losses by the gradients of the last layer, which no objective knows
here; `matching` is a plain weight. It solves over a random number of grid points; here over at most `pieces` Heun steps.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from apexflow.conditioning import Condition
from apexflow.objectives import Batch, Field, Losses, Networks, Objective
from apexflow.objectives.cm import noise_levels, time_levels
from apexflow.objectives.distances import mean_square, pseudo_huber
from apexflow.objectives.teacher import solve, teach
from apexflow.objectives.times import TimeLaw
from apexflow.transport import Transport, expand


@dataclass(frozen=True)
class CTM(Objective):
    """Soft consistency between a jump from t to s and one that the teacher leads to u < t first, both taken on to data.

    intervals: of the grid of noise levels (18 on CIFAR-10). pieces: steps of the teacher's solver (order 2) from t to u.
    target: theta-minus is the EMA "reference" (the paper) or the student itself.
    huber: c of `pseudo_huber`, per square root of the dimension; null: squared error.
    matching: weight of denoising score matching, here flow matching at s = t.
    guidance: of the teacher, whose guided answer then is what matching has for its target, so that it agrees with the jumps;
        1: none.
    times: the law of the times of matching.
    """

    intervals: int = 18
    pieces: int = 2
    target: Literal["reference", "student"] = "reference"
    huber: float | None = 0.00054
    matching: float = 1.0
    guidance: float = 1.0
    times: TimeLaw = field(default_factory=TimeLaw)

    citation: ClassVar[str] = "Kim et al., Consistency Trajectory Models, 2023"
    sampler: ClassVar[dict[str, float]] = {"kappa": 0.0, "rho": 0.0, "order": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.intervals < 1 or self.pieces < 1:
            raise ValueError(f"intervals and pieces must be at least 1, got {self.intervals} and {self.pieces}")
        if self.matching < 0 or (self.huber is not None and self.huber <= 0):
            raise ValueError(f"matching must be at least 0 and huber above 0, got {self.matching} and {self.huber}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The teacher solves the ODE; the EMA may answer for theta-minus."""
        return ("teacher",) + ("reference",) * (self.target == "reference") + ("second_time",)

    def __call__(self, networks: Networks, batch: Batch, memory: MutableMapping[str, Tensor]) -> Losses:
        """The consistency and the matching loss of one micro-batch."""
        transport, c = networks.transport, batch.c
        t, u, s = (networks.round_time(time) for time in self._times(batch))
        z = batch.random.normal(batch.x.shape[1:]).to(batch.x)
        x_t = transport.interpolate(batch.x, z, t)
        jump = transport.move(networks.student(x_t, t, c, s), x_t, t, s)
        minus = networks.reference if self.target == "reference" else networks.student
        with torch.no_grad():
            x_u = self._solve(networks, x_t, t, u, c)
            goal = to_data(minus, transport.move(minus(x_u, u, c, s), x_u, u, s), s, c, transport)
        # theta-minus carries the jump on to data: the gradient passes through it, its weights held.
        reached = to_data(networks.frozen[self.target], jump, s, c, transport)
        consistency = pseudo_huber(reached - goal, self.huber).sum() / batch.total
        terms = {"consistency": consistency.detach()}
        total = consistency
        if self.matching > 0:
            matching = self._matching(networks, batch)
            total, terms["matching"] = total + self.matching * matching, matching.detach()
        return Losses(total, terms | {"loss": total.detach()})

    def _times(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """t > u >= s of every row, on the grid: each uniform in what the one before leaves."""
        n = self.intervals
        grid = time_levels(noise_levels(n)).to(batch.x.device)
        t = 1 + (batch.random.uniform() * n).long().clamp_max(n - 1)
        s = (batch.random.uniform() * t).long().clamp_max(t - 1)
        u = s + (batch.random.uniform() * (t - s)).long().clamp_max(t - s - 1)
        one, other, last = (grid[index].float() for index in (t, u, s))
        return one, other, last

    def _solve(self, networks: Networks, x_t: Tensor, t: Tensor, u: Tensor, c: Condition) -> Tensor:
        """The teacher's ODE from t to u in `pieces` equal steps of Heun's method."""
        times = [networks.round_time(t + (u - t) * (piece / self.pieces)) for piece in range(self.pieces + 1)]
        for later, earlier in pairwise(times):
            x_t = solve(networks, x_t, later, earlier, c, self.guidance, order=2)
        return x_t

    def _matching(self, networks: Networks, batch: Batch) -> Tensor:
        """Denoising score matching of `g(x_t, t, t)`: the velocity at fresh noise and times, the teacher's where it is guided."""
        transport = networks.transport
        t = networks.round_time(self.times.draw(batch.random))
        z = batch.random.normal(batch.x.shape[1:]).to(batch.x)
        x_t = transport.interpolate(batch.x, z, t)
        plain = self.guidance == 1
        target = transport.target(batch.x, z, t) if plain else teach(networks, x_t, t, batch.c, self.guidance)
        error = networks.student(x_t, t, batch.c, t) - target
        return mean_square(error).sum() / batch.total


def to_data(network: Field, x_s: Tensor, s: Tensor, c: Condition, transport: Transport) -> Tensor:
    """`G(x_s, s, 0)`: x_s itself where s is 0."""
    zero = torch.zeros_like(s)
    return torch.where(expand(s, x_s) > 0, transport.move(network(x_s, s, c, zero), x_s, s, zero), x_s)
