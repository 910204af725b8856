"""Algorithm 2 and Appendix E: from noise to data in any number of steps.

A sampler sees a velocity `F(x_t, t)` with the condition already bound, and nothing of prompts, models or files.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from apexflow.randomness import RowRandom
from apexflow.transport import LINEAR, Transport

Velocity = Callable[[Tensor, Tensor], Tensor]  # F(x_t, t), with the condition bound
MOST_STEPS = 10_000  # beyond this a grid tells no more, and takes hours


def kumaraswamy(u: Tensor, a: float, b: float, c: float) -> Tensor:
    """Appendix E: `f(u; a, b, c) = (1 - (1 - u^a)^b)^c` on [0, 1]; the identity at a = b = c = 1."""
    if not all(0 < power < math.inf for power in (a, b, c)):
        raise ValueError(f"the warp needs finite a, b, c > 0, got {(a, b, c)}")
    return (1 - (1 - u**a) ** b) ** c


def time_grid(
    steps: int, gaps: tuple[float, float] = (0.0, 0.0), warp: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> Tensor:
    """Appendix E: a descending grid of `steps + 1` times in float64 that ends at 0.

    `gaps` (e0, e1) keep the grid away from the noise end and, if e1 > 0, from the data end: (0.001, 0.6) at two steps is
    0.999, 0.6, 0. `warp` is Kumaraswamy's (a, b, c). Raises ValueError for steps < 1, gaps outside [0, 1) or a warp that is
    not finite and above 0.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    e0, e1 = gaps
    if not (0 <= e0 < 1 and 0 <= e1 < 1):
        raise ValueError(f"gaps must lie in [0, 1), got {gaps}")
    if e1 > 0 and e0 + e1 >= 1 and steps > 1:
        raise ValueError(f"gaps must leave room for {steps} steps between them, got {gaps}")
    if e1 > 0:
        u = torch.linspace(e0, 1 - e1, steps, dtype=torch.float64)
    else:
        u = torch.linspace(e0, 1, steps + 1, dtype=torch.float64)[:-1]
    return torch.cat([1 - kumaraswamy(u, *warp), torch.zeros(1, dtype=torch.float64)])


def shift_times(times: Tensor, factor: float) -> Tensor:
    """Move a grid towards the noise end: `t' = s t / (1 + (s - 1) t)`, the time shift that large models are served with."""
    return factor * times / (1 + (factor - 1) * times)


def check_times(times: Tensor) -> None:
    """ValueError unless `times` is a grid: at least two times, strictly descending from at most 1 to exactly 0."""
    if times.ndim != 1 or len(times) < 2 or not bool((times[1:] < times[:-1]).all()) or times[0] > 1 or times[-1] != 0:
        raise ValueError(f"times must descend strictly within [0, 1] and end at 0, got {times.tolist()}")


def sample(
    velocity: Callable[..., Tensor],
    z: Tensor,
    times: Tensor,
    kappa: float = 0.0,
    rho: float = 0.0,
    order: int = 1,
    transport: Transport = LINEAR,
    generator: torch.Generator | RowRandom | None = None,
    jumps: bool = False,
) -> Tensor:
    """Algorithm 2: data of the shape of the noise `z` (B, ...), by one evaluation of `velocity(x_t, t)` a step.

    times: descending (steps + 1,), as from `time_grid`; the velocity is told of them in the precision of `z`, or float32 for a
        narrower one.
    kappa: extrapolation ratio of Eq. (21). rho in [0, 1]: the share of fresh noise in the noise estimate, variance preserved
        (Appendix E).
    order 2: Heun's correction, which evaluates once more on every step but the last (so `2 steps - 1` evaluations).
    jumps: `velocity(x_t, t, s)` takes a second time, to which the step leads: the next of the grid, or 0 where fresh noise
        follows.
    Raises ValueError on a bad grid or ratio.
    """
    if times.ndim != 1 or len(times) < 2 or not bool((times[1:] < times[:-1]).all()):
        raise ValueError("times must be a strictly descending vector of at least two times")
    if times[0] > 1 or times[-1] < 0:
        raise ValueError("times must lie in [0, 1]: divide a scheduler's timesteps by their number")
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    if jumps and (order == 2 or kappa > 0):
        raise ValueError("a model with a second time jumps along the path: use order 1 and kappa 0")
    if not 0 <= rho <= 1 or not 0 <= kappa < math.inf:
        raise ValueError(f"rho must lie in [0, 1] and kappa be at least 0, got rho={rho}, kappa={kappa}")
    x_t, previous = z, None
    times = times.to(torch.promote_types(z.dtype, torch.float32))
    for t, t_next in itertools.pairwise(times):
        ask = _jumping(velocity, t_next if rho == 0 else torch.zeros_like(t_next)) if jumps else velocity
        x_hat, z_hat = _predict(ask, x_t, t, transport)
        raw = x_hat
        if previous is not None and kappa > 0:
            x_hat = extrapolate(x_hat, previous, kappa)
        previous = raw
        if order == 2 and t_next > 0:
            x_hat, z_hat = _heun(velocity, x_hat, z_hat, x_t, t, t_next, transport)
        if rho > 0 and t_next > 0:
            z_hat = refresh(z_hat, rho, generator)
        x_t = x_hat if t_next == 0 else _at(transport, x_hat, z_hat, t_next)
    return x_t


