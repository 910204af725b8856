"""Algorithm 2 and Appendix E as a diffusers scheduler, for the stock flow-matching pipelines.

Written for the SANA, Qwen-Image, SD3, FLUX.1, FLUX.2 [klein], Z-Image and Lumina-2 pipelines of diffusers 0.42, whose
networks' answers reach `step` as `F = z - x`. The class is found by its module path in a saved pipeline: keep the path stable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from apexflow.sampler import check_times, extrapolate, refresh, shift_times, time_grid
from apexflow.transport import LINEAR

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class AnyStepOutput(BaseOutput):
    """`prev_sample`: the state at the next time; `pred_original_sample`: the data predicted here. Both like the sample."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class AnyStepScheduler(SchedulerMixin, ConfigMixin):
    """Any number of steps, one network evaluation each, by the sampler of `apexflow.sampler` at order 1.

    gaps, warp: the grid of `time_grid`. shift: the factor of `shift_times`; where the model has one, its `time_shift`.
    times: an explicit descending grid in [0, 1] that ends at 0, taken when its number of steps is asked for; any other
    number gives the grid of the other settings. kappa: extrapolation ratio of Eq. (21). rho: share of fresh noise
    (Appendix E). seed: of that noise, where the pipeline hands no generator to `step`; drawn on the CPU, from the start
    again in every run. num_train_timesteps: the unit in which pipelines pass times, t = 1 being this number.

    The pipelines name their own `sigmas` and `mu` in every run; only the number of the former is heeded, so pictures
    depend on this config alone. All arithmetic is in float32, over a grid made in float64. Raises ValueError for
    settings out of range.
    """

    order = 1
    init_noise_sigma = 1.0

    timesteps: Tensor  # (steps,) float32, num_train_timesteps * t
    sigmas: Tensor  # (steps + 1,) float32 on the CPU, t itself with the final 0
    num_inference_steps: int
    config: Any  # a FrozenDict that also answers by attribute

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        gaps: Sequence[float] = (0.0, 0.0),
        warp: Sequence[float] = (1.0, 1.0, 1.0),
        shift: float = 1.0,
        times: Sequence[float] | None = None,
        kappa: float = 0.0,
        rho: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= rho <= 1 or not 0 <= kappa < math.inf:
            raise ValueError(f"rho must lie in [0, 1] and kappa be at least 0, got rho={rho}, kappa={kappa}")
        if len(gaps) != 2 or len(warp) != 3 or not 0 < shift < math.inf:
            raise ValueError(f"gaps are two, warp is three and shift > 0, got {gaps}, {warp} and {shift}")
        plain = {"gaps": _floats(gaps), "warp": _floats(warp), "times": None if times is None else _floats(times)}
        self.register_to_config(**plain)  # lists, as they come back from JSON
        if times is not None:
            check_times(torch.tensor(plain["times"], dtype=torch.float64))
        self.set_timesteps(len(times) - 1 if times is not None else 1)

    def grid(self, steps: int) -> Tensor:
        """The descending times (steps + 1,) in float64 that a run of `steps` steps visits."""
        config = self.config
        if config.times is not None and len(config.times) == steps + 1:
            return torch.tensor(config.times, dtype=torch.float64)
        e0, e1 = config.gaps
        a, b, c = config.warp
        return shift_times(time_grid(steps, (e0, e1), (a, b, c)), config.shift)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Start a run: forget the one before. `sigmas` and `timesteps` count for their number alone, `mu` not at all."""
        given = next((values for values in (sigmas, timesteps) if values is not None), None)
        steps = num_inference_steps if given is None else len(given)
        if steps is None:
            raise ValueError("set_timesteps needs the number of steps")
        times = self.grid(steps)
        self.num_inference_steps = steps
        self.timesteps = (times[:-1] * self._unit).float().to(device)
        self.sigmas = times.float()
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._previous: Tensor | None = None
        self._generator: torch.Generator | None = None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> AnyStepOutput | tuple[Tensor, Tensor]:
        """One pass of Algorithm 2's loop: from `sample` (B, ...), the state at `timestep`, to the state at the next time.

        model_output: F = z - x in the shape of `sample`, packed or not. Both answers have the dtype of `model_output`.
        """
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        t, t_next = self.sigmas[self._step_index : self._step_index + 2]
        F, x_t = model_output.float(), sample.float()
        rows = t.to(x_t.device).expand(x_t.shape[0])
        raw, z_hat = LINEAR.endpoint(F, x_t, rows), LINEAR.noise(F, x_t, rows)
        x_hat = raw
        if self._previous is not None and self.config.kappa > 0:
            x_hat = extrapolate(raw, self._previous, self.config.kappa)
        state = x_hat
        if t_next > 0:
            if self.config.rho > 0:
                z_hat = self._refreshed(z_hat, generator)
            state = LINEAR.interpolate(x_hat, z_hat, t_next.to(x_t.device).expand(x_t.shape[0]))
        self._previous = raw
        self._step_index += 1
        answer = AnyStepOutput(state.to(model_output.dtype), x_hat.to(model_output.dtype))
        return answer if return_dict else (answer.prev_sample, answer.pred_original_sample)

    def _refreshed(self, z_hat: Tensor, generator: Generators) -> Tensor:
        """`refresh` on the device of the generator: the pipeline's, one for each row if it has a list, or our own."""
        if isinstance(generator, list):
            return torch.cat([self._refreshed(row, one) for row, one in zip(z_hat.split(1), generator, strict=True)])
        if generator is None:
            if self._generator is None:
                self._generator = torch.Generator().manual_seed(self.config.seed)
            generator = self._generator
        return refresh(z_hat.to(generator.device), self.config.rho, generator).to(z_hat.device)

    # -- What pipelines expect of every scheduler ----------------------------------------------------------------------

    @property
    def step_index(self) -> int | None:
        """How many steps of the grid lie behind; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The first step of a run, where a pipeline named it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at a later time of the grid, as picture-to-picture pipelines do."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The place of the time nearest to `timestep` in the schedule."""
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        return int((schedule - torch.as_tensor(timestep, device=schedule.device)).abs().argmin())

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample as it is: the network takes x_t."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Eq. (1): data `sample` and `noise`, both (B, ...), mixed at `timestep` (B,) or (1,), in the dtype of `sample`."""
        t = timestep.to(sample.device, torch.float32).reshape(-1) / self._unit
        return LINEAR.interpolate(sample.float(), noise.float(), t).to(sample.dtype)

    @property
    def _unit(self) -> int:
        return self.config.num_train_timesteps

    def __len__(self) -> int:
        return self._unit


def _floats(values: Sequence[float]) -> list[float]:
    return [float(value) for value in values]
