"""One step of a family's stock pipeline from given noise."""

from __future__ import annotations

import math
from pathlib import Path

import diffusers
import torch
from tiny import MAX_TOKENS
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from apexflow.backbones.family import pack, unpack
from apexflow.backbones.folder import read_index

PACKED = ("qwen_image", "flux_schnell", "flux_dev")
BY_TOKENS = (*PACKED, "flux2")  # what their schedulers see
PLAIN = {"sigmas": [1.0], "guidance_scale": 1.0}
EPSILON = {"guidance_scale": 1.0, "clean_caption": False, "use_resolution_binning": False}

# What the stock pipeline must be told, beside prompts, size and noise, to take one step from t = 1 without guidance.
OPTIONS = {
    "sana": PLAIN | {"use_resolution_binning": False},
    "sana_sprint": {"max_timesteps": math.pi / 2, "intermediate_timesteps": None, "use_resolution_binning": False},
    "qwen_image": {"sigmas": [1.0], "true_cfg_scale": 1.0},
    "sd3": PLAIN,
    "flux_schnell": {"sigmas": [1.0], "max_sequence_length": MAX_TOKENS["flux_schnell"]},
    "flux_dev": {"sigmas": [1.0], "guidance_scale": 3.5, "max_sequence_length": MAX_TOKENS["flux_dev"]},
    "flux2": PLAIN | {"max_sequence_length": MAX_TOKENS["flux2"]},
    "z_image": {"sigmas": [1.0], "guidance_scale": 0.0},
    "lumina2": PLAIN,
    "sdxl": {"guidance_scale": 1.0},
    "sdxl_lcm": {"guidance_scale": 8.0},
    "pixart_alpha": EPSILON,
    "pixart_sigma": EPSILON,
}


def load_stock(folder: Path) -> object:
    pipeline = getattr(diffusers, read_index(folder)["_class_name"]).from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def one_step(
    name: str, pipeline: object, prompts: list[str], z: Tensor, size: tuple[int, int], output: str, **options: object
) -> Tensor:
    """Latents like `z` (output "latent") or pictures (B, 3, H, W) in [0, 1] (output "pt") after one step from noise `z`."""
    answer = pipeline(
        prompt=list(prompts),
        height=size[0],
        width=size[1],
        num_inference_steps=1,
        latents=noise_for(name, z),
        output_type=output,
        **OPTIONS[name] | options,
    ).images
    return latents_of(name, pipeline, answer, z) if output == "latent" else answer


def noise_for(name: str, z: Tensor) -> Tensor:
    """Noise as the stock pipeline takes it."""
    return pack(z) if name in PACKED else z.clone()


def latents_of(name: str, pipeline: object, answer: Tensor, z: Tensor) -> Tensor:
    """What the stock pipeline answers as latents, in the layout and scale of the noise `z`."""
    if name == "flux2":  # answers what its autoencoder takes
        vae = pipeline.vae
        return torch.nn.functional.batch_norm(
            pixel_unshuffle(answer, 2), vae.bn.running_mean, vae.bn.running_var, eps=vae.config.batch_norm_eps
        )
    return unpack(answer, *z.shape[-2:]) if name in PACKED else answer


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Relative to the size of `b`: data predicted from pure noise by an epsilon model are some hundred times larger."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1))
