"""Sana-Sprint (Chen et al., 2025): sCM distillation, and a judge on the frozen teacher's features (LADD).

The two take turns, as in the released training. Its laws of times are those of its sCM, for data of deviation 0.5; ours are
shifted by ln 2 as in `scm.py`. Left out: the dense time embedding and QK norm that the paper fine-tunes its teacher for, an
embedded guidance scale (one is trained in), and the weights of sCM, 1 / tan(theta) and the adaptive one: without them the judge
weighs more than in the released training, by about the root of the number of dimensions (`docs/paper.md`).
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import relu

from apexflow.objectives import Batch, Further, Losses, Networks, Objective
from apexflow.objectives.scm import SCM
from apexflow.objectives.times import TimeLaw


def released_scm() -> SCM:
    """sCM with the released law of times, 0.5 tan(theta) ~ exp N(0.2, 1.6^2), and guidance 4.5."""
    return SCM(times=TimeLaw(mean=0.2 + math.log(2), spread=1.6), guidance=4.5)


@dataclass(frozen=True)
class SanaSprint(Objective):
    """L = L_sCM + weight * L_adv at the student's turn, the judge's hinge loss at its own.

    scm: sCM's fields. weight: lambda (0.5).
    share: part of the rows whose picture for the judge is made of pure noise, at t = 1 (50 %); the others' times are sCM's.
    depths: which blocks the judge looks at, as shares: 2, 8, 14 and 19 of 20.
    judge_times: law of the noise that the judge sees, 0.5 tan(theta) ~ exp N(-0.6, 1).
    mismatched: pictures of the data with the prompt of the row that follows are fakes to the judge too, and half of them, as in
        the released settings.
    """

    scm: SCM = field(default_factory=released_scm)
    weight: float = 0.5
    share: float = 0.5
    depths: tuple[float, ...] = (0.1, 0.4, 0.7, 0.95)
    judge_times: TimeLaw = field(default_factory=lambda: TimeLaw(mean=-0.6 + math.log(2)))
    mismatched: bool = True

    needs: ClassVar[tuple[str, ...]] = ("teacher",)
    citation: ClassVar[str] = "Chen et al., SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency, 2025"
    sampler: ClassVar[dict[str, float]] = {"kappa": 0.0, "rho": 1.0, "order": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight < 0 or not 0 <= self.share <= 1:
            raise ValueError(f"weight must be at least 0 and share in [0, 1], got {self.weight} and {self.share}")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths must be shares in [0, 1] of the blocks, got {self.depths}")

    @property
    def further(self) -> tuple[Further, ...]:
        """The judge on the teacher's features."""
        return (Further("judge", "judge", on="teacher", depths=self.depths),)

    @property
    def scheduled(self) -> bool:
        """As its sCM is."""
        return self.scm.scheduled

    def __call__(self, networks: Networks, batch: Batch, memory: MutableMapping[str, Tensor]) -> Losses:
        """One micro-batch; the student takes the even turns, the judge the odd ones."""
        if batch.turn % 2 == 1:
            return self._judges_turn(networks, batch)
        consistency = self.scm(networks, batch, memory).total
        x_s, s = self._noised(networks, batch, self._pictures(networks, batch))
        fooling = -networks.frozen["judge"](x_s, s, batch.c).mean(1).sum() / batch.total
        total = consistency + self.weight * fooling
        terms = {"consistency": consistency, "fooling": fooling, "loss": total}
        return Losses(total, {name: term.detach() for name, term in terms.items()})

    def _judges_turn(self, networks: Networks, batch: Batch) -> Losses:
        """The hinge loss on data, on the student's pictures and on data with wrong prompts."""
        with torch.no_grad():
            pictures = self._pictures(networks, batch)
        judge, c = networks.further["judge"], batch.c.detach()
        real, fake = (judge(*self._noised(networks, batch, x), c) for x in (batch.x, pictures))
        taken = relu(1 + fake).mean(1)
        if self.mismatched and batch.following is not None:
            wrong = judge(*self._noised(networks, batch, batch.x), batch.following())
            taken = (taken + relu(1 + wrong).mean(1)) / 2
        loss = (relu(1 - real).mean(1) + taken).sum() / batch.total
        zero = batch.x.new_zeros(())
        return Losses(zero, {"loss": zero, "loss_judge": loss.detach()}, {"judge": loss})

    def _pictures(self, networks: Networks, batch: Batch) -> Tensor:
        """What the student makes of data with noise, at t = 1 for a share of the rows."""
        t = self.scm.times.draw(batch.random)
        t = networks.round_time(torch.where(batch.chosen(self.share), torch.ones_like(t), t))
        z = batch.random.normal(batch.x.shape[1:]).to(batch.x)
        x_t = networks.transport.interpolate(batch.x, z, t)
        return networks.transport.endpoint(networks.student(x_t, t, batch.c), x_t, t)

    def _noised(self, networks: Networks, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures with fresh noise at fresh times."""
        s = networks.round_time(self.judge_times.draw(batch.random))
        z = batch.random.normal(x.shape[1:]).to(x)
        return networks.transport.interpolate(x, z, s), s
