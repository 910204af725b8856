"""Whether a model has room on a card to draw, and how it draws where it has not: text encoder and denoiser take turns there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch

from apexflow.backbones import Backbone
from apexflow.conditioning import Condition

SPARE = 0.15  # of what is free: for what the layers answer


def room_on(device: torch.device) -> float:
    """How many bytes of networks `device` has room for: of a GPU what is free, or what torch keeps for later; of a CPU no end."""
    if device.type != "cuda":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (1 - SPARE) * (torch.cuda.mem_get_info(device)[0] + kept)


def weight_bytes(backbone: Backbone) -> int:
    """What the networks of a model take: the denoiser as it is stored now, text encoders and autoencoder as they are read."""
    network = backbone.transformer
    return sum(tensor.nbytes for tensor in chain(network.parameters(), network.buffers())) + backbone.encoder_bytes


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
