"""Stable Diffusion 3 and 3.5 (Esser et al., 2024): MMDiT on unpacked latents, two CLIPs and T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apexflow.backbones import Settings
from apexflow.backbones.family import Backbone
from apexflow.backbones.lora_targets import JOINT_ATTENTION
from apexflow.backbones.precision import compute_dtype
from apexflow.backbones.text import clip_states, t5_states
from apexflow.conditioning import Condition

CLIP_TOKENS = 77  # of both CLIPs, whatever the prompt; they stand before T5's


class StableDiffusion3(Backbone):
    """A `StableDiffusion3Pipeline` folder. The raw output is z - x; time goes in as 1000 t in float32.

    All text tokens are attended, padding too, so conditions carry no mask and one given is not read.
    """

    family: ClassVar[str] = "sd3"
    guided_at_once: ClassVar[bool] = True  # every text has as many tokens
    pipeline = "StableDiffusion3Pipeline"
    defaults: ClassVar[Settings] = Settings(steps=28, guidance=7.0, instruction=False, max_tokens=256)
    lora_targets: Sequence[str] = JOINT_ATTENTION

    @classmethod
    def classes(cls) -> dict[str, Any]:
        from diffusers import AutoencoderKL, SD3Transformer2DModel
        from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

        return {
            "transformer": SD3Transformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModelWithProjection,
            "text_encoder_2": CLIPTextModelWithProjection,
            "text_encoder_3": T5EncoderModel,
            "tokenizer": AutoTokenizer,
            "tokenizer_2": AutoTokenizer,
            "tokenizer_3": AutoTokenizer,
        }

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """F(x_t, t, c) with x_t (B, 16, h, w), answered in the dtype of x_t; c needs pooled embeddings."""
        if c.pooled is None:
            raise ValueError("Stable Diffusion 3 needs a condition with pooled embeddings")
        dtype = compute_dtype(network)
        F = network(
            hidden_states=x_t.to(dtype),
            timestep=1000.0 * t.float(),
            encoder_hidden_states=c.embeds.to(dtype),
            pooled_projections=c.pooled.to(dtype),
            return_dict=False,
        )[0]
        return F.to(x_t.dtype)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Both CLIPs side by side, widened by zeros to T5's width, then T5 (B, 77 + max_tokens, D); both pooled.

        The null prompt is the empty text.
        """
        texts = list(prompts)
        states, pooled = zip(
            clip_states(self.encoder("text_encoder"), self.tokenizers["tokenizer"], texts),
            clip_states(self.encoder("text_encoder_2"), self.tokenizers["tokenizer_2"], texts),
            strict=True,
        )
        limit = self.settings.max_tokens
        t5 = t5_states(self.encoder("text_encoder_3"), self.tokenizers["tokenizer_3"], texts, limit)
        clip = torch.cat(states, -1)
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return Condition(torch.cat([clip, t5], 1), pooled=torch.cat(pooled, -1))

    @property
    def most_tokens(self) -> int:
        return CLIP_TOKENS + self.settings.max_tokens

    @property
    def max_tokens_a_side(self) -> int | None:
        return self.config.pos_embed_max_size
