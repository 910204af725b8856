"""The same noise through a stock pipeline and through our own sampler."""

from __future__ import annotations

from dataclasses import replace

import torch
from stock import OPTIONS, latents_of, noise_for
from torch import Tensor

from apexflow.backbones import Backbone, load_backbone
from apexflow.sampler import sample

FAMILIES = ("sana", "qwen_image", "sd3", "flux_schnell", "flux_dev", "flux2", "z_image", "lumina2")
PROMPTS = ["a red cube", "a cat on a mat"]
SIZE = (32, 64)


def student(folder_of, name, tmp_path, **settings):
    """A model folder that says how it is sampled, as a run leaves it."""
    backbone = load_backbone(str(folder_of(name)))
    folder = tmp_path / "student"
    backbone.save(folder, replace(backbone.settings, guidance=1.0, **settings))
    return folder


def call_of(result):
    """The options of a call that are not already those of `stock_latents`."""
    keep = ("sigmas", "true_cfg_scale", "guidance_scale", "negative_prompt")
    return {name: value for name, value in result["call"].items() if name in keep}


def noise(backbone: Backbone, seed: int = 0) -> Tensor:
    """(2, C, h, w) standard normal."""
    shape = backbone.latent_shape(SIZE)
    return torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stock_latents(name: str, pipeline: object, z: Tensor, steps: int, **more: object) -> Tensor:
    """Latents like `z` after `steps` steps of a stock pipeline, unguided, with its own sigmas unless `more` has some."""
    options = {key: value for key, value in OPTIONS[name].items() if key != "sigmas"} | more
    answer = pipeline(
        prompt=list(PROMPTS),
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=steps,
        latents=noise_for(name, z),
        output_type="latent",
        **options,
    ).images
    return latents_of(name, pipeline, answer, z)


@torch.no_grad()
def our_latents(backbone: Backbone, z: Tensor, times: Tensor, **more: object) -> Tensor:
    """The same by `apexflow.sampler.sample`."""
    c = backbone.encode_prompts(PROMPTS)
    return sample(lambda x_t, t: backbone.velocity(backbone.transformer, x_t, t, c), z, times, **more)
