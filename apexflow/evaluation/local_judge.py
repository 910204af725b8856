"""Judges that run in this process: a vision-language model through transformers, or DPG-Bench's own mPLUG.

Both take the messages of an OpenAI-compatible request, so a suite asks them as it asks a server.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from apexflow.backbones.parts import SAFELY
from apexflow.data.fingerprint import fingerprint
from apexflow.errors import UserError
from apexflow.evaluation.judge import Message
from apexflow.evaluation.loading import guarded


class LocalJudge:
    """A chat model with eyes from a folder in the transformers layout; greedy. No network, safetensors only."""

    def __init__(self, folder: Path, options: Mapping[str, Any], device: str = "cpu") -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if not folder.is_dir():
            raise UserError(f"no judge at {folder}: give an http:// address or the folder of a vision-language model")
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        how: dict[str, Any] = {**SAFELY, "use_safetensors": True, "dtype": dtype}
        try:
            self.processor: Any = guarded(folder, lambda: AutoProcessor.from_pretrained(folder, **SAFELY))
        except UserError as error:
            if isinstance(error.__cause__, ImportError):  # Qwen's look into videos through torchvision
                raise UserError(f"{error}; pip install 'apexflow[judge]' installs what it needs") from error
            raise
        model: Any = guarded(folder, lambda: AutoModelForImageTextToText.from_pretrained(folder, **how))
        self.model = model.to(device).eval()
        self.name = folder.resolve().name
        self.fingerprint = fingerprint(self.model)
        self.max_tokens = int(options.get("max_tokens", 512))
        self.template_options = dict(options.get("chat_template_kwargs", {}))

    @torch.inference_mode()
    def __call__(self, messages: Sequence[Message]) -> str:
        """The reply's text."""
        inputs = self.processor.apply_chat_template(
            [{**message, "content": [_part(part) for part in _parts(message)]} for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **self.template_options,
        ).to(self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_tokens)
        asked = inputs["input_ids"].shape[1]
        return self.processor.batch_decode(tokens[:, asked:], skip_special_tokens=True)[0].strip()


class Mplug:
    """DPG-Bench's official answering model, through modelscope (the extra `mplug`), from a local folder."""

    def __init__(self, folder: Path) -> None:
        try:
            from modelscope.pipelines import pipeline
        except ImportError as error:
            raise UserError(f"mPLUG needs modelscope, which does not load ({error}): see docs/evaluation.md") from None
        if not folder.is_dir():
            raise UserError(f"no mPLUG at {folder}: give the folder of mplug_visual-question-answering_coco_large_en")
        self.pipeline: Any = pipeline("visual-question-answering", model=str(folder))

    def __call__(self, messages: Sequence[Message]) -> str:
        """The answer to the question of the one user turn."""
        parts = [_part(part) for part in _parts(messages[-1])]
        question = next(part["text"] for part in parts if part["type"] == "text")
        picture = next(part["image"] for part in parts if part["type"] == "image")
        return str(self.pipeline({"image": picture, "question": question})["text"])


def _parts(message: Message) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A picture in a data address as the picture itself."""
    if part["type"] != "image_url":
        return dict(part)
    encoded = part["image_url"]["url"].partition("base64,")[2]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        return {"type": "image", "image": image.convert("RGB")}
