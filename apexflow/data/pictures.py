"""Pictures to tensors."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_bytes(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Centre crop to the aspect of `size` (height, width), resize, (3, H, W) in uint8."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        new = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(new, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """As `to_bytes`, in [-1, 1]."""
    return centred(to_bytes(image, size))


def centred(pixels: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return pixels.float() / 127.5 - 1
