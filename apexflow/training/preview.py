"""Sample grids while training, from the averaged weights, at the number of steps that ships."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from apexflow.backbones import Backbone
from apexflow.conditioning import Condition
from apexflow.data.cache import CachedSet
from apexflow.errors import writing
from apexflow.generator import Generator, picture_grid
from apexflow.training.config import Preview
from apexflow.training.distributed import leads
from apexflow.training.roles import Roles

PREVIEW_SEED = 7


def save_preview(
    backbone: Backbone, roles: Roles, data: CachedSet, preview: Preview, folder: Path, step: int, cached_text: bool
) -> Path:
    """Write `previews/step-N.png`: captions spread over the data, the same ones and the same seeds every time.

    With `cached_text` their embeddings are the cache's, and no text encoder runs. Whoever calls draws; the first process writes.
    """
    count = min(preview.count, len(data))
    rows = [index * len(data) // count for index in range(count)]
    prompts = data.captions(rows)
    with roles.shipped():
        generator = Generator(backbone, cached_prompts(data, rows) if cached_text else None)
        pictures = generator.generate(prompts, preview.steps, PREVIEW_SEED, data.size, guidance=preview.guidance)
    path = folder / "previews" / f"step-{step:07d}.png"
    if leads():
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            picture_grid(pictures, scale=2 if pictures[0].width <= 64 else 1).save(path)
    return path


def cached_prompts(data: CachedSet, rows: Sequence[int]) -> Callable[[Sequence[str]], Condition]:
    """What encodes the captions of some rows, and the empty prompt, out of the cache."""
    row_of = dict(zip(data.captions(rows), rows, strict=True))

    def encode(prompts: Sequence[str]) -> Condition:
        null = data.null()
        return null if null is not None and list(prompts) == [""] else data.condition([row_of[p] for p in prompts])

    return encode
