"""Latent consistency models (Luo et al., 2023): consistency distillation of a guided teacher, k points of the grid at a time.

The paper tells the network the guidance omega in [2, 14]; our backbones have no such input, so one scale is trained in. Its
grid is that of the teacher's 1,000 timesteps, which are even in t, and so is ours: t = n / 1000, whatever grid the model is
sampled on, unless `shift` says otherwise. What the equations say, their order and their distances from each other were checked;
that their row begins at (8) is from memory, the paper's own text not being at hand.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from apexflow.objectives import Batch, Losses, Networks, Objective
from apexflow.objectives.distances import mean_huber
from apexflow.objectives.teacher import solve
from apexflow.randomness import RowRandom
from apexflow.sampler import shift_times
from apexflow.transport import Transport, expand


def draw_index(random: RowRandom, points: int, skip: int) -> Tensor:
    """n of Eq. (16), uniform in 0..N - k: the earlier point of each row, (B,)."""
    return (random.uniform() * (points - skip + 1)).long().clamp_max(points - skip)


@dataclass(frozen=True)
class LCM(Objective):
    """Eq. (16): the student at t_n+k against theta-minus at the point of t_n, k before, that the guided teacher leads to.

    guidance: scale of the teacher, 1 + omega of Eq. (12); the paper reports omega = 8 (Table 1).
    skip: k, how many points of the grid the teacher leads at a time. points: N, how many points the grid has.
    target: theta-minus is the EMA "reference" (the paper) or the student itself.
    sigma_data: of c_skip and c_out. scaling: of the time in c_skip and c_out.
    huber: c of the pseudo-Huber distance of each element.
    shift: of the times, as in a law of times; 1 leaves them even in t.
    """

    guidance: float = 9.0
    skip: int = 20
    points: int = 1000
    target: Literal["reference", "student"] = "reference"
    sigma_data: float = 0.5
    scaling: float = 10.0
    huber: float = 1e-3
    shift: float = 1.0

    citation: ClassVar[str] = "Luo et al., Latent Consistency Models, 2023"
    sampler: ClassVar[dict[str, float]] = {"kappa": 0.0, "rho": 1.0, "order": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.skip <= self.points:
            raise ValueError(f"skip must lie between 1 and points, got {self.skip} of {self.points}")
        if min(self.sigma_data, self.scaling, self.huber, self.shift) <= 0:
            raise ValueError("sigma_data, scaling, huber and shift must be above 0")

    @property
    def needs(self) -> tuple[str, ...]:
        """The teacher solves the ODE; the EMA may answer for theta-minus."""
        return ("teacher",) + ("reference",) * (self.target == "reference")

    def __call__(self, networks: Networks, batch: Batch, memory: MutableMapping[str, Tensor]) -> Losses:
        """Eq. (16) for one micro-batch; Eq. (17) solves the augmented PF-ODE of Eq. (13) over k points, here by DDIM (Eq. 18)."""
        transport, c = networks.transport, batch.c
        n = draw_index(batch.random, self.points, self.skip)
        t, s = (networks.round_time(shift_times(i / self.points, self.shift)) for i in (n + self.skip, n))
        z = batch.random.normal(batch.x.shape[1:]).to(batch.x)
        x_t = transport.interpolate(batch.x, z, t)
        f = self.consistency(networks.student(x_t, t, c), x_t, t, transport)
        with torch.no_grad():
            x_s = solve(networks, x_t, t, s, c, self.guidance)
            network = networks.reference if self.target == "reference" else networks.student
            target = self.consistency(network(x_s, s, c), x_s, s, transport)
        loss = mean_huber(f - target, self.huber).sum() / batch.total
        return Losses(loss, {"loss": loss.detach()})

    def consistency(self, F: Tensor, x_t: Tensor, t: Tensor, transport: Transport) -> Tensor:
        """Eq. (9): `c_skip x_t + c_out f^x`, x_t itself at t = 0; timesteps, 1000 t, are multiplied by `scaling`."""
        scaled = self.scaling * 1000 * t
        root = (scaled.square() + self.sigma_data**2).sqrt()
        c_skip, c_out = self.sigma_data**2 / root.square(), scaled / root
        return expand(c_skip, x_t) * x_t + expand(c_out, x_t) * transport.endpoint(F, x_t, t)
