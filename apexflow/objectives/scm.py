"""sCM: continuous-time consistency (Lu & Song, 2024), distillation (sCD) and training (sCT).

The paper's TrigFlow, x(theta) = cos(theta) x + sin(theta) z, is any transport of ours up to a scale: theta = atan(alpha / gamma)
and x(theta) = x_t / sqrt(alpha^2 + gamma^2); for linear transport theta = atan(t / (1 - t)). The endpoint f^x of a prediction
is the same in both, so `angular` is exact and the network keeps its own time and target. sigma_d is 1: latents are scaled to
deviation 1, and the paper's proposal for sigma_d = 0.5 is shifted by ln 2 to keep the ratio of noise to data.

Left out: the adaptive weight w_phi(t) of Eq. (8), a further trained network (after tangent normalisation the squared error
hardly depends on t), and the paper's changes of architecture. H = 10,000 iterations of tangent warm-up are a share of the run.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from apexflow.conditioning import Condition
from apexflow.objectives import Batch, Losses, Networks, Objective
from apexflow.objectives.derivative import Kind, derivative, rate_of
from apexflow.objectives.distances import mean_square
from apexflow.objectives.teacher import teach
from apexflow.objectives.times import TimeLaw
from apexflow.transport import Transport, expand


def angle(t: Tensor, transport: Transport) -> Tensor:
    """TrigFlow's time in [0, pi/2], in the shape of `t`: the angle whose tangent is the ratio of noise to data."""
    return torch.atan2(transport.alpha(t), transport.gamma(t))


def angular(x: Tensor, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """TrigFlow's point `cos x + sin z` and its velocity `cos z - sin x` (Eq. 3 and 4) at angles `theta` (B,)."""
    cos, sin = expand(theta.cos(), x), expand(theta.sin(), x)
    return cos * x + sin * z, cos * z - sin * x


def angular_prediction(F: Tensor, x_t: Tensor, t: Tensor, transport: Transport) -> Tensor:
    """The F of Eq. (5), a velocity by the angle, that our prediction `F` at `x_t` is."""
    return angular(transport.endpoint(F, x_t, t), transport.noise(F, x_t, t), angle(t, transport))[1]


@dataclass(frozen=True)
class SCM(Objective):
    """Eq. (8): the endpoint must not change along the path, enforced through its derivative by the angle.

    mode: the path's direction is the teacher's field ("distillation") or the sample's own ("training").
    derivative: central "difference" (any backbone; two more passes without gradient) or "jvp" (exact; the backbone's
        operators need forward-mode derivatives, which fused attention lacks).
    epsilon: half the step in t of the difference.
    warmup: share of the run over which the unstable part of the tangent is faded in (0: at once).
    c: of the tangent normalisation g / (|g| + c); null: raw tangents.
    reduction: |g| as root of the "mean" square, so that c means the same at any resolution, or of the "sum" (as printed).
    guidance: of the teacher, in distillation; 1: none. times: the law of the times at which it is asked.
    """

    mode: Literal["distillation", "training"] = "distillation"
    derivative: Kind = "difference"
    epsilon: float = 5e-3
    warmup: float = 0.1
    c: float | None = 0.1
    reduction: Literal["mean", "sum"] = "mean"
    guidance: float = 1.0
    times: TimeLaw = field(default_factory=lambda: TimeLaw(mean=-1.0 + math.log(2), spread=1.4))

    citation: ClassVar[str] = "Lu & Song, Simplifying, Stabilizing and Scaling Continuous-time Consistency Models, 2024"
    sampler: ClassVar[dict[str, float]] = {"kappa": 0.0, "rho": 1.0, "order": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.epsilon < 0.5:
            raise ValueError(f"epsilon must lie in (0, 0.5), got {self.epsilon}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be a share of the run in [0, 1], got {self.warmup}")
        if self.c is not None and self.c <= 0:
            raise ValueError(f"c must be above 0, got {self.c}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Distillation follows the teacher's field."""
        return ("teacher",) * (self.mode == "distillation")

    @property
    def scheduled(self) -> bool:
        """The tangent's warm-up is a share of the run."""
        return self.warmup > 0

    def __call__(self, networks: Networks, batch: Batch, memory: MutableMapping[str, Tensor]) -> Losses:
        """Algorithm 1 for one micro-batch: `||F - sg(F) - g||^2` per element, g the normalised tangent."""
        transport, c = networks.transport, batch.c
        t = networks.round_time(self.times.draw(batch.random))
        x, z = batch.x, batch.random.normal(batch.x.shape[1:]).to(batch.x)
        x_t = transport.interpolate(x, z, t)
        F = angular_prediction(networks.student(x_t, t, c), x_t, t, transport)
        with torch.no_grad():
            if self.mode == "distillation":
                v = teach(networks, x_t, t, c, self.guidance)
                x, z = transport.endpoint(v, x_t, t), transport.noise(v, x_t, t)
            g = self._tangent(networks, F.detach(), x, z, t, c, self._share(batch.progress))
            target = F + self._normalised(g)
        loss = mean_square(F - target).sum() / batch.total
        return Losses(loss, {"loss": loss.detach()})

    def _tangent(
        self, networks: Networks, F: Tensor, x: Tensor, z: Tensor, t: Tensor, c: Condition, r: float
    ) -> Tensor:
        """cos(theta) times Eq. (6), its second part scaled by `r`, along the path from `x` to `z` (Algorithm 1)."""
        theta = angle(t, networks.transport)
        x_trig, velocity = angular(x, z, theta)
        cos, sin = expand(theta.cos(), F), expand(theta.sin(), F)
        g = -(cos**2) * (F - velocity)
        return g if r == 0 else g - r * cos * sin * (x_trig + self._rate(networks, x, z, t, c))

    def _rate(self, networks: Networks, x: Tensor, z: Tensor, t: Tensor, c: Condition) -> Tensor:
        """dF / d theta, the total derivative of the student's prediction along the path from `x` to `z`."""
        transport = networks.transport

        def along(s: Tensor) -> Tensor:
            x_s = transport.interpolate(x, z, s)
            return angular_prediction(networks.student(x_s, s, c), x_s, s, transport)

        rate = rate_of(lambda s: angle(s, transport), t)
        return derivative(along, t, self.derivative, self.epsilon, networks.round_time) / expand(rate, x)

    def _normalised(self, g: Tensor) -> Tensor:
        """Section 4.2: g / (|g| + c)."""
        if self.c is None:
            return g
        squared = g.float().flatten(1).square()
        norm = (squared.mean(1) if self.reduction == "mean" else squared.sum(1)).sqrt()
        return g / expand(norm + self.c, g)

    def _share(self, progress: float) -> float:
        """Tangent warm-up: r rises from 0 to 1 over the first `warmup` of the run."""
        return min(1.0, progress / self.warmup) if self.warmup > 0 else 1.0
