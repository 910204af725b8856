"""Phased consistency models (Wang et al., 2024): one consistency model for each phase of the path, and a judge of their ends.

The path is cut into phases, and every point of a phase must lead to the same point at the phase's clean edge. With one phase
that is consistency distillation. Sample deterministically, with as many steps as there are phases, or a multiple: the edges
are the times of the model's own grid of so many steps, as the paper's are those of its sampler.
The judge (Eq. 8 and 9) looks at both ends after fresh noise, through the frozen teacher. It learns at twice the student's rate
and without momentum, and takes turns with it, as in the released training of SD 1.5, which has a head on every block.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import relu

from apexflow.objectives import Batch, Further, Losses, Networks, Objective
from apexflow.objectives.distances import mean_huber
from apexflow.objectives.lcm import draw_index
from apexflow.objectives.teacher import solve
from apexflow.sampler import shift_times
from apexflow.transport import Transport, expand


@dataclass(frozen=True)
class PCM(Objective):
    """Eq. (5): the student at t_n+k against theta-minus at t_n, both moved to the edge s_m of their phase.

    phases: M; the paper finds 4 enough.
    guidance: w of Eq. (6) in the teacher's solver, 1 for none (the paper's "Ours*"); the released training of SD 1.5 draws
        w - 1 between 4 and 5, and so is the default.
    skip: k, how many points of the grid the teacher leads at a time, as in that training (the text has 1).
    points: N, how many points the grid has, as there.
    target: theta-minus is the EMA "reference" (the paper) or the student itself.
    huber: c of the pseudo-Huber distance of each element.
    shift: of the times, as in a law of times; null: that of the grid on which the model is sampled.
    adversarial: lambda, the weight of Eq. (9) beside Eq. (5), 0.1 in the paper; 0: no judge, and every turn is the
        student's.
    depths: which blocks the judge looks at, as shares.
    """

    phases: int = 4
    guidance: float = 5.5
    skip: int = 20
    points: int = 1000
    target: Literal["reference", "student"] = "reference"
    huber: float = 1e-3
    shift: float | None = None
    adversarial: float = 0.1
    depths: tuple[float, ...] = (0.1, 0.4, 0.7, 0.95)

    citation: ClassVar[str] = "Wang et al., Phased Consistency Models, 2024"
    sampler: ClassVar[dict[str, float]] = {"kappa": 0.0, "rho": 0.0, "order": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.skip <= self.points:
            raise ValueError(f"skip must lie between 1 and points, got {self.skip} of {self.points}")
        if not 1 <= self.phases <= self.points:
            raise ValueError(f"phases must lie between 1 and points, got {self.phases} of {self.points}")
        if self.huber <= 0 or (self.shift is not None and self.shift <= 0) or self.adversarial < 0:
            raise ValueError("huber and shift must be above 0, and adversarial at least 0")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths must be shares in [0, 1] of the blocks, got {self.depths}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The teacher solves the ODE; the EMA may answer for theta-minus."""
        return ("teacher",) + ("reference",) * (self.target == "reference")

    @property
    def further(self) -> tuple[Further, ...]:
        """The judge on the teacher's features."""
        judge = Further("judge", "judge", on="teacher", depths=self.depths, rate=2.0, betas=(0.0, 0.999))
        return (judge,) * (self.adversarial > 0)

    def __call__(self, networks: Networks, batch: Batch, memory: MutableMapping[str, Tensor]) -> Losses:
        """One micro-batch: Eq. (5) and its part of Eq. (9) at the student's turns, the even ones; the judge's at the odd ones."""
        later = draw_index(batch.random, self.points, self.skip) + self.skip
        judging = self.adversarial > 0 and batch.turn % 2 == 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and not judging):
            f, target = self._ends(networks, batch, later)
        if judging:
            return self._judges_turn(networks, batch, f, target, later)
        consistency = mean_huber(f - target, self.huber).sum() / batch.total
        terms, total = {"consistency": consistency.detach()}, consistency
        if self.adversarial > 0:
            logits = networks.frozen["judge"](*self._noised(networks, batch, f, later), batch.c)
            fooling = relu(1 - logits).mean(1).sum() / batch.total
            total, terms["fooling"] = total + self.adversarial * fooling, fooling.detach()
        return Losses(total, terms | {"loss": total.detach()})

    def _ends(self, networks: Networks, batch: Batch, later: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of Eq. (5) at s_m; `move` is Eq. (3), which is the identity at the edge."""
        transport, c = networks.transport, batch.c
        edge, _ = self.phase(later)
        t, s, s_m = (self._time(networks, i) for i in (later, torch.maximum(later - self.skip, edge), edge))
        z = batch.random.normal(batch.x.shape[1:]).to(batch.x)
        x_t = transport.interpolate(batch.x, z, t)
        f = transport.move(networks.student(x_t, t, c), x_t, t, s_m)
        with torch.no_grad():
            x_s = solve(networks, x_t, t, s, c, self.guidance)  # Eq. (4)
            network = networks.reference if self.target == "reference" else networks.student
            return f, transport.move(network(x_s, s, c), x_s, s, s_m)

    def _judges_turn(self, networks: Networks, batch: Batch, f: Tensor, target: Tensor, later: Tensor) -> Losses:
        """Eq. (9): theta-minus' ends are the real ones, the student's the fakes."""
        judge, c, zero = networks.further["judge"], batch.c.detach(), f.new_zeros(())
        real, fake = (judge(*self._noised(networks, batch, x, later), c) for x in (target, f))
        loss = (relu(1 - real).mean(1) + relu(1 + fake).mean(1)).sum() / batch.total
        return Losses(zero, {"loss": zero, "loss_judge": loss.detach()}, {"judge": loss})

    def _noised(self, networks: Networks, batch: Batch, x: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of a phase with as much more noise as leads to a time drawn within it, and that time."""
        edge, top = self.phase(later)
        s_m, s = (self._time(networks, i) for i in (edge, edge + batch.random.uniform() * (top - edge)))
        return renoise(x, batch.random.normal(x.shape[1:]).to(x), s_m, s, networks.transport), s

    def _time(self, networks: Networks, index: Tensor) -> Tensor:
        shift = networks.time_shift if self.shift is None else self.shift
        return networks.round_time(shift_times(index / self.points, shift))

    def phase(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """s_m and s_m+1 as numbers of the grid: the edges of the phase that holds each point of `index` (B,), all above 0."""
        edges = torch.arange(self.phases + 1, device=index.device) * self.points // self.phases
        number = torch.searchsorted(edges, index)
        return edges[number - 1], edges[number]


def renoise(x_s: Tensor, z: Tensor, s: Tensor, t: Tensor, transport: Transport) -> Tensor:
    """Points at times `t` that the forward process makes of points at earlier times `s` with fresh noise `z`."""
    keep = transport.gamma(t) / transport.gamma(s)
    spread = (transport.alpha(t).square() - (keep * transport.alpha(s)).square()).clamp_min(0).sqrt()
    return expand(keep, x_s) * x_s + expand(spread, x_s) * z
