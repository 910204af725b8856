"""MeanFlow (Geng et al., 2025): the mean velocity between two times, learned from its own derivative.

The paper's `u(z_t, r, t)` is `F(x_t, t, c, s)` with s = r. The identity `u = v - (t - r) du/dt` is, for any transport, that
the point at s to which F leads does not change along the path; for linear transport the target below is the paper's to the
letter. The paper trains from nothing on the samples' own velocities, and so does the default; "teacher" distils.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from apexflow.conditioning import Condition, guide, replace_rows
from apexflow.objectives import Batch, Losses, Networks, Objective
from apexflow.objectives.derivative import Kind, derivative, speed
from apexflow.objectives.teacher import direction, null_rows
from apexflow.objectives.times import TimeLaw
from apexflow.transport import Transport, expand


@dataclass(frozen=True)
class MeanFlow(Objective):
    """Algorithm 1: `|| u - sg(u_tgt) ||^2` by the adaptive weight `1 / (|| . ||^2 + c)^p`.

    share: part of the rows whose two times differ (25 %); with equal times the method is flow matching.
    velocity: the path's direction is the sample's own (the paper) or the teacher's field.
    guidance: scale w of the guided field. From samples it is, with `kappa` 0, `w v + (1 - w) u(z_t, t, t | null)`; of the
        teacher, its guided answer. 1: none.
    drop: share of the rows that learn the field without a condition, unguided, where guidance from samples asks for it (10 %).
    kappa: share of the network's own conditional answer in the guided field of the samples: `omega v + kappa u(z_t, t, t | c)
        + (1 - omega - kappa) u(z_t, t, t | null)` with omega = (1 - kappa) w, so that the scale stays w. One pass more.
    derivative: "jvp" (the paper) or central "difference" with half step `epsilon`, where operators lack the former.
    epsilon: half the step in t of the difference.
    p: the power of the adaptive weight; 0: plain squares. c: the constant of the adaptive weight, above 0.
    times: the law of both times; the later one is t.
    """

    share: float = 0.25
    velocity: Literal["sample", "teacher"] = "sample"
    guidance: float = 1.0
    kappa: float = 0.0
    drop: float = 0.1
    derivative: Kind = "jvp"
    epsilon: float = 5e-3
    p: float = 1.0
    c: float = 1e-3
    times: TimeLaw = field(default_factory=lambda: TimeLaw(mean=-0.4))

    citation: ClassVar[str] = "Geng et al., Mean Flows for One-step Generative Modeling, 2025"
    sampler: ClassVar[dict[str, float]] = {"kappa": 0.0, "rho": 0.0, "order": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {self.share}")
        if not 0 <= self.kappa < 1:
            raise ValueError(f"kappa must lie in [0, 1), got {self.kappa}")
        if not 0 < self.epsilon < 0.5:
            raise ValueError(f"epsilon must lie in (0, 0.5), got {self.epsilon}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must lie in [0, 1), got {self.drop}")
        if self.p < 0 or self.c <= 0:
            raise ValueError(f"p must be at least 0 and c above 0, got {self.p} and {self.c}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Distillation follows the teacher's field."""
        return ("teacher",) * (self.velocity == "teacher") + ("second_time",)

    def __call__(self, networks: Networks, batch: Batch, memory: MutableMapping[str, Tensor]) -> Losses:
        """Algorithm 1 for one micro-batch."""
        transport = networks.transport
        t, s = (networks.round_time(time) for time in self._times(batch))
        dropped, c = self._dropped(networks, batch)
        x, z = batch.x, batch.random.normal(batch.x.shape[1:]).to(batch.x)
        x_t = transport.interpolate(x, z, t)
        F = networks.student(x_t, t, c, s)

        def guided(v: Tensor, x_t: Tensor, null: Condition) -> Tensor:
            own = guide(v, networks.student(x_t, t, null, t), self.guidance)
            if self.kappa > 0:
                own = torch.lerp(own, networks.student(x_t, t, c, t), self.kappa)
            return torch.where(expand(dropped, v) > 0, v, own)

        with torch.no_grad():
            v = direction(networks, (x, z), t, c, self.velocity, self.guidance, guided)
            x, z = transport.endpoint(v, x_t, t), transport.noise(v, x_t, t)
            target = self._target(networks, F.detach(), x, z, t, s, c)
        squared = (F - target).float().flatten(1).square().sum(1)
        weight = 1 / (squared.detach() + self.c) ** self.p
        loss = (weight * squared).sum() / batch.total
        return Losses(loss, {"loss": loss.detach(), "error": (squared.detach() / F[0].numel()).sum() / batch.total})

    def _dropped(self, networks: Networks, batch: Batch) -> tuple[Tensor, Condition]:
        """Which rows go without their condition, (B,), and the conditions then."""
        if self.guidance == 1 or self.velocity == "teacher" or self.drop == 0:
            return torch.zeros_like(batch.rows, dtype=torch.bool), batch.c
        dropped = batch.random.uniform() < self.drop
        return dropped, replace_rows(batch.c, dropped, null_rows(networks, 1, self.guidance))

    def _times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both times of every row, the later first: two draws, and equal but for the share (section 4.3)."""
        one, other = self.times.draw(batch.random), self.times.draw(batch.random)
        later, earlier = torch.maximum(one, other), torch.minimum(one, other)
        return later, torch.where(batch.chosen(self.share), earlier, later)

    def _target(
        self, networks: Networks, F: Tensor, x: Tensor, z: Tensor, t: Tensor, s: Tensor, c: Condition
    ) -> Tensor:
        """u_tgt, which is `v - (t - r) (v du/dz + du/dt)` for linear transport, on the path from `x` to `z`."""
        transport = networks.transport

        def along(time: Tensor) -> Tensor:
            return networks.student(transport.interpolate(x, z, time), time, c, s)

        rate = derivative(along, t, self.derivative, self.epsilon, networks.round_time)
        return F + jump_rate(F, rate, x, z, t, s, transport) / expand(speed(t, transport), F)


def jump_rate(F: Tensor, rate: Tensor, x: Tensor, z: Tensor, t: Tensor, s: Tensor, transport: Transport) -> Tensor:
    """How the point at `s` changes with t that a prediction `F`, itself changing by `rate`, leads to on a path."""

    def jump(time: Tensor, F: Tensor) -> Tensor:
        return transport.move(F, transport.interpolate(x, z, time), time, s)

    return torch.func.jvp(jump, (t, F), (torch.ones_like(t), rate.to(F)))[1]
