"""Whether a model has room on a card to draw, and how it draws where it has not: text encoder and denoiser take turns there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from itertools import chain

import torch

from apexflow.backbones import Backbone
from apexflow.conditioning import Condition, join

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
    """Prompts to conditions on `device`, from which the denoiser goes while the text encoder is there.

    What was encoded last waits in main memory, with the null prompt: prompts that are told `ahead` take one turn together.
    """

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        self.backbone, self.device = backbone, device
        self.known: dict[str, Condition] = {}

    def __call__(self, prompts: Sequence[str]) -> Condition:
        self.ahead(prompts)
        return reduce(join, (self.known[prompt] for prompt in prompts)).to(self.device)

    def ahead(self, prompts: Sequence[str]) -> None:
        """Encode what is not known of `prompts`, in one turn; others are forgotten then."""
        wanted = dict.fromkeys(["", *prompts])
        if wanted.keys() <= self.known.keys():
            return
        self.known = {prompt: c for prompt, c in self.known.items() if prompt in wanted}
        backbone = self.backbone
        backbone.transformer.to("cpu")
        try:
            backbone.text_encoder.to(self.device)
            for prompt in [prompt for prompt in wanted if prompt not in self.known]:
                self.known[prompt] = backbone.encode_prompts([prompt]).to("cpu")
        finally:
            backbone.text_encoder.to("cpu")
            backbone.transformer.to(self.device)
