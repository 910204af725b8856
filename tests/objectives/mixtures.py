"""The exact flow of an even 1-D mixture on linear transport: it keeps quantiles, so every jump is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from closed_forms import make_condition, mixture_velocity
from exact_fields import Given
from torch import Tensor, nn

from apexflow.conditioning import Condition
from apexflow.objectives import Batch
from apexflow.transport import expand


class Mixture:
    """Components N(means[k], std^2); one of them is a Gaussian. Points (B, 1) in float64, times (B,)."""

    def __init__(self, means: Sequence[float], std: float = 0.6) -> None:
        self.means, self.std = torch.tensor(means, dtype=torch.float64), std

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        return mixture_velocity(self.means[:, None], self.std)(x_t, t)

    def carry(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Where the flow takes points from time t to time s: the same quantile there. Differentiable by all three."""
        level = self._below(x_t, t)
        low, high = torch.full_like(x_t.detach(), -20.0), torch.full_like(x_t.detach(), 20.0)
        for _ in range(60):
            middle = (low + high) / 2
            above = self._below(middle, s.detach()) > level.detach()
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        x_s = (low + high) / 2
        # A Newton step from the solution changes nothing but knows the derivatives of the implicit function.
        return x_s - (self._below(x_s, s) - level) / self._density(x_s, s)

    def direction(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The mean direction from t to s, of which `move` is the flow; the velocity where the two meet."""
        apart = (t - s).abs() > 1e-7
        earlier = torch.where(apart, s, s * 0)
        mean = (x_t - self.carry(x_t, t, earlier)) / expand((t - earlier).clamp_min(1e-7), x_t)
        return torch.where(apart[:, None], mean, self.velocity(x_t, t))

    def _standard(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        t = expand(t, x)
        spread = (t**2 + (1 - t) ** 2 * self.std**2).sqrt()
        return (x - (1 - t) * self.means) / spread, spread

    def _below(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.special.ndtr(self._standard(x, t)[0]).mean(1, keepdim=True)

    def _density(self, x: Tensor, t: Tensor) -> Tensor:
        standard, spread = self._standard(x, t)
        return ((-0.5 * standard**2).exp() / (spread * math.sqrt(2 * math.pi))).mean(1, keepdim=True)

    def rows(self, times: Sequence[float], count: int, **others: Any) -> Batch:
        """`count` points of each component with `count` noises, evenly spread over quantiles, at each time: expectations."""
        levels = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
        levels = levels / levels.square().mean().sqrt()
        x = (self.means[:, None] + self.std * levels).flatten().repeat_interleave(count)
        z = levels.repeat(count * len(self.means))
        u = torch.tensor(times, dtype=torch.float64).repeat_interleave(len(x))
        x, z = x.repeat(len(times))[:, None], z.repeat(len(times))[:, None]
        random: Any = Repeating(z, u)
        return Batch(x, make_condition(len(x)), random, torch.ones(len(x), dtype=torch.long), len(x), 1.0)


class Repeating(Given):
    """Hands out the times, and on every second call two fifths of them: for methods that draw two times."""

    calls = 0

    def uniform(self, where: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.u if self.calls % 2 else 0.4 * self.u


class Around(nn.Module):
    """A mixture's velocity, map to data or direction to s, plus a correction in x_t, t and s that starts at nothing."""

    def __init__(self, mixture: Mixture, jumps: bool = False) -> None:
        super().__init__()
        self.mixture, self.jumps = mixture, jumps
        self.weights = nn.Parameter(torch.zeros(8, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, c: Condition, s: Tensor | None = None) -> Tensor:
        t = t.to(x_t)
        s = torch.zeros_like(t) if s is None else s.to(x_t)
        exact = self.mixture.direction(x_t, t, s) if self.jumps else self.mixture.velocity(x_t, t)
        features = torch.stack([t**0, t, t * t, s], 1)
        slope, shift = (features @ part for part in self.weights.chunk(2))
        return exact + slope[:, None] * x_t + shift[:, None]
