"""Exact velocities of Gaussians and mixtures under any transport, tiny analytic fields, and builders for the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apexflow.conditioning import Condition
from apexflow.objectives import Batch, Field, Further, Networks, Objective
from apexflow.randomness import RowRandom
from apexflow.sampler import Velocity
from apexflow.training.fields import held
from apexflow.transport import LINEAR, TRIGONOMETRIC, VARIANCE_PRESERVING, Transport, expand

EVERY_TRANSPORT = pytest.mark.parametrize(
    "transport", (LINEAR, TRIGONOMETRIC, VARIANCE_PRESERVING), ids=lambda transport: transport.name
)


def gaussian_velocity(mean: Tensor | float, std: Tensor | float, transport: Transport = LINEAR) -> Velocity:
    """E[z_t | x_t] for data N(mean, std^2) and standard normal noise, elementwise."""

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, gamma = expand(transport.alpha(t), x_t), expand(transport.gamma(t), x_t)
        centred = (x_t - gamma * mean) / (alpha**2 + gamma**2 * std**2)
        return transport.target(mean + gamma * std**2 * centred, alpha * centred, t)

    return velocity


def mixture_velocity(means: Tensor, std: float, transport: Transport = LINEAR) -> Velocity:
    """E[z_t | x_t] for an even mixture of N(means[k], std^2 I), means (K, D), at points x_t (B, D)."""

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, gamma = expand(transport.alpha(t), x_t), expand(transport.gamma(t), x_t)
        variance = alpha**2 + gamma**2 * std**2
        distance = (x_t[:, None] - gamma[:, None] * means).square().sum(2)  # (B, K)
        weights = torch.softmax(-distance / (2 * variance), 1)
        parts = torch.stack([gaussian_velocity(mean, std, transport)(x_t, t) for mean in means], 1)  # (B, K, D)
        return (weights[..., None] * parts).sum(1)

    return velocity


def gaussian_endpoint(z: Tensor, mean: float, std: float, transport: Transport = LINEAR) -> Tensor:
    """Where the probability flow carries `z` from t = 1 to t = 0, for data N(mean, std^2)."""
    alpha, gamma = transport.alpha(torch.ones(1).to(z)), transport.gamma(torch.ones(1).to(z))
    return mean + std * (z - gamma * mean) / (alpha**2 + gamma**2 * std**2).sqrt()


def quadrature(means: Sequence[float], std: float, nodes: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Data x (N, 1), noise z (N, 1) and weights (N,) that integrate over an even 1-D mixture and noise exactly."""
    points, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(nodes))
    weights = weights / weights.sum()
    x = torch.cat([mean + std * points for mean in means])
    w = torch.cat([weights / len(means) for _ in means])
    return x.repeat_interleave(nodes)[:, None], points.repeat(len(x))[:, None], torch.outer(w, weights).flatten()


class GaussianField(nn.Module):
    """The exact velocity of N(mean, exp(log_std)^2) with both as parameters; blind to the condition."""

    def __init__(self, mean: Sequence[float], std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_std = nn.Parameter(torch.tensor(std).log())

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        return gaussian_velocity(self.mean, self.log_std.exp())(x_t, t)


class LinearField(nn.Module):
    """F = W [x_t, t, mean c] + b: the smallest network that hears the point, the time and the condition."""

    def __init__(self, size: int, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.linear = nn.Linear(size + 1 + width, size)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        heard = torch.cat([x_t.flatten(1), t[:, None].to(x_t), c.embeds.mean(1).to(x_t)], 1)
        return self.linear(heard).reshape(x_t.shape)


class JumpField(LinearField):
    """A linear field that hears a second time, too."""

    def __init__(self, size: int, width: int, seed: int) -> None:
        super().__init__(size, width, seed)
        self.second = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(seed + 50)) / 4)

    def forward(self, x_t: Tensor, t: Tensor, c: Condition, s: Tensor | None = None) -> Tensor:
        F = super().forward(x_t, t, c)
        return F if s is None else F + (s[:, None].to(x_t) * self.second).reshape(x_t.shape)


@dataclass
class Call:
    """What a role was asked, what it answered, and whether a graph was built."""

    x_t: Tensor
    t: Tensor
    c: Condition
    F: Tensor
    graph: bool
    s: Tensor | None = None


