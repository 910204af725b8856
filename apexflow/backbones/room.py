"""Whether a model has room on a card to draw, and how it draws where it has not: text encoder and denoiser take turns there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from apexflow.backbones import Backbone, resolve
from apexflow.backbones.storage import Kind, bytes_a_weight
from apexflow.backbones.weights import weight_shapes
from apexflow.conditioning import Condition

DENOISERS, PARTS = ("transformer", "unet"), ("transformer", "unet", "text_encoder", "vae")
SPARE = 0.15  # of what is free: for what the layers answer


def has_room(path_or_id: str, device: torch.device, dtype: torch.dtype, storage: Kind | None) -> bool:
    """Whether all networks of a model fit on `device` at once, the denoiser in `storage`; of a CPU it is taken for granted."""
    if device.type != "cuda":
        return True
    return weight_bytes(resolve(path_or_id), dtype, storage) <= (1 - SPARE) * torch.cuda.mem_get_info(device)[0]


def weight_bytes(folder: Path, dtype: torch.dtype, storage: Kind | None = None) -> float:
    """What the networks of a diffusers folder take in `dtype`, from the headers of their files; UserError for a damaged one."""
    parts = [part for part in sorted(folder.glob("*")) if part.is_dir() and part.name.startswith(PARTS)]
    return sum(
        sum(map(math.prod, weight_shapes(part).values()))
        * bytes_a_weight(storage if part.name in DENOISERS else None, dtype)
        for part in parts
    )


class InTurn:
    """Prompts to conditions on `device`, from which the denoiser goes while the text encoder is there."""

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        self.backbone, self.device = backbone, device
        self.null: Condition | None = None

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """The null condition is kept, so that a guided picture takes one turn."""
        nothing = list(prompts) == [""]
        if nothing and self.null is not None:
            return self.null
        backbone = self.backbone
        backbone.transformer.to("cpu")
        try:
            backbone.text_encoder.to(self.device)
            self.null = backbone.encode_prompts([""]) if self.null is None else self.null
            return self.null if nothing else backbone.encode_prompts(prompts)
        finally:
            backbone.text_encoder.to("cpu")
            backbone.transformer.to(self.device)
