"""Z-Image and Z-Image-Turbo (Tongyi-MAI, 2025): single-stream transformer on lists of latents, Qwen3 text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from apexflow.backbones import Settings, read_settings
from apexflow.backbones.family import Backbone
from apexflow.backbones.precision import compute_dtype
from apexflow.backbones.text import chat, decoder_states, rows_of
from apexflow.conditioning import Condition

TURBO, TURBO_SHIFT = Settings(steps=8, instruction=False, max_tokens=512), 3.0


class ZImage(Backbone):
    """A `ZImagePipeline` folder. The network takes 1 - t in float32 and answers x - z: both are turned.

    The base model's stock guidance of 5 adds 5 (F(c) - F(null)), which is scale 6 here. Turbo, known by its scheduler's shift
    of 3 (the base model's is 6), takes 8 steps without guidance.
    """

    family: ClassVar[str] = "z-image"
    pipeline = "ZImagePipeline"
    defaults: ClassVar[Settings] = Settings(steps=50, guidance=6.0, instruction=False, max_tokens=512)
    lora_targets: Sequence[str] = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    )
    normalizes_text = True
    depth = "n_layers"

    @classmethod
    def classes(cls) -> dict[str, Any]:
        from diffusers import AutoencoderKL, ZImageTransformer2DModel
        from transformers import AutoTokenizer, Qwen3Model

        return {
            "transformer": ZImageTransformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": Qwen3Model,
            "tokenizer": AutoTokenizer,
        }

    @classmethod
    def of_parts(cls, parts: dict[str, Any], folder: Path) -> Self:
        turbo = parts["scheduler"].config.get("shift") == TURBO_SHIFT
        return cls(parts, read_settings(folder, TURBO if turbo else cls.defaults))

    def stock_options(self, settings: Settings) -> dict[str, Any]:
        """The pipeline adds its scale times the difference to the conditional answer."""
        return super().stock_options(settings) | {"guidance_scale": settings.guidance - 1}

    @property
    def text_width(self) -> tuple[int, int | None]:
        return self.config.cap_feat_dim, None

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """F(x_t, t, c) with x_t (B, 16, h, w), answered in the dtype of x_t."""
        dtype = compute_dtype(network)
        pictures = list(x_t.to(dtype).unsqueeze(2).unbind(0))  # (16, 1, h, w) each
        answers = network(pictures, 1 - t.float(), rows_of(c.embeds.to(dtype), c.mask), return_dict=False)[0]
        return -torch.stack(answers).squeeze(2).to(x_t.dtype)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Qwen3's last hidden states but one in its chat template; the null prompt is the empty message."""
        texts = chat(self.tokenizer, prompts, thinking=True)
        return Condition(*decoder_states(self.text_encoder, self.tokenizer, texts, self.settings.max_tokens))

    @property
    def max_tokens_a_side(self) -> int | None:
        return min(self.config.axes_lens[1:])
