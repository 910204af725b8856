"""LoRA files as stock diffusers writes them: of the averaged adapter, or of any pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apexflow.backbones.lora_targets import target_modules
from apexflow.errors import UserError
from apexflow.files import replacing
from apexflow.lora.merge import FILE, Pair

if TYPE_CHECKING:
    from apexflow.backbones import Backbone
    from apexflow.training.adapters import LoraRoles


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
    check_loadable(backbone)
    config = backbone.transformer.peft_config["ema"].to_dict()  # type: ignore[index,operator,union-attr]
    scale = config["lora_alpha"] / config["r"]
    metadata = config | {"lora_alpha": config["r"], "target_modules": sorted(config["target_modules"])}
    tensors = {
        key: value * scale if ".lora_B." in key else value
        for key, value in roles.average.items()
        if ".lora_" in key  # a second time is none: at s = 0, where stock pipelines ask, it adds nothing
    }
    return _write(backbone, tensors, Path(folder), metadata)


def save_pairs(pairs: Mapping[str, Pair], backbone: Backbone, folder: Path) -> Path:
    """Write pairs to `folder/pytorch_lora_weights.safetensors`, whole or not at all; its path.

    Each scale lies in lora_B, and no metadata is needed: without any the scale is 1 to every program, and diffusers reads ranks,
    which may differ, from the shapes. Where the pairs are all that a run would tune, it names the targets as a run's does, by
    which a model with more layers is told from theirs.
    """
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"{module}.lora_A.weight"] = pair.down.clone()  # those of fused projections are one tensor
        tensors[f"{module}.lora_B.weight"] = pair.up.float() * pair.scale
    ranks = {len(pair.down) for pair in pairs.values()}
    if pairs.keys() != target_modules(backbone).keys() or len(ranks) != 1:
        return _write(backbone, tensors, folder)
    [rank] = ranks
    metadata = {"r": rank, "lora_alpha": rank, "target_modules": sorted(backbone.lora_targets)}
    return _write(backbone, tensors, folder, metadata)


def check_loadable(backbone: Backbone) -> None:
    """UserError for a family whose stock pipeline loads no LoRA."""
    if not is_loadable(backbone):
        raise UserError(f"diffusers' {backbone.pipeline} cannot load a LoRA: export the full model instead")


def _write(backbone: Backbone, tensors: Mapping[str, Tensor], folder: Path, metadata: Any = None) -> Path:
    final, part = folder / FILE, backbone.network_part
    plain = {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    named = {f"{part}_lora_layers": plain, f"{part}_lora_adapter_metadata": metadata}
    with replacing(final, "free some space and export again") as partial:
        _pipeline(backbone).save_lora_weights(partial.parent, weight_name=partial.name, **named)
    return final
