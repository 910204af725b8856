"""What stock diffusers needs to sample as we do: a scheduler's config, and how to call the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from apexflow.backbones import Backbone, Settings
from apexflow.sampler import check_times, shift_times

Scheduler = Literal["stock", "any-step", "original"]


def stock_scheduler_config(
    settings_or_times: Settings | Sequence[float] | Tensor, time_shift: float = 1.0
) -> dict[str, Any]:
    """What stock diffusers needs to sample as we do with kappa = 0 and rho 0 or 1, and no code of ours.

    Takes a grid (steps + 1,) of times that ends at 0, or a model's `Settings`: their `times`, else a plain grid of
    their `steps`, shifted by the backbone's `time_shift`. Returns {"scheduler": the config of a
    FlowMatchEulerDiscreteScheduler that shifts by `time_shift` alone, "sigmas": what to pass to the pipeline's call,
    (steps,), before that shift}: its Euler step `x_t + (t_next - t) F` is Eq. (20) with both estimates of Eq. (3). Where the
    settings say rho = 1 it samples stochastically, which is the estimate of the data with fresh noise. ValueError for times
    that are no grid.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    given: Any = settings_or_times
    renoised = isinstance(given, Settings) and given.rho == 1
    if isinstance(given, Settings):
        given = given.grid(given.steps, time_shift)
    times = torch.as_tensor(given, dtype=torch.float64)
    check_times(times)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(
        shift=time_shift, use_dynamic_shifting=False, shift_terminal=None, stochastic_sampling=renoised
    )
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    sigmas = shift_times(times[:-1], 1 / time_shift).tolist()
    config |= {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    return {"scheduler": config, "sigmas": [round(sigma, 12) for sigma in sigmas]}


def samples_as(settings: Settings, scheduler: Scheduler) -> bool:
    """Whether a scheduler samples as `settings` say, and not in one step alone, which all take alike.

    An "original" one samples in its own way, whatever it is: it is not asked which.
    """
    if settings.steps == 1:
        return True
    if scheduler == "stock":
        return settings.order == 1 and settings.kappa == 0 and settings.rho in (0, 1)
    return scheduler == "any-step" and settings.order == 1


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
        options |= backbone.stock_places(settings.grid(settings.steps, backbone.time_shift))
    return options | backbone.stock_options(settings)
