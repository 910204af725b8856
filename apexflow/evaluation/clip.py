"""CLIP features and the CLIP score, through transformers, from a local folder.

Source: OpenAI CLIP's preprocessing and `clip.tokenize(..., truncate=True)`, and Sana's protocol for the score: the mean
over images of logit_scale.exp() (100 for the released weights) times the cosine, without clamp or prompt prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from apexflow.backbones.parts import SAFELY
from apexflow.data.pictures import square
from apexflow.errors import UserError
from apexflow.evaluation.loading import guarded, load_network

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CONTEXT_LENGTH = 77


def preprocess(image: Image.Image, size: int = 224) -> torch.Tensor:
    """(3, size, size) float32: shortest side to size (bicubic, antialiased), centre crop, CLIP mean and std."""
    if 0 in image.size:
        width, height = image.size
        raise UserError(f"an image of {width}x{height} pixels cannot be scored: give one with at least one pixel")
    # A copy, since from_numpy refuses to promise anything about the read-only buffer that pillow hands out.
    pixels = torch.from_numpy(np.array(square(image, size, Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def truncate(ids: Sequence[int], length: int = CONTEXT_LENGTH) -> list[int]:
    """At most `length` token ids that still end with the end token.

    CLIP reads its text feature at the end token, so cutting it off (as slicing to 77 does) scores another feature.
    """
    return list(ids) if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def tokenize(tokenizer: Callable[..., Any], texts: Sequence[str], length: int = CONTEXT_LENGTH) -> torch.Tensor:
    """(N, length) token ids, each row ending with the end token and padded after it."""
    rows = [truncate(tokenizer(text, truncation=False, verbose=False)["input_ids"], length) for text in texts]
    # What stands after the end token is never seen (causal attention), so any id pads; the tokenizer's own if it has.
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows], dtype=torch.long).reshape(-1, length)


class Clip:
    """A CLIP model with its tokenizer: unit-length image and text features.

    model: transformers CLIPModel; tokenizer: its tokenizer, called with one text.
    """

    def __init__(self, model: Any, tokenizer: Callable[..., Any], device: str | torch.device = "cpu") -> None:
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.device = torch.device(device)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", activation: str = "quick_gelu") -> Clip:
        """From a folder in the transformers layout; no network. UserError when it is missing or has another activation."""
        if not Path(folder).is_dir():
            raise UserError(f"no CLIP folder at {folder}: docs/evaluation.md says what to put there")
        from transformers import AutoTokenizer, CLIPModel

        model = load_network(CLIPModel, folder)
        # OpenAI's weights were trained with QuickGELU, LAION's with GELU; the other runs without complaint and moves every score.
        activations = {model.config.text_config.hidden_act, model.config.vision_config.hidden_act}
        if activations != {activation}:
            raise UserError(f"the CLIP in {folder} uses {sorted(activations)}: use one with hidden_act {activation}")
        tokenizer = guarded(folder, lambda: AutoTokenizer.from_pretrained(folder, **SAFELY))
        # Without its files transformers makes an empty tokenizer, to which all texts are the same.
        words, known = len(tokenizer), model.config.text_config.vocab_size
        if words < known:
            raise UserError(
                f"the tokenizer in {folder} has {words} words of {known}: put the model's tokenizer files there"
            )
        return cls(model, tokenizer, device)

    @property
    def is_large(self) -> bool:
        """Whether it has the shape of ViT-L/14 at 224 pixels, with which published scores are made."""
        vision = self.model.config.vision_config
        shape = (vision.hidden_size, vision.num_hidden_layers, vision.patch_size, vision.image_size)
        return shape == (1024, 24, 14, 224)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(N, D) unit-length features."""
        size = self.model.config.vision_config.image_size
        pixels = torch.stack([preprocess(image, size) for image in images]).to(self.device)
        return normalize(_features(self.model.get_image_features(pixel_values=pixels)), dim=-1)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """(N, D) unit-length features; long texts are cut before their end token, never through it."""
        length = min(CONTEXT_LENGTH, self.model.config.text_config.max_position_embeddings)
        ids = tokenize(self.tokenizer, texts, length).to(self.device)
        return normalize(_features(self.model.get_text_features(input_ids=ids)), dim=-1)

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """(N,) logit_scale.exp() times the cosine of each image with its own prompt. The CLIP score is their mean."""
        if len(images) != len(prompts):
            raise UserError(f"{len(images)} images but {len(prompts)} prompts: give one prompt for each image")
        cosine = (self.encode_images(images) * self.encode_texts(prompts)).sum(dim=-1)
        return self.model.logit_scale.exp().float() * cosine


def _features(output: Any) -> torch.Tensor:
    """transformers 5 wraps the projected features in an output object, earlier versions return the tensor."""
    return (output if isinstance(output, torch.Tensor) else output.pooler_output).float()
