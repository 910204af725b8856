"""Phased consistency models (Wang et al., 2024), without their adversarial part (Eq. 8 and 9), which needs a discriminator.

The path is cut into phases, and every point of a phase must lead to the same point at the phase's clean edge. With one phase
that is consistency distillation. Sample deterministically, with as many steps of an even grid as there are phases.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from apexflow.objectives import Batch, Losses, Networks
from apexflow.objectives.apex import move
from apexflow.objectives.cm import solve
from apexflow.objectives.lcm import draw_index, mean_huber
from apexflow.sampler import shift_times


@dataclass(frozen=True)
class PCM:
    """Eq. (5): the student at t_n+k against theta-minus at t_n, both moved to the edge s_m of their phase.

    phases: M; the paper finds 4 enough. guidance: w of Eq. (6) in the teacher's solver, 1 for none (the paper's "Ours*");
        its released training draws w - 1 between 4 and 5, and so is the default. skip, points: k and N, as released.
    target: theta-minus is the EMA "reference" (the paper) or the student itself. huber, shift: as in LCM.
    """

    phases: int = 4
    guidance: float = 5.5
    skip: int = 20
    points: int = 1000
    target: Literal["reference", "student"] = "reference"
    huber: float = 1e-3
    shift: float = 1.0

    citation: ClassVar[str] = "Wang et al., Phased Consistency Models, 2024"
    sampler: ClassVar[dict[str, float]] = {"kappa": 0.0, "rho": 0.0, "order": 1}

    def __post_init__(self) -> None:
        if not 1 <= self.skip <= self.points:
            raise ValueError(f"skip must lie between 1 and points, got {self.skip} of {self.points}")
        if not 1 <= self.phases <= self.points:
            raise ValueError(f"phases must lie between 1 and points, got {self.phases} of {self.points}")
        if min(self.huber, self.shift) <= 0:
            raise ValueError("huber and shift must be above 0")

    @property
    def needs(self) -> tuple[str, ...]:
        """The teacher solves the ODE; the EMA may answer for theta-minus."""
        return ("teacher",) + ("reference",) * (self.target == "reference")

    def __call__(self, networks: Networks, batch: Batch, memory: MutableMapping[str, Tensor]) -> Losses:
        """Eq. (5) for one micro-batch; `move` is Eq. (3), which is the identity at the edge."""
        transport, c = networks.transport, batch.c
        later = draw_index(batch.random, self.points, self.skip) + self.skip
        edge = self.edge(later)
        earlier = torch.maximum(later - self.skip, edge)
        t, s, s_m = (networks.round_time(shift_times(i / self.points, self.shift)) for i in (later, earlier, edge))
        z = batch.random.normal(batch.x.shape[1:]).to(batch.x)
        x_t = transport.interpolate(batch.x, z, t)
        f = move(networks.student(x_t, t, c), x_t, t, s_m, transport)
        with torch.no_grad():
            x_s = solve(networks, x_t, t, s, c, self.guidance)  # Eq. (4)
            network = networks.reference if self.target == "reference" else networks.student
            target = move(network(x_s, s, c), x_s, s, s_m, transport)
        loss = mean_huber(f - target, self.huber).sum() / batch.total
        return Losses(loss, {"loss": loss.detach()})

    def edge(self, index: Tensor) -> Tensor:
        """s_m as a number of the grid: the clean edge of the phase that holds each point of `index` (B,), all above 0."""
        edges = torch.arange(self.phases + 1, device=index.device) * self.points // self.phases
        return edges[torch.searchsorted(edges, index) - 1]
