"""Transports between data and noise, and the unified parametrisation (paper, section 2.1).

One time convention for the whole package: `x_t = alpha(t) z + gamma(t) x` with `t = 1` pure noise `z` and `t = 0` data `x`.
A network answers `F(x_t, t, c)`, an estimate of `z_t = alpha_hat(t) z + gamma_hat(t) x`; for the linear transport that is the
velocity `z - x`. All tensors are batch-first and `t` has shape (B,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Schedule = Callable[[Tensor], Tensor]


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Append axes to `t` (B,) until it broadcasts against `like` (B, ...), and give it the dtype of `like`.

    Coefficients are computed in the dtype of `t`, so times kept in float32 or float64 lose nothing before the last cast.
    """
    if t.ndim != 1 or t.shape[0] not in (1, like.shape[0]):
        raise ValueError(f"times must have shape ({like.shape[0]},), got {tuple(t.shape)}")
    return t.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


@dataclass(frozen=True)
class Transport:
    """The schedules of Eq. (1), alpha and gamma, and of the target z_t below Eq. (2), alpha_hat and gamma_hat."""

    name: str
    alpha: Schedule
    gamma: Schedule
    alpha_hat: Schedule
    gamma_hat: Schedule

    def interpolate(self, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Eq. (1): the point `x_t = alpha(t) z + gamma(t) x` on the path from data `x` to noise `z`, both (B, ...)."""
        return expand(self.alpha(t), x) * z + expand(self.gamma(t), x) * x

    def target(self, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Eq. (2): what the network regresses, `z_t = alpha_hat(t) z + gamma_hat(t) x`, in the shape of `x`."""
        return expand(self.alpha_hat(t), x) * z + expand(self.gamma_hat(t), x) * x

    def endpoint(self, F: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Eq. (3) left, Eq. (9) for linear transport (`x_t - t F`): the data `f^x` that a prediction `F` implies."""
        return expand(self.a(t), x_t) * F - expand(self.alpha_hat(t) / self.determinant(t), x_t) * x_t

    def noise(self, F: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Eq. (3) right: the noise `f^z` that a prediction `F` implies."""
        determinant = self.determinant(t)
        return expand(self.gamma_hat(t) / determinant, x_t) * x_t - expand(self.gamma(t) / determinant, x_t) * F

    def move(self, F: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Eq. (20): the point at time `s` that a prediction `F` at `x_t` leads to; for linear transport `x_t - (t - s) F`."""
        return self.interpolate(self.endpoint(F, x_t, t), self.noise(F, x_t, t), s)

    def determinant(self, t: Tensor) -> Tensor:
        """`alpha gamma_hat - alpha_hat gamma` of Eq. (3): constant in t for linear and trigonometric transport."""
        return self.alpha(t) * self.gamma_hat(t) - self.alpha_hat(t) * self.gamma(t)

    def a(self, t: Tensor) -> Tensor:
        """Eq. (11): `a(t) = alpha / (alpha gamma_hat - alpha_hat gamma)`, so that d f^x / d F = a(t); -t if linear."""
        return self.alpha(t) / self.determinant(t)


LINEAR = Transport(
    "linear",
    alpha=lambda t: t,
    gamma=lambda t: 1 - t,
    alpha_hat=lambda t: t * 0 + 1,
    gamma_hat=lambda t: t * 0 - 1,
)

# x_t = sin(pi t / 2) z + cos(pi t / 2) x with its derivative by the angle as the target (TrigFlow with sigma_data = 1).
TRIGONOMETRIC = Transport(
    "trigonometric",
    alpha=lambda t: (t * (math.pi / 2)).sin(),
    gamma=lambda t: (t * (math.pi / 2)).cos(),
    alpha_hat=lambda t: (t * (math.pi / 2)).cos(),
    gamma_hat=lambda t: -(t * (math.pi / 2)).sin(),
)

# The score-SDE "VP" process with beta from 0.1 to 20 and the noise as target (epsilon prediction): gamma(t) = exp(-B(t)/2),
# B(t) = 0.1 t + 9.95 t^2. gamma(1) is 0.0066, not 0: noise at t = 1 keeps a trace of the data, as in Song et al. (2020).
_VP_MINIMUM, _VP_MAXIMUM = 0.1, 20.0


def _vp_gamma(t: Tensor) -> Tensor:
    return (-0.5 * (_VP_MINIMUM * t + 0.5 * (_VP_MAXIMUM - _VP_MINIMUM) * t * t)).exp()


VARIANCE_PRESERVING = Transport(
    "variance_preserving",
    alpha=lambda t: (1 - _vp_gamma(t).square()).clamp_min(0).sqrt(),
    gamma=_vp_gamma,
    alpha_hat=lambda t: t * 0 + 1,
    gamma_hat=lambda t: t * 0,
)
