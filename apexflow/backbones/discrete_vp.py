"""Epsilon models of the DDPM line (SDXL, PixArt) as velocity models on linear transport.

Such a model knows `x_vp = alpha eps + gamma x` with alpha^2 + gamma^2 = 1 at the indices of a table. The same point in
linear transport is `x_lin = x_vp / (alpha + gamma)` at `t = alpha / (alpha + gamma)`, and there
`F = z - x = (eps - x_lin) / (1 - t)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apexflow.backbones import Settings
from apexflow.backbones.family import Backbone
from apexflow.errors import UserError
from apexflow.transport import expand

Epsilon = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DiscreteVP:
    """The table of a DDPM, `log_ratio` = log(alpha / gamma) by index, ascending, (N,) in float64.

    t_max: the time of the last index, .936 for SDXL, .994 for PixArt. Nothing above it was trained.
    """

    log_ratio: Tensor
    t_max: float = field(init=False)

    def __post_init__(self) -> None:
        # Read now: where memory is counted on shapes, no tensor can be.
        object.__setattr__(self, "t_max", float(self.log_ratio[-1].sigmoid()))

    @classmethod
    def of(cls, scheduler: Any) -> DiscreteVP:
        """From a diffusers scheduler; UserError unless it has a table and predicts epsilon."""
        predicts = scheduler.config.get("prediction_type", "epsilon")
        if predicts != "epsilon":
            raise UserError(f"this model predicts {predicts!r}: of DDPM models, use one that predicts epsilon")
        signal = getattr(scheduler, "alphas_cumprod", None)
        if signal is None:
            raise UserError(f"the scheduler {type(scheduler).__name__} has no DDPM table: restore the original")
        signal = signal.double().cpu().clamp_min(1e-12)  # zero terminal SNR ends at 0
        return cls(((1 - signal) / signal).log() / 2)

    @property
    def time_shift(self) -> float:
        """The shift that sends t = 1/2 to the middle of the table, as an evenly spaced DDPM sampler would."""
        return float(self.log_ratio[len(self.log_ratio) // 2].exp())

    def index(self, t: Tensor) -> Tensor:
        """The table index of each time (B,), float64: log alpha/gamma interpolated, ends for times beyond the table."""
        table = self.log_ratio.to(t.device, non_blocking=True)  # no pass need wait for it
        wanted = torch.logit(t.double()).clamp(table[0], table[-1])
        above = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
        below = above - 1
        return below + (wanted - table[below]) / (table[above] - table[below])

    def velocity(self, epsilon: Epsilon, x_t: Tensor, t: Tensor) -> Tensor:
        """F(x_t, t) in the dtype of `x_t` (B, ...), from `epsilon(x_vp, index)`.

        Above `t_max` time is clamped: the network is asked at its last index about the same point at unit variance, as
        DDIM does with pure noise, and F points to the data that follow, so that `x_1 - F` is DDIM's x0 from the last
        index. Errors of epsilon grow by 1 / gamma there (15 for SDXL, 156 for PixArt). LCM's boundary functions are
        not applied.
        """
        known = t.double().clamp(max=self.t_max)
        x_vp = x_t / expand(_norm(t.double()), x_t)
        e = epsilon(x_vp, self.index(known)).to(torch.promote_types(x_t.dtype, torch.float32))
        x_known = x_vp * expand(_norm(known), x_vp)  # the point in linear transport at `known`
        F = (e - x_known) / expand(1 - known, e)
        beyond = t.double() > self.t_max
        to_data = (x_t - x_known + expand(known, F) * F) / expand(torch.where(beyond, t.double(), 1.0), F)
        return torch.where(expand(beyond, F) > 0, to_data, F).to(x_t.dtype)


def _norm(t: Tensor) -> Tensor:
    """1 / (alpha + gamma) at time t."""
    return (t.square() + (1 - t).square()).sqrt()


class EpsilonBackbone(Backbone):
    """Base of the families of this line."""

    flow_scheduler = False

    def __init__(self, parts: Mapping[str, Any], settings: Settings) -> None:
        super().__init__(parts, settings)
        self.schedule = DiscreteVP.of(self.scheduler)
        self.time_shift = self.schedule.time_shift

    def stock_places(self, times: Tensor) -> dict[str, Any]:
        """By `timesteps`, where the scheduler takes them. Left alone, the pipeline takes its one step at the clean end."""
        if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
            return {}
        return {"timesteps": self.schedule.index(times[:-1]).round().int().tolist()}
