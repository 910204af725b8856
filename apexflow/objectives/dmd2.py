"""DMD2 (Yin et al., 2024): the student follows the difference of two scores, the teacher's and that of its own pictures.

The second is a critic, which learns the velocity of the student's pictures and is stepped more often than the student (two
time scales, section 4.2); a judge on the critic's features adds the GAN loss (section 4.3); with several steps the student is
asked where its own sampler leads (section 4.5). Distances are between endpoints, as in DMD, whose gradient is scaled by the
mean distance of the picture from the teacher's estimate. Weights are those of the released training of the one-step SDXL,
which begins with a regression on pairs of noise and picture and calls pure noise by an earlier time; neither is done here.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from apexflow.objectives import Batch, Further, Losses, Networks, Objective
from apexflow.objectives.distances import mean_square
from apexflow.objectives.teacher import teach
from apexflow.objectives.times import TimeLaw
from apexflow.sampler import shift_times, time_grid
from apexflow.transport import expand


@dataclass(frozen=True)
class DMD2(Objective):
    """Distribution matching and GAN losses of the student, the critic's velocity and the judge's losses.

    steps: what the student is made for. With several, it is asked where its own sampler brings it (backward simulation).
    student_every: of how many steps the student takes one; critic and judge take all (TTUR, 5).
    guidance: of the teacher's score (SDXL: 8).
    gan: weight of the GAN loss for the student (SDXL: 0.005); 0: there is no judge.
    judge_gan: weight of the GAN loss for the judge (SDXL: 0.01).
    times: the law of the noise that pictures are compared at.
    """

    steps: int = 1
    student_every: int = 5
    guidance: float = 8.0
    gan: float = 5e-3
    judge_gan: float = 1e-2
    times: TimeLaw = field(default_factory=lambda: TimeLaw(kind="uniform"))

    needs: ClassVar[tuple[str, ...]] = ("teacher",)
    citation: ClassVar[str] = "Yin et al., Improved Distribution Matching Distillation for Fast Image Synthesis, 2024"
    sampler: ClassVar[dict[str, float]] = {"kappa": 0.0, "rho": 1.0, "order": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.student_every < 1:
            raise ValueError(f"steps and student_every must be at least 1, got {self.steps} and {self.student_every}")
        if min(self.gan, self.judge_gan) < 0:
            raise ValueError(f"gan and judge_gan must be at least 0, got {self.gan} and {self.judge_gan}")

    @property
    def needs_pictures(self) -> bool:
        """Only the judge looks at data: without it, prompts alone are enough."""
        return self.gan > 0

    @property
    def further(self) -> tuple[Further, ...]:
        """The critic, and a judge on its middle block."""
        return (Further("critic"), *[Further("judge", "judge", on="critic")] * (self.gan > 0))

    def __call__(self, networks: Networks, batch: Batch, memory: MutableMapping[str, Tensor]) -> Losses:
        """One micro-batch: everybody's losses, the student's when it is its turn."""
        turn = batch.turn % self.student_every == 0
        x_fake = self._generate(networks, batch, turn)
        total, terms = batch.x.new_zeros(()), {}
        if turn:
            matching, fooling = self._student(networks, batch, x_fake)
            total = (matching + self.gan * fooling) / batch.total
            terms = {"matching": matching.detach() / batch.total, "loss": total.detach()}
        further = self._others(networks, batch, x_fake.detach())
        named = {f"loss_{name}": loss.detach() for name, loss in further.items()}
        return Losses(total, {"loss": total.detach()} | terms | named, further)

    def _generate(self, networks: Networks, batch: Batch, turn: bool) -> Tensor:
        """The student's pictures (B, ...), with a graph at its turn; of several steps, each row's is one at random."""
        transport, c = networks.transport, batch.c
        grid = networks.round_time(shift_times(time_grid(self.steps).float(), networks.time_shift).to(batch.x.device))
        x_t = batch.random.normal(batch.x.shape[1:]).to(batch.x)
        last = (batch.random.uniform() * self.steps).long().clamp_max(self.steps - 1)
        t = grid[0].expand(len(x_t))
        with torch.no_grad():
            for number in range(1, self.steps):
                z = batch.random.normal(batch.x.shape[1:]).to(batch.x)
                x = transport.endpoint(networks.student(x_t, t, c), x_t, t)
                following, onward = grid[number].expand(len(x_t)), last >= number
                x_t = torch.where(expand(onward, x) > 0, transport.interpolate(x, z, following), x_t)
                t = torch.where(onward, following, t)
        with torch.set_grad_enabled(turn):
            return transport.endpoint(networks.student(x_t, t, c), x_t, t)

    def _student(self, networks: Networks, batch: Batch, x_fake: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of the distribution matching loss and of the GAN loss, at pictures with fresh noise."""
        transport, c = networks.transport, batch.c
        x_t, t, _ = self._noised(networks, batch, x_fake)
        with torch.no_grad():
            real = transport.endpoint(teach(networks, x_t, t, c, self.guidance), x_t, t)
            fake = transport.endpoint(networks.further["critic"](x_t, t, c), x_t, t)
            size = (x_fake - real).abs().flatten(1).mean(1).clamp_min(1e-6)
            target = x_fake - (fake - real) / expand(size, fake)
        matching = 0.5 * mean_square(x_fake - target).sum()
        if self.gan == 0:
            return matching, matching.new_zeros(())
        return matching, softplus(-networks.frozen["judge"](x_t, t, c)).mean(1).sum()

    def _others(self, networks: Networks, batch: Batch, x_fake: Tensor) -> dict[str, Tensor]:
        """The critic's flow matching of the student's pictures, and the judge's loss on them and on data."""
        c = batch.c.detach()
        x_t, t, target = self._noised(networks, batch, x_fake)
        error = networks.further["critic"](x_t, t, c) - target
        losses = {"critic": mean_square(error).sum() / batch.total}
        if self.gan > 0:
            judge = networks.further["judge"]
            y_t, s, _ = self._noised(networks, batch, batch.x)
            right = softplus(-judge(y_t, s, c)).mean(1) + softplus(judge(x_t, t, c)).mean(1)
            losses["judge"] = self.judge_gan * right.sum() / batch.total
        return losses

    def _noised(self, networks: Networks, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures with fresh noise: the points, the times, in [0.02, 0.98] as in DMD, and the targets there."""
        t = networks.round_time(0.02 + 0.96 * self.times.draw(batch.random))
        z = batch.random.normal(x.shape[1:]).to(x)
        return networks.transport.interpolate(x, z, t), t, networks.transport.target(x, z, t)
