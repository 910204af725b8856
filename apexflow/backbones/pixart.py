"""PixArt-alpha and PixArt-Sigma (Chen et al., 2023, 2024): an epsilon transformer, answered as a velocity; T5 text."""

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
from apexflow.backbones.text import masked_t5_states
from apexflow.conditioning import Condition

MAX_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}


class PixArt(EpsilonBackbone):
    """A `PixArtAlphaPipeline` or `PixArtSigmaPipeline` folder; see `discrete_vp` for how epsilon becomes F.

    The variance that the network predicts beside epsilon is dropped. The alpha model for 1024 pixels also takes the
    picture's size and aspect.
    """

    family: ClassVar[str] = "pixart"
    guided_at_once: ClassVar[bool] = True  # the text is cross-attended, and its padding costs little
    pipeline = "PixArtSigmaPipeline"
    depth = "num_layers"
    defaults: ClassVar[Settings] = Settings(steps=20, guidance=4.5, instruction=False, max_tokens=300)
    lora_targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def __init__(self, parts: dict[str, Any], settings: Settings, pipeline: str = "PixArtSigmaPipeline") -> None:
        super().__init__(parts, settings)
        self.pipeline = pipeline

    @classmethod
    def classes(cls) -> dict[str, Any]:
        from diffusers import AutoencoderKL, PixArtTransformer2DModel
        from transformers import AutoTokenizer, T5EncoderModel

        return {
            "transformer": PixArtTransformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": T5EncoderModel,
            "tokenizer": AutoTokenizer,
        }

    @classmethod
    def of_parts(cls, parts: dict[str, Any], folder: Path) -> Self:
        pipeline = read_index(folder)["_class_name"]
        defaults = replace(cls.defaults, max_tokens=MAX_TOKENS[pipeline])
        return cls(parts, read_settings(folder, defaults), pipeline)

    @property
    def text_width(self) -> tuple[int, int | None]:
        return self.config.caption_channels, None

    def stock_options(self, settings: Settings) -> dict[str, Any]:
        """The pipeline would take other words and another size."""
        return super().stock_options(settings) | {"clean_caption": False, "use_resolution_binning": False}

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """F(x_t, t, c) with x_t (B, 4, h, w), answered in the dtype of x_t."""
        dtype = compute_dtype(network)
        added = self._sizes(x_t, dtype)

        def epsilon(x_vp: Tensor, index: Tensor) -> Tensor:
            answer = network(
                x_vp.to(dtype),
                encoder_hidden_states=c.embeds.to(dtype),
                encoder_attention_mask=c.mask,
                timestep=index.float(),
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
            return answer[:, : self.channels]

        return self.schedule.velocity(epsilon, x_t, t)

    def _sizes(self, x_t: Tensor, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """Height and width in pixels (B, 2) and their ratio (B, 1), for the network that takes them."""
        asked = self.config.use_additional_conditions
        if not (self.config.sample_size == 128 if asked is None else asked):
            return {"resolution": None, "aspect_ratio": None}
        height, width = (float(side * self.factor) for side in x_t.shape[-2:])
        sizes = torch.tensor([[height, width]], dtype=dtype, device=x_t.device)
        aspect = torch.tensor([[height / width]], dtype=dtype, device=x_t.device)
        return {"resolution": sizes.expand(len(x_t), -1), "aspect_ratio": aspect.expand(len(x_t), -1)}

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """T5's last hidden states of the lower-cased prompts, and their mask; the null prompt is the empty text.

        The stock pipeline's `clean_caption`, which needs two more libraries, is not applied.
        """
        texts = [prompt.lower().strip() for prompt in prompts]
        return Condition(*masked_t5_states(self.text_encoder, self.tokenizer, texts, self.settings.max_tokens))