def extrapolate(x_hat: Tensor, previous: Tensor, kappa: float) -> Tensor:
    """Eq. (21): `x_hat + kappa (x_hat - previous)`, with the unrefined prediction of the step before as history."""
    return x_hat + kappa * (x_hat - previous)


def refresh(z_hat: Tensor, rho: float, generator: torch.Generator | RowRandom | None) -> Tensor:
    """Appendix E's bounded noise ratio: `sqrt(1 - rho) z_hat + sqrt(rho) noise`; rho = 1 is fresh noise alone."""
    if isinstance(generator, RowRandom):
        noise = generator.normal(z_hat.shape[1:]).to(z_hat)
    else:
        noise = torch.randn(z_hat.shape, generator=generator, dtype=z_hat.dtype, device=z_hat.device)
    return (1 - rho) ** 0.5 * z_hat + rho**0.5 * noise


def _predict(velocity: Velocity, x_t: Tensor, t: Tensor, transport: Transport) -> tuple[Tensor, Tensor]:
    rows = t.to(x_t.device).expand(x_t.shape[0])
    F = velocity(x_t, rows)
    return transport.endpoint(F, x_t, rows), transport.noise(F, x_t, rows)


def _jumping(velocity: Callable[[Tensor, Tensor, Tensor], Tensor], s: Tensor) -> Velocity:
    return lambda x_t, t: velocity(x_t, t, s.to(x_t.device).expand(x_t.shape[0]))


def _at(transport: Transport, x_hat: Tensor, z_hat: Tensor, t: Tensor) -> Tensor:
    """Eq. (20): the state at `t` composed from both estimates."""
    return transport.interpolate(x_hat, z_hat, t.to(x_hat.device).expand(x_hat.shape[0]))


def _heun(
    velocity: Velocity, x_hat: Tensor, z_hat: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, transport: Transport
) -> tuple[Tensor, Tensor]:
    """Appendix E's second-order correction: the next state is the mean of two predictions of it.

    The first composes the estimates made at `t`; the second steps from `x_t` with the estimates made at that candidate.
    Averaging the estimates themselves, as one may also read the text, is of first order only.
    """
    candidate = _at(transport, x_hat, z_hat, t_next)
    x_corr, z_corr = _predict(velocity, candidate, t_next, transport)
    d_alpha = transport.alpha(t_next) - transport.alpha(t)
    d_gamma = transport.gamma(t_next) - transport.gamma(t)
    state = (candidate + x_t + float(d_alpha) * z_corr + float(d_gamma) * x_corr) / 2
    # Handed on as (x_hat, z_hat) so that Eq. (20) composes exactly this state, and fresh noise can still replace z_hat.
    x_mean = (x_hat + x_corr) / 2
    return x_mean, (state - float(transport.gamma(t_next)) * x_mean) / float(transport.alpha(t_next))
