"""Sample grids while training, from the averaged weights, at the number of steps that ships."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apexflow.backbones import Backbone
from apexflow.conditioning import Condition
from apexflow.data.cache import CachedSet
from apexflow.errors import first_line, writing
from apexflow.files import write_json
from apexflow.generator import Generator, picture_grid
from apexflow.progress import console
from apexflow.training.config import Preview
from apexflow.training.distributed import leads
from apexflow.training.roles import Roles

PREVIEW_SEED = 7
LUMINANCE = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # of red, green and blue (ITU-R BT.709)


def save_preview(
    backbone: Backbone, roles: Roles, data: CachedSet, preview: Preview, folder: Path, step: int, cached_text: bool
) -> dict[str, float]:
    """Write `previews/step-N.png`: captions spread over the data, each from two noises, the same every time, one row above the
    other. Beside it `step-N.json` has what they look like (`appearance`), which is returned.

    With `cached_text` their embeddings are the cache's, and no text encoder runs. Whoever calls draws latents; the first process
    makes them pictures, and writes.
    """
    half = min(-(-preview.count // 2), len(data))
    rows = [index * len(data) // half for index in range(half)]
    prompts = (data.captions(rows) * 2)[: preview.count]
    with roles.shipped():
        decode = partial(decoded, backbone) if leads() else nothing
        generator = Generator(backbone, cached_prompts(data, rows) if cached_text else None, decode)
        pictures = generator.generate(prompts, preview.steps, PREVIEW_SEED, data.size, guidance=preview.guidance)
    if not leads():
        return {}
    numbers = appearance(pictures, half)
    path = folder / "previews" / f"step-{step:07d}.png"
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        picture_grid(pictures, min(half, 8), 2 if pictures[0].width <= 64 else 1).save(path)
    write_json(path.with_suffix(".json"), numbers)
    return numbers


def appearance(pictures: Sequence[Image.Image], half: int) -> dict[str, float]:
    """Mean brightness, contrast and saturation of pictures, in 0 to 1, and where picture `half + i` shares picture i's caption,
    diversity: the root mean square of their difference.

    A student that darkens, burns in, or gives one picture whatever the noise, shows it here long before its loss does.
    """
    pixels = np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in pictures])
    grey, top = pixels @ LUMINANCE, pixels.max(-1)
    numbers = {
        "brightness": grey.mean(),
        "contrast": grey.std((1, 2)).mean(),
        "saturation": ((top - pixels.min(-1)) / np.maximum(top, 1 / 255)).mean(),
    }
    if len(pixels) > half:
        pairs = pixels[half:] - pixels[: len(pixels) - half]
        numbers["diversity"] = np.sqrt(np.square(pairs).mean((1, 2, 3))).mean()
    return {name: round(float(value), 5) for name, value in numbers.items()}


def decoded(backbone: Backbone, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to pictures (B, 3, H, W) on the CPU, with the autoencoder beside the denoiser just for that.

    One after the other: a GPU that training has filled has no room for more. Where it has none for one, or fails otherwise, the
    CPU decodes, slowly, and a line says so.
    """
    device = backbone.device
    try:
        return _decoded_on(device, backbone, latents)
    except RuntimeError as error:
        if device.type == "cpu":
            raise
        reason = first_line(error)
    console.print(f"the previews could not be decoded on {device} ({reason}): the CPU does it, which takes longer")
    return _decoded_on(torch.device("cpu"), backbone, latents)


def _decoded_on(device: torch.device, backbone: Backbone, latents: Tensor) -> Tensor:
    # In the precision of the autoencoder's weights, as the saved model decodes, whatever the run's is.
    with backbone.autoencoder_on(device), torch.autocast(device.type, enabled=False):
        return torch.cat([backbone.decode(one.to(device)).cpu() for one in latents.split(1)])


def nothing(latents: Tensor) -> Tensor:
    """No picture of any latents, where nobody would look at them."""
    return latents[:0]


def cached_prompts(data: CachedSet, rows: Sequence[int]) -> Callable[[Sequence[str]], Condition]:
    """What encodes the captions of some rows, and the empty prompt, out of the cache."""
    row_of = dict(zip(data.captions(rows), rows, strict=True))

    def encode(prompts: Sequence[str]) -> Condition:
        null = data.null()
        return null if null is not None and list(prompts) == [""] else data.condition([row_of[p] for p in prompts])

    return encode
