"""Qwen-Image (Wu et al., 2025): 20B double-stream transformer on packed latents, Qwen2.5-VL text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apexflow.backbones import Settings
from apexflow.backbones.family import Backbone, pack, unpack
from apexflow.backbones.lora_targets import JOINT_ATTENTION
from apexflow.backbones.precision import compute_dtype, running_dtype
from apexflow.backbones.text import is_null, tokenize, unless_full
from apexflow.conditioning import Condition, guide_at_length


class QwenImage(Backbone):
    """A `QwenImagePipeline` folder. The raw output is z - x on 2 x 2 packed latents; time goes in as t in [0, 1].

    The network casts t to the dtype of its activations before the sinusoid: in bf16, times near 1 lie 2^-8 apart.
    The published scheduler also stretches its times so that the last is .02 (`shift_terminal`); our grid is not stretched.
    """

    family: ClassVar[str] = "qwen-image"
    pipeline = "QwenImagePipeline"
    defaults: ClassVar[Settings] = Settings(steps=50, guidance=4.0, instruction=False, max_tokens=512)
    # Attention and both feed-forwards of every block: the paper's 0.2B at r = 32 and 0.4B at r = 64.
    lora_targets: Sequence[str] = (
        *JOINT_ATTENTION,
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
    normalizes_text = True
    depth = "num_layers"

    def __init__(self, parts: dict[str, Any], settings: Settings) -> None:
        super().__init__(parts, settings)
        # The text stream ends with the last block: what it computes there is dropped.
        last = f"transformer_blocks.{self.config.num_layers - 1}"
        self.without_gradient = (f"{last}.attn.to_add_out.", f"{last}.txt_mlp.")

    def stock_options(self, settings: Settings) -> dict[str, Any]:
        """Without a negative prompt the scale is not heard."""
        options, guided = super().stock_options(settings), settings.guidance != 1
        scale = {"true_cfg_scale": options.pop("guidance_scale")}
        return options | scale | ({"negative_prompt": " "} if guided else {})

    @classmethod
    def classes(cls) -> dict[str, Any]:
        from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

        return {
            "transformer": QwenImageTransformer2DModel,
            "vae": AutoencoderKLQwenImage,
            "text_encoder": Qwen2_5_VLForConditionalGeneration,
            "tokenizer": AutoTokenizer,
        }

    @property
    def text_width(self) -> tuple[int, int | None]:
        return self.config.joint_attention_dim, None

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """F(x_t, t, c) with x_t (B, 16, h, w), answered in the dtype of x_t."""
        dtype = compute_dtype(network)
        rows, _, height, width = x_t.shape
        F = network(
            hidden_states=pack(x_t.to(dtype)),
            timestep=t.float(),
            encoder_hidden_states=c.embeds.to(dtype),
            encoder_hidden_states_mask=unless_full(c.mask),
            img_shapes=[[(1, height // 2, width // 2)]] * rows,
            return_dict=False,
        )[0]
        return unpack(F, height, width).to(x_t.dtype)

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """One answer of two (B, 16, h, w): the line through both, each token as long as the conditional one's."""
        return unpack(guide_at_length(pack(conditional), pack(unconditional), scale), *conditional.shape[-2:])

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Qwen2.5-VL's last hidden states in the stock template, whose opening tokens are dropped after encoding.

        The null prompt is a single blank, as the model's makers recommend. The language head is never run.
        """
        template, opening = self._template
        texts = [template.format(" " if is_null(prompt) else prompt) for prompt in prompts]
        kept = self.settings.max_tokens
        ids, mask = tokenize(self.text_encoder, self.tokenizer, texts, opening + kept, kept=kept)
        states = self.text_encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return Condition(states[:, opening:], unless_full(mask[:, opening:]))

    @cached_property
    def _template(self) -> tuple[str, int]:
        """The stock pipeline's prompt template and how many tokens its opening has."""
        from diffusers import QwenImagePipeline

        stock: Any = QwenImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=None)
        return stock.prompt_template_encode, stock.prompt_template_encode_start_idx

    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to latents (B, 16, h, w) in float32, normalised by channel; the mode."""
        frames = images.to(next(self.vae.parameters())).unsqueeze(2)
        latents = self.vae.encode(frames).latent_dist.mode().squeeze(2).float()
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 16, h, w) to pictures (B, 3, H, W), clamped to [-1, 1], in float32."""
        mean, std = self._statistics(latents)
        frames = (latents * std + mean).to(next(self.vae.parameters())).unsqueeze(2)
        return self.vae.decode(frames).sample.squeeze(2).float().clamp(-1, 1)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel, (1, C, 1, 1)."""
        config = self.vae.config
        mean, std = torch.tensor([config.latents_mean, config.latents_std]).to(like).view(2, 1, -1, 1, 1)
        return mean, std

    @property
    def factor(self) -> int:
        return 2 ** len(self.vae_config.temperal_downsample)

    @property
    def channels(self) -> int:
        return self.config.in_channels // 4

    def round_time(self, t: Tensor) -> Tensor:
        """t in the half precision of the network's activations, if it runs in one: so it enters the time embedding."""
        dtype = running_dtype(self.transformer)
        return t if dtype.itemsize > 2 else t.to(dtype).to(t)
