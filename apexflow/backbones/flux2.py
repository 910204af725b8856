"""FLUX.2 [klein], base and distilled (Black Forest Labs, 2026): double- and single-stream transformer, Qwen3 text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from apexflow.backbones import Settings, read_settings
from apexflow.backbones.family import Backbone, stock_parameters
from apexflow.backbones.flux import positions, rounded_twice
from apexflow.backbones.folder import read_index
from apexflow.backbones.lora_targets import JOINT_ATTENTION
from apexflow.backbones.precision import compute_dtype
from apexflow.backbones.scheduler import scheduler_shift
from apexflow.backbones.text import chat, layer_states, tokenize
from apexflow.conditioning import Condition

FEED_FORWARD = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")


class Flux2Klein(Backbone):
    """A `Flux2KleinPipeline` folder. The raw output is z - x; time goes in as t in [0, 1].

    A latent is a token: 2 x 2 of the autoencoder's, normalised by the statistics of its batch norm. The network casts t to the
    dtype of its latents and multiplies it by 1000 there: bf16 rounds twice. All text tokens are attended, padding too, so
    conditions carry no mask and one given is not read. The text is projected without a bias and layer-normalised in every block:
    scaled by a positive factor, it is heard as before but for its share of the text stream. The distilled models, known by
    `is_distilled` in the index, take 4 steps without guidance. Pictures to edit are not served.
    """

    family: ClassVar[str] = "flux2-klein"
    guided_at_once: ClassVar[bool] = True  # every text has as many tokens
    pipeline = "Flux2KleinPipeline"
    depth = "num_layers"
    defaults: ClassVar[Settings] = Settings(steps=50, guidance=4.0, instruction=False, max_tokens=512, size=1024)

    def __init__(self, parts: dict[str, Any], settings: Settings, distilled: bool = False) -> None:
        """`distilled`: into few steps, with guidance in the weights."""
        self.distilled = distilled
        super().__init__(parts, settings)
        # Double blocks have a list that is called to_out too: name those of the single blocks in full.
        single = (f"single_transformer_blocks.{i}.attn.to_out" for i in range(self.config.num_single_layers))
        self.lora_targets = (*JOINT_ATTENTION, *FEED_FORWARD, "to_qkv_mlp_proj", *single)

    @classmethod
    def classes(cls) -> dict[str, Any]:
        from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
        from transformers import AutoTokenizer, Qwen3Model

        return {
            "transformer": Flux2Transformer2DModel,
            "vae": AutoencoderKLFlux2,
            "text_encoder": Qwen3Model,
            "tokenizer": AutoTokenizer,
        }

    @classmethod
    def of_parts(cls, parts: dict[str, Any], folder: Path) -> Self:
        distilled = bool(read_index(folder).get("is_distilled"))
        return cls(parts, read_settings(folder, DISTILLED if distilled else cls.defaults), distilled)

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """F(x_t, t, c) with x_t (B, 128, h, w), answered in the dtype of x_t."""
        dtype = compute_dtype(network)
        F = network(
            hidden_states=x_t.to(dtype).flatten(2).transpose(1, 2),
            timestep=t.float(),
            encoder_hidden_states=c.embeds.to(dtype),
            txt_ids=pad(torch.arange(c.embeds.shape[1], device=x_t.device)[:, None], (3, 0)),
            img_ids=pad(positions(x_t.shape[2], x_t.shape[3], x_t.device), (0, 1)),
            return_dict=False,
        )[0]
        return F.transpose(1, 2).reshape(x_t.shape).to(x_t.dtype)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Three of Qwen3's hidden states side by side (B, max_tokens, 3 D), in its chat template without thinking.

        The null prompt is the empty message. The language head is left out.
        """
        texts = chat(self.tokenizer, prompts, thinking=False)
        encoder, limit = self.text_encoder, self.settings.max_tokens
        ids, mask = tokenize(encoder, self.tokenizer, texts, limit, "max_length")
        layers = stock_parameters(self.pipeline)["text_encoder_out_layers"].default
        return Condition(torch.cat(layer_states(encoder, ids, mask, layers), -1))

    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to latents (B, 128, H/16, W/16) in float32: the mode in blocks, normalised."""
        latents = self.vae.encode(images.to(next(self.vae.parameters()))).latent_dist.mode().float()
        mean, std = self._statistics()
        return (pixel_unshuffle(latents, 2) - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 128, h, w) to pictures (B, 3, 16 h, 16 w), clamped to [-1, 1], in float32."""
        mean, std = self._statistics()
        blocks = pixel_shuffle(latents * std + mean, 2)
        return self.vae.decode(blocks.to(next(self.vae.parameters()))).sample.float().clamp(-1, 1)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel, (1, 128, 1, 1)."""
        norm = self.vae.bn
        mean, variance = (value.float().view(1, -1, 1, 1) for value in (norm.running_mean, norm.running_var))
        return mean, (variance + self.vae_config.batch_norm_eps).sqrt()

    @property
    def factor(self) -> int:
        return 2 * super().factor

    @property
    def patch(self) -> int:
        return 1

    def _scheduled_shift(self, size: tuple[int, int]) -> float:
        """A dynamic shift is the pipeline's own, and falls with the number of steps: that of the model's unasked."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        tokens = (size[0] // self.factor) * (size[1] // self.factor)
        mu = compute_empirical_mu(tokens, (DISTILLED if self.distilled else self.defaults).steps)
        return scheduler_shift({**self.scheduler.config, "base_shift": mu, "max_shift": mu}, tokens)

    def round_time(self, t: Tensor) -> Tensor:
        """t after both roundings of a network with weights in half precision; under autocast none, as it casts t to the dtype of
        the latents."""
        return rounded_twice(t, compute_dtype(self.transformer))

    def index(self) -> dict[str, Any]:
        return {"is_distilled": self.distilled}


DISTILLED = replace(Flux2Klein.defaults, steps=4, guidance=1.0)
