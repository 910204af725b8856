"""Exact fields as modules, numbers handed out, and gradients: what the tests of every baseline share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from closed_forms import GaussianField, gaussian_velocity, held, make_condition
from torch import Tensor, nn

from apexflow.conditioning import Condition
from apexflow.objectives import Batch, Field, Networks
from apexflow.objectives.scm import angle, angular
from apexflow.objectives.times import TimeLaw
from apexflow.transport import LINEAR, Transport, expand

MEAN, STD = 1.0, 0.5
UNIFORM = TimeLaw("uniform")


class OneStep(nn.Module):
    """The consistency field of N(mean, std^2): the prediction whose endpoint is the end of the exact flow."""

    def __init__(self, mean: float = MEAN, std: float = STD, transport: Transport = LINEAR) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std).log())
        self.transport = transport

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        transport, t, std = self.transport, t.clamp_min(1e-6), self.log_std.exp()
        alpha, gamma = expand(transport.alpha(t), x_t), expand(transport.gamma(t), x_t)
        end = self.mean + std * (x_t - gamma * self.mean) / (alpha**2 + gamma**2 * std**2).sqrt()
        return (end + expand(transport.alpha_hat(t) / transport.determinant(t), x_t) * x_t) / expand(
            transport.a(t), x_t
        )


class Phased(OneStep):
    """The field that leads, by `move`, to the point of the exact flow at the clean edge of the phase; linear transport."""

    def __init__(self, phases: int) -> None:
        super().__init__()
        self.phases = phases

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        t = t.double()
        s = ((t * self.phases - 1e-9).floor() / self.phases).clamp_min(0)
        spread = [(time**2 + (1 - time) ** 2 * self.log_std.exp() ** 2).sqrt() for time in (t, s)]
        x_s = expand(1 - s, x_t) * self.mean + expand(spread[1] / spread[0], x_t) * (
            x_t - expand(1 - t, x_t) * self.mean
        )
        return (x_t - x_s) / expand((t - s).clamp_min(1e-9), x_t)


class Straight(OneStep):
    """A field whose flow is straight, noise z to mean + std z: its velocity and its consistency field are the same."""

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        alpha, gamma = expand(self.transport.alpha(t), x_t), expand(self.transport.gamma(t), x_t)
        z = (x_t - gamma * self.mean) / (alpha + gamma * self.log_std.exp())
        return self.transport.target(self.mean + self.log_std.exp() * z, z, t)


class Smooth(nn.Module):
    """A small smooth network in float64."""

    def __init__(self, transport: Transport = LINEAR) -> None:
        super().__init__()
        self.transport = transport
        generator = torch.Generator().manual_seed(4)
        self.inner, self.outer = (
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) / 2) for shape in ((2, 8), (8, 1))
        )

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        theta, x_trig = angle(t, self.transport), x_t / expand(norm(t, self.transport), x_t)
        F = torch.tanh(torch.cat([x_trig, theta[:, None].to(x_t)], 1) @ self.inner) @ self.outer
        x, z = angular(x_trig, F, -theta)  # the endpoint and noise of an angular velocity
        return self.transport.target(x, z, t)


def norm(t: Tensor, transport: Transport) -> Tensor:
    return (transport.alpha(t) ** 2 + transport.gamma(t) ** 2).sqrt()


class Given:
    """Stands in for RowRandom: hands out the same numbers every time."""

    def __init__(self, z: Tensor, u: Tensor) -> None:
        self.z, self.u = z, u

    def normal(self, shape: Sequence[int], where: Tensor | None = None) -> Tensor:
        return self.z

    def uniform(self, where: Tensor | None = None) -> Tensor:
        return self.u


class Stream:
    """Stands in for RowRandom: one generator for a whole run."""

    def __init__(self, rows: int) -> None:
        self.rows, self.generator = rows, torch.Generator().manual_seed(11)

    def normal(self, shape: Sequence[int], where: Tensor | None = None) -> Tensor:
        return torch.randn(self._count(where), *shape, generator=self.generator)

    def uniform(self, where: Tensor | None = None) -> Tensor:
        return torch.rand(self._count(where), generator=self.generator)

    def _count(self, where: Tensor | None) -> int:
        return self.rows if where is None else int(where.sum())


TIMES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)


def corners(times: Sequence[float] = TIMES, progress: float = 1.0) -> Batch:
    """Data mean +- std and noise +- 1 in all pairs, at each time: the second moments of the Gaussian, exactly.

    For affine fields and squared errors the gradient depends on those alone, so it is the expected gradient.
    """
    x = MEAN + STD * torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    z = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    count = len(times)
    u = torch.tensor(times, dtype=torch.float64).repeat_interleave(4)
    random: Any = Given(z.repeat(count)[:, None], u)
    return Batch(
        x.repeat(count)[:, None], make_condition(4 * count), random, torch.arange(4 * count), 4 * count, progress
    )


def networks(student: Field, teacher: Field | None = None, transport: Transport = LINEAR) -> Networks:
    """The student is its own reference, and its own teacher unless another is given."""
    frozen = held(student, student.parameters) if isinstance(student, nn.Module) else student
    views = {"student": frozen, "reference": frozen}
    return Networks(student, student, teacher or student, transport=transport, frozen=views)


def gradient(objective: Any, student: nn.Module, batch: Batch, **roles: Any) -> Tensor:
    """The gradient by all parameters of the student, as one vector."""
    total = objective(networks(student, **roles), batch, {}).total
    parts = torch.autograd.grad(total, list(student.parameters()))
    return torch.cat([part.flatten().double() for part in parts])


class Bent(nn.Module):
    """The exact velocity plus a correction, affine in x_t with coefficients of second order in t, that starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.shift = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        powers = torch.stack([t**0, t, t * t], 1)
        correction = (powers @ self.slope)[:, None] * x_t + (powers @ self.shift)[:, None]
        return gaussian_velocity(MEAN, STD)(x_t, t) + correction


class AnyStep(nn.Module):
    """The mean direction of N(mean, std^2) from t to s on linear transport: `move` to s is the exact flow."""

    def __init__(self, mean: float = MEAN, std: float = STD) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std).log())

    def forward(self, x_t: Tensor, t: Tensor, c: Condition, s: Tensor) -> Tensor:
        std = self.log_std.exp()
        start, end = ((time**2 + (1 - time) ** 2 * std**2).sqrt() for time in (t, s))
        centred = x_t - expand(1 - t, x_t) * self.mean
        # (end - start) / (s - t), written so that s = t is its own limit.
        slope = ((s + t) + (s + t - 2) * std**2) / (start + end)
        return expand(slope / start, x_t) * centred - self.mean


class Instant(GaussianField):
    """The exact velocity, whatever the second time: where any-step methods start from."""

    def forward(self, x_t: Tensor, t: Tensor, c: Condition, s: Tensor | None = None) -> Tensor:
        return super().forward(x_t, t, c)


class BentJump(Bent):
    """As `Bent`, with a correction that also hears the second time, and one of its own where that is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.twin = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x_t: Tensor, t: Tensor, c: Condition, s: Tensor | None = None) -> Tensor:
        if s is None:
            return super().forward(x_t, t, c)
        if bool((s < 0).all()):
            slope, shift = (torch.stack([t**0, t], 1) @ part for part in self.twin.chunk(2))
            return gaussian_velocity(MEAN, STD)(x_t, t) + slope[:, None] * x_t + shift[:, None]
        slope, shift = (torch.stack([s, s * t], 1) @ part for part in self.second.chunk(2))
        return super().forward(x_t, t, c) + slope[:, None] * x_t + shift[:, None]
