"""TwinFlow (Cheng et al., 2025): RCGM whose network also knows its own fakes, on a twin trajectory of negative time.

Negative times are told through the second time: at x_t of a fake the network is asked with s = -t, and its t stays in [0, 1],
so that any backbone can take it. The rows of a batch are split into four kinds in turn, as the released training does: jumps
to data (rectified by the twin), any jumps, short jumps, and fakes. Its weight of L_rectify is 0.5 (0.75 for SANA); the paper
prints L = L_base + L_adv + L_rectify and a share lambda of the batch for the latter two, best at 1/3.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from apexflow.conditioning import Condition
from apexflow.objectives import Batch, Losses, Networks, Objective
from apexflow.objectives.rcgm import ANY_STEP, JUMP, RCGM, SHORT, short_tailed
from apexflow.objectives.times import off_the_ends

FAKE = SHORT + 1


@dataclass(frozen=True)
class TwinFlow(Objective):
    """L_base of RCGM on three kinds of rows, L_adv on fakes, and `rectify` times L_rectify on the jumps to data.

    base: RCGM's fields, of which `jumps` has no use here. rectify: the weight of L_rectify.
    clip: of the difference of the twins' velocities, elementwise; null: no clip.
    """

    base: RCGM = field(default_factory=RCGM)
    rectify: float = 0.5
    clip: float | None = 1.0

    citation: ClassVar[str] = "Cheng et al., TwinFlow: One-step Generation with Self-adversarial Flows, 2025"
    sampler: ClassVar[dict[str, float]] = {"kappa": 0.0, "rho": 1.0, "order": 1}
    longer: ClassVar[dict[int, dict[str, float]]] = ANY_STEP

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rectify < 0:
            raise ValueError(f"rectify must be at least 0, got {self.rectify}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be above 0, got {self.clip}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Whatever RCGM calls."""
        return self.base.needs

    def __call__(self, networks: Networks, batch: Batch, memory: MutableMapping[str, Tensor]) -> Losses:
        """One micro-batch: means over the global batch, L_rectify over its jumps to data."""
        kind = batch.rows.remainder(4)
        jumps = -(-batch.total // 4)
        base, rectify = self._real_rows(networks, batch, kind)
        adversarial = self._fake_rows(networks, batch, kind == FAKE)
        parts = {"base": base / batch.total, "adv": adversarial / batch.total, "rectify": rectify / jumps}
        total = parts["base"] + parts["adv"] + self.rectify * parts["rectify"]
        return Losses(total, {name: part.detach() for name, part in (parts | {"loss": total}).items()})

    def _real_rows(self, networks: Networks, batch: Batch, kind: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of L_base over all but the fakes' rows, and of L_rectify over the jumps to data."""
        real = kind != FAKE
        if not bool(real.any()):
            return batch.x.new_zeros(()), batch.x.new_zeros(())
        t, s = (networks.round_time(time) for time in self.base.times(batch, kind[real], real))
        x, c = batch.x[real], batch.c[real]
        z = batch.random.normal(x.shape[1:], real).to(x)
        losses, F = self.base.rows(networks, x, z, t, s, c)
        jump = kind[real] == JUMP
        if self.rectify == 0 or not bool(jump.any()):
            return losses.sum(), losses.new_zeros(())
        return losses.sum(), self._rectify(networks, batch, kind == JUMP, F[jump], z[jump], c[jump])

    def _rectify(self, networks: Networks, batch: Batch, where: Tensor, F: Tensor, z: Tensor, c: Condition) -> Tensor:
        """L_rectify: the jump's prediction moves against the difference of the fake and the real velocity at its picture."""
        transport = networks.transport
        with torch.no_grad():
            x_fake = transport.endpoint(F, z, torch.ones(len(z), device=z.device))
            x_t, t, _ = self._renoised(networks, batch, where, x_fake)
            difference = networks.student(x_t, t, c, -t) - networks.student(x_t, t, c, t)
            target = F - (difference if self.clip is None else difference.clamp(-self.clip, self.clip))
        return short_tailed(F - target, self.base.c).sum()

    def _fake_rows(self, networks: Networks, batch: Batch, where: Tensor) -> Tensor:
        """L_adv: flow matching of the network's own one-step pictures, at negative time."""
        if not bool(where.any()):
            return batch.x.new_zeros(())
        c = batch.c[where]
        z = batch.random.normal(batch.x.shape[1:], where).to(batch.x)
        one = torch.ones(len(z), device=z.device)
        with torch.no_grad():
            x_fake = networks.transport.endpoint(networks.student(z, one, c, 0 * one), z, one)
        x_t, t, target = self._renoised(networks, batch, where, x_fake)
        return short_tailed(networks.student(x_t, t, c, -t) - target, self.base.c).sum()

    def _renoised(self, networks: Networks, batch: Batch, where: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures with fresh noise at fresh times: the points, the times, and the target there."""
        z = batch.random.normal(x.shape[1:], where).to(x)
        t = networks.round_time(off_the_ends(batch.random.uniform(where)))
        return networks.transport.interpolate(x, z, t), t, networks.transport.target(x, z, t)
