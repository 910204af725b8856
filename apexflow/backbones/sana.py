"""SANA (Xie et al., 2024): linear-attention transformer on deep-compression latents, Gemma-2 text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from apexflow.backbones import Settings
from apexflow.backbones.family import Backbone, stock_parameters
from apexflow.backbones.precision import compute_dtype
from apexflow.backbones.text import tokenize, unknown_words
from apexflow.conditioning import Condition
from apexflow.errors import UserError


class Sana(Backbone):
    """A `SanaPipeline` folder. The raw output already is z - x and time goes in as 1000 t in float32."""

    family: ClassVar[str] = "sana"
    guided_at_once: ClassVar[bool] = True  # the text is cross-attended, and its padding costs little
    pipeline: str = "SanaPipeline"
    defaults: ClassVar[Settings] = Settings(guidance=4.5)
    lora_targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point")
    depth: str | None = "num_layers"
    bfloat16: ClassVar[bool] = False  # but for those called BF16, published weights were trained in float16

    @classmethod
    def classes(cls) -> dict[str, Any]:
        from diffusers import AutoencoderDC, SanaTransformer2DModel
        from transformers import AutoTokenizer, Gemma2Model

        return {
            "transformer": SanaTransformer2DModel,
            "vae": AutoencoderDC,
            "text_encoder": Gemma2Model,
            "tokenizer": AutoTokenizer,
        }

    @property
    def text_width(self) -> tuple[int, int | None]:
        return self.config.caption_channels, None

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """F(x_t, t, c) with x_t (B, C, h, w), answered in the dtype of x_t."""
        dtype = compute_dtype(network)
        F = network(
            hidden_states=x_t.to(dtype),
            encoder_hidden_states=c.embeds.to(dtype),
            encoder_attention_mask=c.mask,
            return_dict=False,
            **self.inputs(t),
        )[0]
        return F.to(x_t.dtype)

    def inputs(self, t: Tensor) -> dict[str, Tensor | None]:
        """What the network takes beside latents and text, for times (B,)."""
        return {"timestep": 1000.0 * t.float() * self.config.timestep_scale}

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
        ids, mask = tokenize(self.text_encoder, self.tokenizer, texts, length, kept=limit)
        embeds = self.text_encoder(ids, attention_mask=mask)[0]
        if prefix:
            keep = [0, *range(length - limit + 1, embeds.shape[1])]  # of a batch of empty prompts, BOS alone
            embeds, mask = embeds[:, keep], mask[:, keep]
        return Condition(embeds, mask)

    @cached_property
    def _instruction(self) -> str:
        """The stock pipeline's "complex human instruction", read from its own default."""
        return "\n".join(stock_parameters(self.pipeline)["complex_human_instruction"].default)

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
    def factor(self) -> int:
        return 2 ** (len(self.vae_config.encoder_block_out_channels) - 1)

    @property
    def patch(self) -> int:
        return self.config.patch_size

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """(C, h, w) for pictures of `size` (height, width) in pixels; UserError for one that the model cannot take."""
        shape = super().latent_shape(size)
        if self.config.interpolation_scale is not None and max(size) != min(size):
            raise UserError(f"size {size[1]}x{size[0]} does not fit this model: its position embedding is square")
        return shape

    def stock_options(self, settings: Settings) -> dict[str, Any]:
        plain: dict[str, Any] = {} if settings.instruction else {"complex_human_instruction": None}
        return super().stock_options(settings) | plain | {"use_resolution_binning": False}
