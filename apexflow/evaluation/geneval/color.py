"""GenEval's colour check: cut the object out, ask CLIP which of ten colours it has.

Source: GenEval (djghosh13/geneval af4902f, MIT), evaluation/evaluate_images.py, colour classification, restated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from apexflow.errors import UserError
from apexflow.evaluation.clip import Clip
from apexflow.evaluation.geneval.prompt_set import COLORS
from apexflow.evaluation.geneval.scoring import ColorOf

BACKGROUND = (153, 153, 153)  # "#999"


def color_prompts(class_name: str) -> dict[str, list[str]]:
    """The three templates for each of the ten colours, in COLORS order; the article is always "a"."""
    phrases = ("{color} {name}", "{color}-colored {name}", "{color} object")
    return {
        color: [f"a photo of a {phrase.format(color=color, name=class_name)}" for phrase in phrases] for color in COLORS
    }


def color_crop(image: Image.Image, box: ArrayLike, mask: ArrayLike | None = None) -> Image.Image:
    """The RGB picture that CLIP sees of one object: everything outside its mask solid #999, cropped to its box.

    box: [x1, y1, x2, y2, ...] in pixels of `image`, x2 and y2 exclusive, rounded half to even as pillow does. mask:
    (H, W), true on the object, or None to keep the background. The caller applies the EXIF orientation when loading.
    """
    picture = image.convert("RGB")
    if mask is not None:
        inside = np.asarray(mask, dtype=bool)
        if inside.shape != (picture.height, picture.width):
            raise UserError(
                f"the mask is {inside.shape[-1]}x{inside.shape[0]} pixels but the image {picture.width}x"
                f"{picture.height}: detect on the image that the colours are read from, in its EXIF orientation"
            )
        blank = Image.new("RGB", picture.size, BACKGROUND)
        picture = Image.composite(picture, blank, Image.fromarray(inside.astype(np.uint8) * 255))
    # Pillow 13 refuses a NumPy box; plain integers mean the same to every version.
    x1, y1, x2, y2 = (round(float(value)) for value in np.asarray(box)[:4])
    return picture.crop((x1, y1, x2, y2))


class ColorClassifier:
    """Zero-shot colours with CLIP ViT-L/14 (QuickGELU); the text side of each class name is encoded once."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self._weights: dict[str, torch.Tensor] = {}

    def weights(self, class_name: str) -> torch.Tensor:
        """(10, D) unit-length text features: each template normalised, averaged per colour, normalised again."""
        if class_name not in self._weights:
            templates = color_prompts(class_name)
            features = self.clip.encode_texts([text for texts in templates.values() for text in texts])
            mean = features.view(len(COLORS), -1, features.shape[-1]).mean(dim=1)
            self._weights[class_name] = mean / mean.norm(dim=-1, keepdim=True)
        return self._weights[class_name]

    def classify(self, class_name: str, crops: Sequence[Image.Image]) -> list[str]:
        """The most similar colour of each crop."""
        if not crops:
            return []
        logits = 100 * self.clip.encode_images(crops) @ self.weights(class_name).T  # (N, 10)
        return [COLORS[index] for index in logits.argmax(dim=-1).tolist()]

    def color_of(
        self, image: Image.Image, masks: Mapping[str, NDArray[Any]], kept: Mapping[str, Sequence[int]]
    ) -> ColorOf:
        """The `color_of` that `evaluate_image` asks for one image.

        masks: {class name: (n, H, W)} in the detector's order; kept: {class name: row numbers} from `kept_indices`.
        """

        def colors(class_name: str, boxes: ArrayLike) -> list[str]:
            rows = zip(np.asarray(boxes), kept[class_name], strict=False)  # the first `count` of those kept
            return self.classify(class_name, [color_crop(image, box, masks[class_name][row]) for box, row in rows])

        return colors
