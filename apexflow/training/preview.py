"""Sample grids while training, from the averaged weights, at the number of steps that ships."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from apexflow.backbones import Backbone
from apexflow.conditioning import Condition
from apexflow.data.cache import padded, spans_of
from apexflow.data.mixture import Cached
from apexflow.data.shards import groups
from apexflow.errors import first_line, writing
from apexflow.files import write_json
from apexflow.generator import GAP, Generator, picture_grid, pictures_at_once
from apexflow.progress import console
from apexflow.training.config import Preview, Recipe
from apexflow.training.distributed import leads
from apexflow.training.roles import Roles

PREVIEW_SEED = 7
ROW = 8  # captions side by side
LUMINANCE = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # of red, green and blue (ITU-R BT.709)


@dataclass(frozen=True)
class Shown:
    """What previews draw: so many `pictures` of these captions, going through them twice. `encode` None: by the text encoder."""

    captions: list[str]
    pictures: int
    encode: Callable[[Sequence[str]], Condition] | None


@torch.no_grad()
def choose(recipe: Recipe, backbone: Backbone, data: Cached, device: torch.device) -> Shown:
    """The recipe's own prompts, encoded now, or captions spread over the data, whose embeddings are cached.

    A text encoder that is trained encodes them anew each time.
    """
    preview, cached = recipe.preview, not recipe.tuning.text_encoder
    if preview.prompts:
        captions = list(dict.fromkeys(preview.prompts))
        encode = None
        if cached:
            with backbone.encoders_on(device):
                encode = _looked_up(captions, _encoded(backbone, captions, pictures_at_once(data.size)), data)
        return Shown(captions, 2 * len(captions), encode)
    rows = data.spread(-(-preview.count // 2))
    captions = data.captions(rows)
    encode = _looked_up(captions, data.condition(rows), data) if cached else None
    return Shown(captions, min(preview.count, 2 * len(rows)), encode)


def _encoded(backbone: Backbone, captions: Sequence[str], most: int) -> Condition:
    """The captions' conditions on the CPU, by the text encoder, which is asked for `most` of them at once."""
    parts = [backbone.encode_prompts(group).to("cpu") for group in groups(captions, most)]
    return padded(spans_of(parts), [row for c in parts if c.pooled is not None for row in c.pooled])


def _looked_up(captions: Sequence[str], conditions: Condition, data: Cached) -> Callable[[Sequence[str]], Condition]:
    """What encodes these captions, and the empty prompt, without a text encoder."""
    row_of = {caption: row for row, caption in enumerate(captions)}

    def encode(prompts: Sequence[str]) -> Condition:
        null = data.null()
        return null if null is not None and list(prompts) == [""] else conditions[[row_of[p] for p in prompts]]

    return encode


def save_preview(
    backbone: Backbone,
    roles: Roles,
    shown: Shown,
    size: int,
    preview: Preview,
    sampler: dict[str, Any],
    folder: Path,
    step: int,
) -> dict[str, float]:
    """Write `previews/step-N.png`: each caption from two noises, the same every time, one picture above the other. Beside it
    `step-N.json` has the captions, in the order of their numbers in the grid, and what the pictures look like (`appearance`),
    which is returned. sampler: kappa, rho and order, the method's own.

    Whoever calls draws latents; the first process makes them pictures, and writes.
    """
    half = len(shown.captions)
    with roles.shipped():
        decode = partial(decoded, backbone) if leads() else nothing
        # Beside what training holds there is little room: large pictures are drawn a few at a time.
        generator = Generator(backbone, shown.encode, decode, pictures_at_once(size))
        prompts = (shown.captions * 2)[: shown.pictures]
        pictures = generator.generate(prompts, preview.steps, PREVIEW_SEED, size, preview.guidance, **sampler)
    if not leads():
        return {}
    numbers = appearance(pictures, half)
    path = folder / "previews" / f"step-{step:07d}.png"
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        numbered_grid(pictures, half).save(path)
    write_json(path.with_suffix(".json"), numbers | {"captions": shown.captions})
    return numbers


def numbered_grid(pictures: Sequence[Image.Image], half: int) -> Image.Image:
    """A column for each of `half` captions, under its number from 1 on: the picture from the first noise, below it that from the
    second, if there is one. Up to `ROW` captions side by side, the next ones below them.

    Numbers, since captions are of any length and in any script: those who show the grid write them beside it.
    """
    scale = 2 if pictures[0].width <= 64 else 1
    columns = [range(at, min(at + ROW, half)) for at in range(0, half, ROW)]
    blocks = [
        picture_grid([*pictures[one.start : one.stop], *pictures[half + one.start : half + one.stop]], len(one), scale)
        for one in columns
    ]
    head = max(16, blocks[0].width // 48)  # readable where a wide grid is shown at the width of a page
    sheet = Image.new("RGB", (blocks[0].width, sum(head + GAP + block.height for block in blocks)), "white")
    top = 0
    for numbers, block in zip(columns, blocks, strict=True):
        _write_numbers(sheet, numbers, top, pictures[0].width * scale, head)
        sheet.paste(block, (0, top + head))
        top += head + block.height + GAP
    return sheet


def _write_numbers(sheet: Image.Image, numbers: range, top: int, width: int, height: int) -> None:
    """Above columns of pictures of so many pixels' width, the numbers of captions, counted from 1."""
    drawing, font = ImageDraw.Draw(sheet), ImageFont.load_default(0.8 * height)
    for column, number in enumerate(numbers):
        middle = (column * (width + GAP) + width / 2, top + height / 2)
        drawing.text(middle, str(number + 1), "black", font, anchor="mm")


def appearance(pictures: Sequence[Image.Image], half: int) -> dict[str, float]:
    """Mean brightness, contrast and saturation of pictures, in 0 to 1, and where picture `half + i` shares picture i's caption,
    diversity: the root mean square of their difference.

    A student that darkens, burns in, or gives one picture whatever the noise, shows it here; its loss need not.
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
    console.print(f"the previews could not be decoded on {device} ({reason}): the CPU decodes them, which is slower")
    return _decoded_on(torch.device("cpu"), backbone, latents)


def _decoded_on(device: torch.device, backbone: Backbone, latents: Tensor) -> Tensor:
    # In the precision of the autoencoder's weights, as the saved model decodes, whatever the run's is.
    with backbone.autoencoder_on(device), torch.autocast(device.type, enabled=False):
        return torch.cat([backbone.decode(one.to(device)).cpu() for one in latents.split(1)])


def nothing(latents: Tensor) -> Tensor:
    """No picture of any latents, where nobody would look at them."""
    return latents[:0]