@dataclass
class Recorder:
    """A field that notes every call to the field inside."""

    inner: Field
    calls: list[Call] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, c: Condition, *second: Tensor) -> Tensor:
        F = self.inner(x_t, t, c, *second)
        self.calls.append(Call(x_t.detach(), t, c, F.detach(), torch.is_grad_enabled(), *second))
        return F


class LinearJudge(nn.Module):
    """Two logits a row, linear in what a field answers; `recorder` is how that field is asked."""

    def __init__(self, size: int, recorder: Field) -> None:
        super().__init__()
        self.head, self.recorder = nn.Linear(size, 2), recorder
        for parameter in self.head.parameters():
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8)) / 4

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        return self.head(self.recorder(x_t, t, c).flatten(1))


@dataclass
class Roles:
    """One linear field a role, each recorded; `further` as an objective declares them."""

    student: LinearField
    reference: LinearField
    teacher: LinearField
    further: dict[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recorders = {name: Recorder(getattr(self, name)) for name in ("student", "reference", "teacher")}

    def add(self, declared: Further) -> None:
        """One further network: a linear field, or a judge over the field that it looks at."""
        size = int(np.prod(SHAPE))
        if declared.kind == "field":
            self.further[declared.name] = LinearField(size, WIDTH, 4)
        else:
            on: Any = declared.on
            looked_at = self.recorders.get(on) or Recorder(self.further[on])
            if on in self.recorders:  # teachers are frozen in training
                looked_at = held(looked_at, getattr(self, on).parameters)
            self.further[declared.name] = LinearJudge(size, looked_at)

    def networks(self, **options: object) -> Networks:
        recorders: Any = self.recorders
        frozen = {name: held(field, getattr(self, name).parameters) for name, field in recorders.items()}
        frozen |= {name: held(network, partial(self.parameters, name)) for name, network in self.further.items()}
        views: Any = {"further": self.further, "frozen": frozen}
        return Networks(**recorders, null=make_condition(1, seed=99), **views, **options)  # type: ignore[arg-type]

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The weights of a role; a judge's include those of the further field that it looks at."""
        network = self.further[name] if name in self.further else getattr(self, name)
        looked_at = [self.further["critic"]] if name == "judge" and "critic" in self.further else []
        return [parameter for part in (network, *looked_at) for parameter in part.parameters()]

    def calls(self, name: str) -> list[Call]:
        return self.recorders[name].calls

    def gradients(self, name: str) -> list[Tensor | None]:
        network = self.further[name] if name in self.further else getattr(self, name)
        return [parameter.grad for parameter in network.parameters()]


SHAPE, WIDTH = (1, 4, 4), 3


def make_roles(objective: Objective | None = None) -> Roles:
    """Three different linear fields for data of SHAPE and conditions of WIDTH, and what else an objective declares."""
    size = int(np.prod(SHAPE))
    kind = JumpField if objective is not None and "second_time" in objective.needs else LinearField
    roles = Roles(*[kind(size, WIDTH, seed) for seed in (1, 2, 3)])
    for declared in objective.further if objective is not None else ():
        roles.add(declared)
    return roles


def make_condition(rows: int, seed: int = 0) -> Condition:
    """Random text of two tokens, WIDTH wide, without mask or pooled part."""
    return Condition(torch.randn(rows, 2, WIDTH, generator=torch.Generator().manual_seed(seed)))


def make_batch(
    rows: int = 6, seed: int = 0, step: int = 0, x: Tensor | None = None, progress: float = 0.5, turn: int = 0
) -> Batch:
    """A whole global batch: random data of SHAPE unless `x` is given."""
    if x is None:
        x = torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed + 1))
    numbers = range(len(x))
    random = RowRandom(seed, step, numbers)
    c = make_condition(len(x))
    following = (lambda: c[[*numbers[1:], 0]].detach()) if len(x) > 1 else None
    return Batch(x, c, random, torch.tensor(numbers), len(x), progress, turn, following)


def micro_batches(batch: Callable[[], Batch], size: int, seed: int = 0) -> Iterator[Batch]:
    """The same global batch in pieces of `size` rows, with the row numbers and random numbers that belong to them."""
    whole = batch()
    for first in range(0, whole.total, size):
        rows = whole.rows[first : first + size]
        piece = slice(first, first + size)
        random = RowRandom(seed, 0, rows.tolist())
        wrong = whole.following()[piece] if whole.following else None
        following = None if wrong is None else partial(Condition.__getitem__, wrong, slice(None))
        yield Batch(whole.x[piece], whole.c[piece], random, rows, whole.total, whole.progress, whole.turn, following)
