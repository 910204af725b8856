"""The averaged adapter as a diffusers LoRA file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apexflow.errors import UserError
from apexflow.files import replacing

if TYPE_CHECKING:
    from apexflow.backbones import Backbone
    from apexflow.training.adapters import LoraRoles

FILE = "pytorch_lora_weights.safetensors"


def is_loadable(backbone: Backbone) -> bool:
    """Whether the stock pipeline of a family loads a LoRA."""
    return hasattr(_pipeline(backbone), "save_lora_weights")


def _pipeline(backbone: Backbone) -> Any:
    import diffusers

    return getattr(diffusers, backbone.pipeline)


@torch.no_grad()
def save_lora(roles: LoraRoles, folder: Path) -> Path:
    """Write the averaged adapter to `folder/pytorch_lora_weights.safetensors`, whole or not at all; its path.

    Keys are `transformer.<module>.lora_A.weight` (rank, in) and `.lora_B.weight` (out, rank), `unet.` for SDXL, written
    by diffusers itself with the LoraConfig as metadata. The scale alpha / rank lies in lora_B and the metadata says
    alpha = rank, since programs that read no metadata take the scale to be 1. UserError for a family whose stock
    pipeline loads no LoRA, and for a disk that is full.
    """
    backbone = roles.backbone
    pipeline = _pipeline(backbone)
    part = backbone.network_part
    if not is_loadable(backbone):
        raise UserError(f"{pipeline.__name__} of diffusers loads no LoRA: export the merged model instead")
    config = backbone.transformer.peft_config["ema"].to_dict()  # type: ignore[index,operator,union-attr]
    scale = config["lora_alpha"] / config["r"]
    metadata = config | {"lora_alpha": config["r"], "target_modules": sorted(config["target_modules"])}
    tensors = {
        key: (value * scale if ".lora_B." in key else value).to("cpu", torch.float32).contiguous()
        for key, value in roles.average.items()
        if ".lora_" in key  # a second time is none: at s = 0, where stock pipelines ask, it adds nothing
    }
    final = Path(folder) / FILE
    named = {f"{part}_lora_layers": tensors, f"{part}_lora_adapter_metadata": metadata}
    with replacing(final, "free some space and export again") as partial:
        pipeline.save_lora_weights(partial.parent, weight_name=partial.name, **named)
    return final
