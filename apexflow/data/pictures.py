"""Picture files to pictures, pictures to tensors."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# Names of files in the formats that are read. Of several of one record in a tar the first is taken.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
# What strangers' files may be: pillow knows more, and of those EPS would start Ghostscript. MPO is read as JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


def open_upright(source: Path | IO[bytes]) -> Image.Image:
    """A picture in its EXIF orientation: a camera held upright often stores its picture lying down. As it is where that
    cannot be read, since the picture itself may be whole."""
    Image.init()  # else the formats are not known yet
    image = Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])
    image.load()  # raises for damaged pixels, once: a PNG is read whole before its EXIF
    with suppress(Exception):  # damaged EXIF raises many kinds, some only once the picture is turned
        ImageOps.exif_transpose(image, in_place=True)
    return image


def square(image: Image.Image, size: int, resampling: Image.Resampling) -> Image.Image:
    """In RGB, shortest side to `size` (antialiased), centre crop to size x size, 8 bits."""
    picture = image.convert("RGB")
    shortest = min(picture.size)
    width, height = (int(size * side / shortest) for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return picture.resize((width, height), resampling).crop((left, top, left + size, top + size))


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
