"""Consistency models (Song et al., 2023), discrete in time, with the improved techniques (iCT, Song & Dhariwal, 2023).

Distillation (CM, Algorithm 2) and training (CM, Algorithm 3). Defaults are iCT's where it has one: doubling discretisation,
log-normal noise levels, pseudo-Huber metric, weight 1 / (sigma_n+1 - sigma_n), no EMA in the target; the solver is CM's
(Heun). Left out: LPIPS, which needs a further network. `Transport.endpoint` takes the place of CM's Eq. (5): it is x_t itself
at t = 0. Noise levels are EDM's, for data of deviation 0.5; linear transport of data of deviation 1 has the same ratio of
noise to data at t = sigma / (sigma + 0.5). Other transports use the same times. The ends of the grid are moved to 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from apexflow.objectives import Batch, Losses, Networks, Objective
from apexflow.objectives.distances import pseudo_huber
from apexflow.objectives.teacher import solve
from apexflow.objectives.times import TimeLaw

SIGMA_MINIMUM, SIGMA_MAXIMUM, SIGMA_DATA = 0.002, 80.0, 0.5


def noise_levels(intervals: int, rho: float = 7.0) -> Tensor:
    """CM, section 2 (EDM's grid): `intervals + 1` ascending noise levels, evenly spaced in sigma^(1/rho), float64."""
    ends = SIGMA_MINIMUM ** (1 / rho), SIGMA_MAXIMUM ** (1 / rho)
    return torch.linspace(*ends, intervals + 1, dtype=torch.float64) ** rho


def time_levels(sigma: Tensor) -> Tensor:
    """The times of noise levels, from 0 to 1: t / (1 - t) = sigma / 0.5."""
    t = sigma / (sigma + SIGMA_DATA)
    t[0], t[-1] = 0, 1
    return t


@dataclass(frozen=True)
class CM(Objective):
    """One network asked at neighbouring times of one path must name the same endpoint.

    mode: the earlier point comes from the teacher's ODE ("distillation") or from the same data and noise ("training").
    target: theta-minus is the student without gradient (iCT) or the EMA "reference" (CM).
    intervals: of the grid, from the first to the last, doubling in equal parts of the run (iCT: 10 to 1280). CM's own
        distillation keeps them (18 on CIFAR-10: `[18, 18]`).
    rho: the grid's noise levels are even in sigma^(1 / rho).
    times: where the later point lies, before it is moved to the end of its interval. iCT's ln sigma ~ N(-1.1, 2^2).
    huber: c of `pseudo_huber`, per square root of the dimension; null: squared error.
    weighting: "inverse" is 1 / (sigma_n+1 - sigma_n) (iCT), "none" is 1 (CM).
    order: of the teacher's solver, in distillation: 1 (DDIM) or 2 (Heun). guidance: of the teacher; 1: none.
    """

    mode: Literal["distillation", "training"] = "distillation"
    target: Literal["student", "reference"] = "student"
    intervals: tuple[int, int] = (10, 1280)
    rho: float = 7.0
    times: TimeLaw = field(default_factory=lambda: TimeLaw(mean=-1.1 - math.log(SIGMA_DATA), spread=2.0))
    huber: float | None = 0.00054
    weighting: Literal["inverse", "none"] = "inverse"
    order: int = 2
    guidance: float = 1.0

    citation: ClassVar[str] = "Song et al., Consistency Models, 2023; Song & Dhariwal, Improved Techniques, 2023"
    sampler: ClassVar[dict[str, float]] = {"kappa": 0.0, "rho": 1.0, "order": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.intervals[0] <= self.intervals[1]:
            raise ValueError(f"intervals must be two ascending numbers of at least 1, got {self.intervals}")
        if self.rho <= 0 or (self.huber is not None and self.huber <= 0):
            raise ValueError(f"rho and huber must be above 0, got {self.rho} and {self.huber}")
        if self.order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {self.order}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The teacher solves the ODE in distillation; the EMA may answer for theta-minus."""
        return ("teacher",) * (self.mode == "distillation") + ("reference",) * (self.target == "reference")

    @property
    def scheduled(self) -> bool:
        """The grid is refined by the run's progress."""
        return self.intervals[0] != self.intervals[1]

    def __call__(self, networks: Networks, batch: Batch, memory: MutableMapping[str, Tensor]) -> Losses:
        """CM, Eq. (7) (distillation) or Eq. (10) (training): the student at t_n+1 against theta-minus at t_n."""
        transport, c = networks.transport, batch.c
        later, earlier, weight = self._neighbours(self.times.draw(batch.random), batch.progress)
        later, earlier = networks.round_time(later), networks.round_time(earlier)
        z = batch.random.normal(batch.x.shape[1:]).to(batch.x)
        x_t = transport.interpolate(batch.x, z, later)
        F = networks.student(x_t, later, c)
        with torch.no_grad():
            if self.mode == "distillation":
                x_s = solve(networks, x_t, later, earlier, c, self.guidance, self.order)
            else:
                x_s = transport.interpolate(batch.x, z, earlier)
            network = networks.student if self.target == "student" else networks.reference
            target = transport.endpoint(network(x_s, earlier, c), x_s, earlier)
        distance = pseudo_huber(transport.endpoint(F, x_t, later) - target, self.huber)
        loss = (weight.to(distance) * distance).sum() / batch.total
        return Losses(loss, {"loss": loss.detach()})

    def _neighbours(self, t: Tensor, progress: float) -> tuple[Tensor, Tensor, Tensor]:
        """The ends of the interval that holds each `t` (B,), the later first, and the weight of the row."""
        sigma = noise_levels(self.count(progress), self.rho).to(t.device)
        grid = time_levels(sigma)
        index = torch.searchsorted(grid, t.double(), right=True).clamp(1, len(grid) - 1)
        gap = sigma[index] - sigma[index - 1]
        weight = 1 / gap if self.weighting == "inverse" else torch.ones_like(gap)
        return grid[index].to(t), grid[index - 1].to(t), weight

    def count(self, progress: float) -> int:
        """iCT, section 3.4: N(k) - 1, how many intervals the grid has when `progress` of the run is done."""
        first, last = self.intervals
        stages = math.floor(math.log2(last // first)) + 1
        return min(first * 2 ** math.floor(progress * stages), last)
