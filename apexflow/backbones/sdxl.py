"""SDXL (Podell et al., 2023) and its LCM, PCM and DMD2 descendants: an epsilon U-Net, answered as a velocity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from apexflow.backbones import Settings, read_settings
from apexflow.backbones.discrete_vp import EpsilonBackbone
from apexflow.backbones.folder import read_index
from apexflow.backbones.precision import compute_dtype
from apexflow.backbones.text import clip_states, is_null
from apexflow.conditioning import Condition


class StableDiffusionXL(EpsilonBackbone):
    """A `StableDiffusionXLPipeline` folder; `discrete_vp` says how epsilon becomes F and what happens above `t_max`.

    A U-Net that takes a guidance scale (LCM-SDXL) is fed `settings.embedded_guidance`, by default 8, and is drawn in four steps
    without other guidance. The sizes that it takes are those of the picture, uncropped. CLIP's padding is attended: conditions
    carry no mask and one given is not read.
    """

    family: ClassVar[str] = "sdxl"
    guided_at_once: ClassVar[bool] = True  # every text has as many tokens
    pipeline = "StableDiffusionXLPipeline"
    network_part: ClassVar[str] = "unet"
    defaults: ClassVar[Settings] = Settings(
        steps=50, guidance=5.0, instruction=False, max_tokens=77, embedded_guidance=8.0
    )
    # What LCM-LoRA tunes: few-step distillation moves the convolutions and time projections as well.
    lora_targets: Sequence[str] = (
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    )

    def __init__(self, parts: dict[str, Any], settings: Settings, zero_null: bool = True) -> None:
        """`zero_null`: the null condition is all zeros (SDXL base), not the encoded empty text."""
        super().__init__(parts, settings)
        self.zero_null = zero_null

    @classmethod
    def classes(cls) -> dict[str, Any]:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

        return {
            "unet": UNet2DConditionModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
            "text_encoder_2": CLIPTextModelWithProjection,
            "tokenizer": AutoTokenizer,
            "tokenizer_2": AutoTokenizer,
        }

    @classmethod
    def of_parts(cls, parts: dict[str, Any], folder: Path) -> Self:
        zero_null = bool(read_index(folder).get("force_zeros_for_empty_prompt", True))
        defaults = cls.defaults if parts["unet"].config.time_cond_proj_dim is None else LCM
        return cls(parts, read_settings(folder, defaults), zero_null)

    @property
    def text_width(self) -> tuple[int, int | None]:
        sizes = 6 * self.config.addition_time_embed_dim
        return self.config.cross_attention_dim, self.config.projection_class_embeddings_input_dim - sizes

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """F(x_t, t, c) with x_t (B, 4, h, w), answered in the dtype of x_t; c needs pooled embeddings."""
        if c.pooled is None:
            raise ValueError("SDXL needs a condition with pooled embeddings")
        dtype = compute_dtype(network)
        height, width = (side * self.factor for side in x_t.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype, device=x_t.device)
        added = {"text_embeds": c.pooled.to(dtype), "time_ids": sizes.expand(len(x_t), -1)}

        def epsilon(x_vp: Tensor, index: Tensor) -> Tensor:
            return network(
                x_vp.to(dtype),
                index.float(),
                encoder_hidden_states=c.embeds.to(dtype),
                timestep_cond=self._guidance(len(x_t), x_t.device, dtype),
                added_cond_kwargs=added,
                return_dict=False,
            )[0]

        return self.schedule.velocity(epsilon, x_t, t)

    def _guidance(self, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """The sinusoid of the embedded guidance scale less 1 (rows, width), or None if the U-Net takes none."""
        from diffusers.models.embeddings import get_timestep_embedding

        width = self.config.time_cond_proj_dim
        if width is None:
            return None
        scale = torch.full((rows,), 1000.0 * (float(self.embedded_guidance or 1) - 1), device=device)
        return get_timestep_embedding(scale, width, downscale_freq_shift=1).to(dtype)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Both CLIPs' penultimate states side by side (B, 77, D) and the larger one's pooled vector.

        The null prompt is all zeros where `zero_null`, else the empty text.
        """
        texts = list(prompts)
        first, _ = clip_states(self.encoder("text_encoder"), self.tokenizers["tokenizer"], texts)
        second, pooled = clip_states(self.encoder("text_encoder_2"), self.tokenizers["tokenizer_2"], texts)
        embeds = torch.cat([first, second], -1)
        if self.zero_null:
            kept = torch.tensor([not is_null(text) for text in texts], device=embeds.device)
            embeds, pooled = embeds * kept[:, None, None], pooled * kept[:, None]
        return Condition(embeds, pooled=pooled)

    @property
    def patch(self) -> int:
        return 1

    def stock_options(self, settings: Settings) -> dict[str, Any]:
        """A U-Net that takes the scale as an input is not guided otherwise."""
        embedded = self.config.time_cond_proj_dim is not None
        return super().stock_options(settings) | ({"guidance_scale": self.embedded_guidance} if embedded else {})

    def index(self) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": self.zero_null}


LCM = replace(StableDiffusionXL.defaults, steps=4, guidance=1.0)
