"""What stock diffusers needs to sample as we do: a scheduler's config, and how to call the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apexflow.backbones import Backbone, Settings
from apexflow.sampler import check_times, shift_times, time_grid


def stock_scheduler_config(
    settings_or_times: Settings | Sequence[float] | Tensor, time_shift: float = 1.0
) -> dict[str, Any]:
    """What stock diffusers needs to sample as we do with kappa = rho = 0, and no code of ours.

    Takes a grid (steps + 1,) of times that ends at 0, or a model's `Settings`: their `times`, else a plain grid of
    their `steps`, shifted by the backbone's `time_shift`. Returns {"scheduler": the config of a
    FlowMatchEulerDiscreteScheduler that shifts by `time_shift` alone, "sigmas": what to pass to the pipeline's call,
    (steps,), before that shift}: its Euler step `x_t + (t_next - t) F` is Eq. (20) with both estimates of Eq. (3).
    ValueError for times that are no grid.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    given: Any = settings_or_times
    if isinstance(settings_or_times, Settings):
        given = _times(settings_or_times, time_shift)
    times = torch.as_tensor(given, dtype=torch.float64)
    check_times(times)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=time_shift, use_dynamic_shifting=False, shift_terminal=None)
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    sigmas = shift_times(times[:-1], 1 / time_shift).tolist()
    config |= {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    return {"scheduler": config, "sigmas": [round(sigma, 12) for sigma in sigmas]}


def _times(settings: Settings, time_shift: float) -> Tensor:
    """The grid (steps + 1,) on which a model is sampled."""
    if settings.times is not None and len(settings.times) == settings.steps + 1:
        return torch.tensor(settings.times, dtype=torch.float64)
    return shift_times(time_grid(settings.steps), time_shift)


def call_options(backbone: Backbone, settings: Settings, stock: bool) -> dict[str, Any]:
    """Keyword arguments of the stock pipeline's call that sample as `settings` say; `stock`: by the stock scheduler.

    Height and width are given since most pipelines have a size of their own, whatever the model was tuned at. A pipeline that
    keeps its own scheduler is told where to ask.
    """
    side = settings.size or backbone.default_size
    options: dict[str, Any] = {"num_inference_steps": settings.steps, "height": side, "width": side}
    if stock:
        options["sigmas"] = stock_scheduler_config(settings, backbone.time_shift)["sigmas"]
    elif not backbone.flow_scheduler:
        options |= backbone.stock_places(_times(settings, backbone.time_shift))
    return options | backbone.stock_options(settings)
