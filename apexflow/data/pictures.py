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
    if scale == 1:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    else:  # only what is kept is resized: of a line of pixels the whole would be enormous
        kept = min(image.width, width / scale), min(image.height, height / scale)
        across, down = (image.width - kept[0]) / 2, (image.height - kept[1]) / 2
        box = (across, down, across + kept[0], down + kept[1])
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """As `to_bytes`, in [-1, 1]."""
    return centred(to_bytes(image, size))


def centred(pixels: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return pixels.float() / 127.5 - 1
