"""What a file of SDXL holds beside its U-Net: both text encoders, which many tunes have changed, and the autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

PREFIXES = {
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}


def encoders_in(names: Iterable[str], network_part: str) -> dict[str, str]:
    """The prefix of each encoder of SDXL, the family with a U-Net, that is in a file of these names."""
    given = list(names) if network_part == "unet" else []
    return {part: prefix for part, prefix in PREFIXES.items() if any(name.startswith(prefix) for name in given)}


def encoder_converter(part: str, network: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """What brings an encoder's names into those of the published folder."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_open_clip_checkpoint

    prefix = PREFIXES[part]

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if part == "text_encoder":
            return dict(tensors)
        given = {prefix + name: tensor for name, tensor in tensors.items()}
        if part == "vae":
            return convert_ldm_vae_checkpoint(given, network.config)
        return convert_open_clip_checkpoint(network, given, prefix)

    return convert


def as_published(part: str, name: str) -> str:
    """A weight's name in published folders: newer versions of transformers have one level less in a text encoder."""
    bare = part == "text_encoder" and not name.startswith("text_model.")
    return f"text_model.{name}" if bare else name
