"""FLUX.1 schnell and dev (Black Forest Labs, 2024): double- and single-stream transformer, CLIP and T5 text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from apexflow.backbones import Settings, read_settings
from apexflow.backbones.family import Backbone, pack, unpack
from apexflow.backbones.lora_targets import JOINT_ATTENTION
from apexflow.backbones.precision import compute_dtype, running_dtype
from apexflow.backbones.text import clip_states, t5_states
from apexflow.conditioning import Condition

FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp")

SCHNELL = Settings(steps=4, instruction=False, max_tokens=256)


class Flux(Backbone):
    """A `FluxPipeline` folder. The raw output is z - x on 2 x 2 packed latents; time goes in as t in [0, 1].

    The network casts t to the dtype of its activations and multiplies it by 1000 there: bf16 rounds twice. The dev
    network also takes a guidance scale, `settings.embedded_guidance`, by default the stock 3.5. All text tokens are
    attended, padding too, so conditions carry no mask and one given is not read, and their number is part of the condition:
    schnell, which is the one without guidance as an input, reads 256.
    """

    family: ClassVar[str] = "flux"
    guided_at_once: ClassVar[bool] = True  # every text has as many tokens
    pipeline = "FluxPipeline"
    depth = "num_layers"
    embeds_guidance = True
    defaults: ClassVar[Settings] = Settings(steps=28, instruction=False, max_tokens=512, embedded_guidance=3.5)

    def __init__(self, parts: dict[str, Any], settings: Settings) -> None:
        super().__init__(parts, settings)
        # The output layer is called proj_out too: name those of the single blocks in full.
        single = (f"single_transformer_blocks.{i}.proj_out" for i in range(self.config.num_single_layers))
        self.lora_targets = (*JOINT_ATTENTION, *FEED_FORWARD, *single)

    @classmethod
    def classes(cls) -> dict[str, Any]:
        from diffusers import AutoencoderKL, FluxTransformer2DModel
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

        return {
            "transformer": FluxTransformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
            "text_encoder_2": T5EncoderModel,
            "tokenizer": AutoTokenizer,
            "tokenizer_2": AutoTokenizer,
        }

    @classmethod
    def of_parts(cls, parts: dict[str, Any], folder: Path) -> Self:
        defaults = cls.defaults if parts["transformer"].config.guidance_embeds else SCHNELL
        return cls(parts, read_settings(folder, defaults))

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """F(x_t, t, c) with x_t (B, 16, h, w), answered in the dtype of x_t; c needs pooled embeddings."""
        if c.pooled is None:
            raise ValueError("FLUX needs a condition with pooled embeddings")
        dtype = compute_dtype(network)
        rows, _, height, width = x_t.shape
        F = network(
            hidden_states=pack(x_t.to(dtype)),
            timestep=t.float(),
            guidance=self.guidance_input(rows, x_t.device),
            pooled_projections=c.pooled.to(dtype),
            encoder_hidden_states=c.embeds.to(dtype),
            txt_ids=torch.zeros(c.embeds.shape[1], 3, device=x_t.device),
            img_ids=positions(height // 2, width // 2, x_t.device),
            return_dict=False,
        )[0]
        return unpack(F, height, width).to(x_t.dtype)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """T5's last hidden states (B, max_tokens, D) and CLIP's pooled vector; the null prompt is the empty text."""
        texts = list(prompts)
        _, pooled = clip_states(self.encoder("text_encoder"), self.tokenizers["tokenizer"], texts)
        limit = self.settings.max_tokens
        embeds = t5_states(self.encoder("text_encoder_2"), self.tokenizers["tokenizer_2"], texts, limit)
        return Condition(embeds, pooled=pooled)

    @property
    def channels(self) -> int:
        return self.config.in_channels // 4

    def round_time(self, t: Tensor) -> Tensor:
        """t after both roundings of a network in half precision, which sees exactly 1000 times what this returns."""
        return rounded_twice(t, running_dtype(self.transformer))


def rounded_twice(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t as a network sees it that casts it to `dtype` and multiplies it by 1000 there."""
    return t if dtype.itemsize > 2 else (t.to(dtype) * 1000).to(t) / 1000


def positions(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 3): 0, row and column of each token."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    return torch.nn.functional.pad(grid, (1, 0)).float()
