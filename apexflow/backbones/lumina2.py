"""Lumina-Image 2.0 (Qin et al., 2025): joint transformer on unpacked latents, Gemma-2 text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from apexflow.backbones import Settings
from apexflow.backbones.family import Backbone
from apexflow.backbones.precision import compute_dtype
from apexflow.backbones.text import decoder_states, is_null
from apexflow.conditioning import Condition, guide_at_length, mask_of


class Lumina2(Backbone):
    """A `Lumina2Pipeline` folder. The network takes 1 - t in float32 and answers x - z: both are turned."""

    family: ClassVar[str] = "lumina2"
    pipeline = "Lumina2Pipeline"
    defaults: ClassVar[Settings] = Settings(steps=30, guidance=4.0, max_tokens=256)
    lora_targets: Sequence[str] = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3"),
    )
    normalizes_text = True
    depth = "num_layers"

    @classmethod
    def classes(cls) -> dict[str, Any]:
        from diffusers import AutoencoderKL, Lumina2Transformer2DModel
        from transformers import AutoTokenizer, Gemma2Model

        return {
            "transformer": Lumina2Transformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": Gemma2Model,
            "tokenizer": AutoTokenizer,
        }

    @property
    def text_width(self) -> tuple[int, int | None]:
        return self.config.cap_feat_dim, None

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """F(x_t, t, c) with x_t (B, 16, h, w), answered in the dtype of x_t."""
        dtype = compute_dtype(network)
        answer = network(
            hidden_states=x_t.to(dtype),
            timestep=1 - t.float(),
            encoder_hidden_states=c.embeds.to(dtype),
            encoder_attention_mask=mask_of(c).long(),  # summed to lengths inside
            return_dict=False,
        )[0]
        return -answer.to(x_t.dtype)

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """One answer of two (B, 16, h, w): the line through both, each row of a channel as long as the conditional one's."""
        return guide_at_length(conditional, unconditional, scale)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Gemma's last hidden states but one, with the stock system text before every prompt but the null prompt."""
        opening = self._opening if self.settings.instruction else ""
        texts = ["" if is_null(prompt) else opening + prompt for prompt in prompts]
        return Condition(*decoder_states(self.text_encoder, self.tokenizer, texts, self.settings.max_tokens))

    @cached_property
    def _opening(self) -> str:
        """The stock pipeline's system text and the mark after it."""
        from diffusers import Lumina2Pipeline

        stock: Any = Lumina2Pipeline(transformer=None, scheduler=None, vae=None, text_encoder=None, tokenizer=None)
        return stock.system_prompt + " <Prompt Start> "

    @property
    def max_tokens_a_side(self) -> int | None:
        return min(self.config.axes_lens[1:])
