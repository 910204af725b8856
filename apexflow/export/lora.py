"""The averaged adapter as a diffusers LoRA file, and the stock scheduler that samples as we do."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from apexflow.backbones import Settings
from apexflow.errors import UserError
from apexflow.export.scheduler import check_times
from apexflow.sampler import shift_times, time_grid

if TYPE_CHECKING:
    from apexflow.training.roles import LoraRoles

FILE = "pytorch_lora_weights.safetensors"


@torch.no_grad()
def save_lora(roles: LoraRoles, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the averaged adapter to `folder/pytorch_lora_weights.safetensors`, whole or not at all; its path.

    Keys are `transformer.<module>.lora_A.weight` (rank, in) and `.lora_B.weight` (out, rank), `unet.` for SDXL, written
    by diffusers itself with the LoraConfig as metadata. The scale alpha / rank lies in lora_B and the metadata says
    alpha = rank, since programs that read no metadata take the scale to be 1. UserError for a family whose stock
    pipeline loads no LoRA, and for a disk that is full.
    """
    import diffusers

    backbone = roles.backbone
    name: str = backbone.pipeline  # type: ignore[attr-defined]
    part: str = getattr(backbone, "network_part", "transformer")
    pipeline: Any = getattr(diffusers, name)
    if not hasattr(pipeline, "save_lora_weights"):
        raise UserError(f"{name} of diffusers loads no LoRA: export the merged model instead")
    config = backbone.transformer.peft_config["ema"].to_dict()  # type: ignore[index,operator,union-attr]
    scale = config["lora_alpha"] / config["r"]
    metadata = config | {"lora_alpha": config["r"], "target_modules": sorted(config["target_modules"])}
    tensors = {
        key: (value * scale if ".lora_B." in key else value).to("cpu", dtype).contiguous()
        for key, value in roles.average.items()
    }
    folder = Path(folder)
    partial, final = folder / ".partial-lora", folder / FILE
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        pipeline.save_lora_weights(
            partial, **{f"{part}_lora_layers": tensors, f"{part}_lora_adapter_metadata": metadata}
        )
        (partial / FILE).replace(final)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot save {final} ({error}): free some space and export again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def stock_scheduler_config(
    settings_or_times: Settings | Sequence[float] | Tensor, time_shift: float = 1.0
) -> dict[str, Any]:
    """What stock diffusers needs to sample as we do with kappa = rho = 0, and no code of ours.

    Takes a grid (steps + 1,) of times that ends at 0, or a model's `Settings`: their `times`, else a plain grid of
    their `steps`, shifted by the backbone's `time_shift`. Returns {"scheduler": the config of a
    FlowMatchEulerDiscreteScheduler that shifts nothing, "sigmas": what to pass to the pipeline's call, (steps,)}: its
    Euler step `x_t + (t_next - t) F` is Eq. (20) with both estimates of Eq. (3). ValueError for times that are no grid.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    given: Any = settings_or_times
    if isinstance(settings_or_times, Settings):
        settings = settings_or_times
        own = settings.times is not None and len(settings.times) == settings.steps + 1
        given = settings.times if own else shift_times(time_grid(settings.steps), time_shift)
    times = torch.as_tensor(given, dtype=torch.float64)
    check_times(times)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False, shift_terminal=None)
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    config |= {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    return {"scheduler": config, "sigmas": times[:-1].tolist()}
