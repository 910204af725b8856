"""SANA (Xie et al., 2024): linear-attention transformer on deep-compression latents, Gemma-2 text."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apexflow.backbones import Settings, read_settings
from apexflow.backbones.encoders import Encoders
from apexflow.backbones.parts import (
    Later,
    autoencoder_dtype,
    compute_dtype,
    load_part,
    load_scheduler,
    save_folder,
    scheduler_shift,
)
from apexflow.backbones.text import device_of, tokenize, unknown_words
from apexflow.conditioning import Condition
from apexflow.errors import UserError
from apexflow.transport import LINEAR, Transport


class Sana(Encoders):
    """A `SanaPipeline` folder. The raw output already is z - x and time goes in as 1000 t in float32."""

    family: ClassVar[str] = "sana"
    pipeline: str = "SanaPipeline"
    defaults: ClassVar[Settings] = Settings(guidance=4.5)
    transport: Transport = LINEAR
    lora_targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point")
    without_gradient: Sequence[str] = ()
    shift_defaults: tuple[float, float] = (-0.5, 1.0)
    normalizes_text: bool = False
    flow_scheduler: bool = True
    depth: str | None = "num_layers"
    bfloat16: ClassVar[bool] = False  # but for those called BF16, published weights were trained in float16

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        settings: Settings,
    ) -> None:
        super().__init__({"vae": vae, "text_encoder": text_encoder})
        self.transformer = transformer
        self.tokenizer, self.scheduler, self.settings = tokenizer, scheduler, settings
        self.tokenizer.padding_side = "right"
        tokens = (self.default_size // self._factor // transformer.config.patch_size) ** 2
        self.time_shift = scheduler_shift(scheduler.config, tokens)

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype, hollow: bool = False) -> Sana:
        """Read the parts of a diffusers folder; UserError names the part that is missing or damaged."""
        from diffusers import AutoencoderDC, SanaTransformer2DModel
        from transformers import AutoTokenizer, Gemma2Model

        transformer = load_part(folder, "transformer", SanaTransformer2DModel, device, dtype, hollow)
        vae = Later(folder, "vae", AutoencoderDC, device, autoencoder_dtype(dtype))
        text_encoder = Later(folder, "text_encoder", Gemma2Model, device, dtype)
        tokenizer = load_part(folder, "tokenizer", AutoTokenizer, device)
        settings = read_settings(folder, cls.defaults)
        return cls(transformer, vae, text_encoder, tokenizer, load_scheduler(folder), settings)

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def text_width(self) -> tuple[int, int | None]:
        return self.transformer.config.caption_channels, None

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """F(x_t, t, c) with x_t (B, C, h, w), answered in the dtype of x_t."""
        dtype = compute_dtype(network)
        F = network(
            hidden_states=x_t.to(dtype),
            encoder_hidden_states=c.embeds.to(dtype),
            encoder_attention_mask=c.mask,
            timestep=1000.0 * t.float() * self.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return F.to(x_t.dtype)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Gemma's last hidden states, padded to the longest prompt of the batch only.

        With an instruction, BOS and the last `max_tokens - 1` positions of instruction and prompt, padded to the most that
        both may have, are kept, as in the stock pipeline: all of the prompt, and of the instruction its last token. The
        stock pipeline masks the padding; leaving it out gives the same answers.
        """
        prefix = self._instruction if self.settings.instruction else ""
        texts = [prefix + prompt.strip().lower() if prompt.strip() else "" for prompt in prompts]
        limit = self.settings.max_tokens
        length = len(self.tokenizer.encode(prefix)) + limit - 2 if prefix else limit
        ids, mask = (part.to(device_of(self.text_encoder)) for part in tokenize(self.tokenizer, texts, length))
        embeds = self.text_encoder(ids, attention_mask=mask)[0]
        if prefix:
            keep = [0, *range(length - limit + 1, embeds.shape[1])]  # of a batch of empty prompts, BOS alone
            embeds, mask = embeds[:, keep], mask[:, keep]
        return Condition(embeds, mask)

    @cached_property
    def _instruction(self) -> str:
        """The stock pipeline's "complex human instruction", read from its own default."""
        import diffusers

        stock = getattr(diffusers, self.pipeline)
        return "\n".join(inspect.signature(stock.__call__).parameters["complex_human_instruction"].default)

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        """Prompts in which every token is the unknown token."""
        return unknown_words(self.tokenizer, [prompt.lower() for prompt in prompts])

    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to latents (B, C, h, w), scaled by the autoencoder's factor."""
        images = images.to(next(self.vae.parameters()))
        return self.vae.encode(images).latent.float() * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pictures (B, 3, H, W), clamped to [-1, 1], in float32."""
        latents = (latents / self.vae.config.scaling_factor).to(next(self.vae.parameters()))
        return self.vae.decode(latents).sample.float().clamp(-1, 1)

    @property
    def default_size(self) -> int:
        return self.settings.size or self.transformer.config.sample_size * self._factor

    @property
    def _factor(self) -> int:
        return 2 ** (len(self.vae_config.encoder_block_out_channels) - 1)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        multiple = self._factor * self.transformer.config.patch_size
        if min(size) <= 0 or any(side % multiple for side in size):
            raise UserError(
                f"size {size[0]}x{size[1]} does not fit this model: both sides must be multiples of {multiple}"
            )
        if self.transformer.config.interpolation_scale is not None and max(size) != min(size):
            raise UserError(f"size {size[0]}x{size[1]} does not fit this model: its position embedding is square")
        return (self.transformer.config.in_channels, size[0] // self._factor, size[1] // self._factor)

    def round_time(self, t: Tensor) -> Tensor:
        """SANA feeds its time embedding in float32: nothing to round."""
        return t

    def save(self, folder: Path, settings: Settings) -> None:
        """Write the diffusers folder of `pipeline`, with `settings` beside it."""
        parts = {"transformer": self.transformer, "tokenizer": self.tokenizer, "scheduler": self.scheduler}
        save_folder(folder, self.pipeline, parts | self.encoders_to_save(), settings)
