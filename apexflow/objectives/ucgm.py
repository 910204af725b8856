"""UCGM-T (Sun et al., 2025): one objective from flow matching (lambda = 0) to consistency (lambda = 1), with enhanced targets.

As printed: a squared error weighted by cos(t), and 4 alpha / sin(t), with t itself as the angle. (The authors' code has pi t / 2
there and a root of the squared error.) At lambda = 0 the target is z*_t itself (Eq. 1), which Eq. (5) equals up to a weight.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from scipy.special import betaincinv
from torch import Tensor

from apexflow.conditioning import Condition
from apexflow.objectives import Batch, Losses, Networks, Objective
from apexflow.objectives.derivative import derivative
from apexflow.objectives.distances import mean_square
from apexflow.objectives.teacher import teach
from apexflow.objectives.times import off_the_ends
from apexflow.transport import expand


@dataclass(frozen=True)
class UCGM(Objective):
    """Algorithm 1. Defaults are Table 5's for few steps (XL/2 on ImageNet-256).

    lam: lambda, the consistency ratio: 0 is flow matching, 1 consistency. zeta: the enhancement ratio; 0: targets are the
        sample's own.
    enhance: "teacher" moves data and noise towards the frozen teacher's estimates (appendix C.1.3); "self" by the student's
        difference between the condition and, from the EMA, none (line 6).
    guidance: scale that enhancing by the teacher trains in up to `threshold`. The teacher's own is less where zeta is above
        1, as the targets move past its answer.
    threshold: s, the time above which targets are averaged with the estimates.
    theta: both numbers of the Beta law of t, above 0.
    epsilon: half the step in t of the central difference at lambda = 1. clip: of the derivative; null: no clip.
    weighting: of the squared error by cos(t) (the paper), or "none".
    """

    lam: float = 1.0
    zeta: float = 2.0
    enhance: Literal["teacher", "self"] = "teacher"
    threshold: float = 0.75
    theta: tuple[float, float] = (0.8, 1.0)
    epsilon: float = 5e-3
    clip: float | None = 1.0
    weighting: Literal["cosine", "none"] = "cosine"
    guidance: float = 1.0

    citation: ClassVar[str] = "Sun et al., Unified Continuous Generative Models, 2025"
    sampler: ClassVar[dict[str, float]] = {"kappa": 0.0, "rho": 1.0, "order": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lam <= 1 or not 0 <= self.threshold <= 1:
            raise ValueError(f"lam and threshold must lie in [0, 1], got {self.lam} and {self.threshold}")
        if self.zeta < 0 or (self.enhance == "self" and self.zeta >= 1):
            raise ValueError(f"zeta must be at least 0, and below 1 when enhance is self, got {self.zeta}")
        if min(self.theta) <= 0 or not 0 < self.epsilon < 0.5:
            raise ValueError(f"theta must be above 0 and epsilon in (0, 0.5), got {self.theta} and {self.epsilon}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be above 0, got {self.clip}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Whoever gives the estimates of enhanced targets."""
        return ({"teacher": "teacher", "self": "reference"}[self.enhance],) if self.zeta > 0 else ()

    def __call__(self, networks: Networks, batch: Batch, memory: MutableMapping[str, Tensor]) -> Losses:
        """Algorithm 1, lines 2-16, for one micro-batch: mean over the elements of each row."""
        transport, c = networks.transport, batch.c
        t = networks.round_time(self._times(batch))
        x, z = batch.x, batch.random.normal(batch.x.shape[1:]).to(batch.x)
        x_t = transport.interpolate(x, z, t)
        F = networks.student(x_t, t, c)
        with torch.no_grad():
            stars = self._enhanced(networks, x, z, F.detach(), x_t, t, c) if self.zeta > 0 else (x, z)
            target = transport.target(*stars, t) if self.lam == 0 else self._target(networks, F, x, z, stars, t, c)
        error = mean_square(F - target)
        weight = t.cos() if self.weighting == "cosine" else torch.ones_like(t)
        loss = (weight * error).sum() / batch.total
        return Losses(loss, {"loss": loss.detach()})

    def _times(self, batch: Batch) -> Tensor:
        """t ~ Beta(theta_1, theta_2) (line 2), by the inverse of its distribution function."""
        u = batch.random.uniform()
        t = torch.from_numpy(betaincinv(*self.theta, u.double().cpu().numpy()))
        return off_the_ends(t.to(u))

    def _target(
        self,
        networks: Networks,
        F: Tensor,
        x: Tensor,
        z: Tensor,
        stars: tuple[Tensor, Tensor],
        t: Tensor,
        c: Condition,
    ) -> Tensor:
        """Lines 8-15: `F - (4 a(t) / sin t) clip(delta f^x)`, delta f^x the secant (Eq. 6) or central difference.

        The network is asked on the sample's path, which it knows; the endpoint is read off on the enhanced one.
        """
        transport = networks.transport

        def endpoint(s: Tensor, F_s: Tensor | None = None) -> Tensor:
            answer = networks.student(transport.interpolate(x, z, s), s, c) if F_s is None else F_s
            return transport.endpoint(answer, transport.interpolate(*stars, s), s)

        if self.lam == 1:
            rate = derivative(endpoint, t, "difference", self.epsilon, networks.round_time)
        else:
            earlier = networks.round_time(self.lam * t)
            rate = (endpoint(t, F) - endpoint(earlier)) / expand((t - earlier).clamp_min(1e-6), F)
        rate = rate if self.clip is None else rate.clamp(-self.clip, self.clip)
        return F - expand(4 * transport.a(t) / t.sin(), F) * rate

    def _enhanced(
        self, networks: Networks, x: Tensor, z: Tensor, F: Tensor, x_t: Tensor, t: Tensor, c: Condition
    ) -> tuple[Tensor, Tensor]:
        """Line 6 and appendix C.1.3: x* and z*, `a + zeta (b - d)` up to time s, above it the mean of a and b."""
        transport = networks.transport
        if self.enhance == "teacher":
            F, other = teach(networks, x_t, t, c, 1 + (self.guidance - 1) / self.zeta), None
        elif networks.null is None:
            raise ValueError("enhance self needs a null condition: give one, or enhance by the teacher")
        else:
            other = networks.reference(x_t, t, networks.null.expand(len(c)))
        late = expand(t, x) > self.threshold

        def enhanced(a: Tensor, estimate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
            b = estimate(F, x_t, t)
            d = a if other is None else estimate(other, x_t, t)
            return torch.where(late, (a + b) / 2, a + self.zeta * (b - d))

        return enhanced(x, transport.endpoint), enhanced(z, transport.noise)
