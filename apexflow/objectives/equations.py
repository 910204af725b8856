"""The equations of the paper's section 3 as pure functions, Eq. 7 to 20; `apex.py` puts them together."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate as resize

from apexflow.transport import LINEAR, Transport, expand


def secant_target(
    F_t: Tensor,
    F_lt: Tensor,
    x_t: Tensor,
    x_lt: Tensor,
    t: Tensor,
    lt: Tensor,
    transport: Transport = LINEAR,
    clip: float | None = 1.0,
) -> Tensor:
    """Eq. (12): `F_t - 2 clip(delta f^x / delta a, -clip, clip)`, elementwise, in the shape of `F_t` (B, ...).

    F_t, F_lt: reference predictions at the points `x_t`, `x_lt` of one path at times `t`, `lt` (B,); clip None: no clip.
    """
    secant = endpoint_difference(F_t, F_lt, x_t, x_lt, t, lt, transport) / coefficient_difference(t, lt, x_t, transport)
    return F_t - 2 * (secant if clip is None else secant.clamp(-clip, clip))


def endpoint_difference(
    F_t: Tensor, F_lt: Tensor, x_t: Tensor, x_lt: Tensor, t: Tensor, lt: Tensor, transport: Transport = LINEAR
) -> Tensor:
    """Eq. (10): how far apart the data lie that the two predictions imply."""
    return transport.endpoint(F_t, x_t, t) - transport.endpoint(F_lt, x_lt, lt)


def coefficient_difference(t: Tensor, lt: Tensor, like: Tensor, transport: Transport = LINEAR) -> Tensor:
    """Eq. (11): `a(t) - a(lambda t)`, broadcast against `like`; -(t - lambda t) for linear transport."""
    return expand(transport.a(t) - transport.a(lt), like)


def multi_scale_l2(error: Tensor, p: float = 0.5, c: float = 1e-3, reduction: str = "sum") -> Tensor:
    """Eq. (14): mean of the adaptive loss at full, half and quarter resolution, (B,) from an error (B, C, H, W).

    `reduction` says whether the squared norm inside sums over C, H, W (as printed) or averages ("mean"). Packed or
    odd-shaped errors (B, ...) that cannot be downsampled by 2 or 4 use the scales that they have.
    """
    scales = [error]
    for factor in (2, 4):
        if error.ndim == 4 and min(error.shape[-2:]) >= factor:
            # "area" interpolation is average pooling whenever the factor divides the side.
            scales.append(resize(error, size=[side // factor for side in error.shape[-2:]], mode="area"))
    return torch.stack([adaptive_loss(scale, p, c, reduction) for scale in scales]).mean(0)


def adaptive_loss(error: Tensor, p: float, c: float, reduction: str) -> Tensor:
    """Below Eq. (14): `||E||^2 / (||E||^2 + c)^p` for each row, in float32."""
    squared = error.float().flatten(1).square()
    norm = squared.sum(1) if reduction == "sum" else squared.mean(1)
    return norm / (norm + c) ** p


def primal_loss(
    F_t: Tensor, F_lt: Tensor, x_t: Tensor, x_lt: Tensor, t: Tensor, lt: Tensor, transport: Transport = LINEAR
) -> Tensor:
    """Eq. (7) with unit weight, (B,): the reference form that the target of Eq. (12) replaces. `F_lt` is the reference's."""
    return endpoint_difference(F_t, F_lt.detach(), x_t, x_lt, t, lt, transport).flatten(1).square().sum(1)


def dual_loss(F_t: Tensor, F_lt: Tensor, velocity: Tensor, lam: Tensor) -> Tensor:
    """Eq. (8) with omega = 1, (B,): flow matching and self alignment mixed by `lam` (B,). Gradient of Eq. (7) over t^2."""
    matching = (F_t - velocity).flatten(1).square().sum(1)
    alignment = (F_t - F_lt.detach()).flatten(1).square().sum(1)
    return (1 - lam) * matching + lam * alignment


def adversarial_error(
    F_fake: Tensor, x_fake: Tensor, z_fake: Tensor, t: Tensor, transport: Transport = LINEAR
) -> Tensor:
    """Eq. (17): error of the shifted branch against the velocity `z_fake - x_fake` of the student's own pictures."""
    return F_fake - transport.target(x_fake, z_fake, t)


def residual(F_fake: Tensor, F_real: Tensor) -> Tensor:
    """Eq. (18): `delta d`, the shifted branch's prediction less the real one's, at the same noisy fake."""
    return F_fake - F_real.detach()


def shifting_error(F: Tensor, delta: Tensor) -> Tensor:
    """Eq. (19): `F_anchor - sg(F_anchor + delta d)` with `F_anchor = -F`; descending on it moves F along -delta d.

    For linear transport the one-step picture `z - F` then moves along `F_fake - F_real`, which is
    `(E_real[x] - E_fake[x]) / t` for the exact fields at time t.
    """
    anchor = -F
    return anchor - (anchor + delta).detach()


def move(F: Tensor, x_t: Tensor, t: Tensor, s: Tensor, transport: Transport) -> Tensor:
    """The point at time `s` that a prediction `F` at `x_t` leads to (Eq. 20): for linear transport `x_t - (t - s) F`."""
    return transport.interpolate(transport.endpoint(F, x_t, t), transport.noise(F, x_t, t), s)
