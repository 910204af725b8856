"""Sample grids while training, from the averaged weights, at the number of steps that ships."""

from __future__ import annotations

from pathlib import Path

from apexflow.backbones import Backbone
from apexflow.data.cache import CachedSet
from apexflow.errors import writing
from apexflow.generator import Generator, picture_grid
from apexflow.training.config import Preview
from apexflow.training.distributed import leads
from apexflow.training.roles import Roles

PREVIEW_SEED = 7


def save_preview(backbone: Backbone, roles: Roles, data: CachedSet, preview: Preview, folder: Path, step: int) -> Path:
    """Write `previews/step-N.png`: captions spread over the data, the same ones and the same seeds every time.

    Whoever calls draws; the first process writes.
    """
    count = min(preview.count, len(data))
    prompts = data.captions(index * len(data) // count for index in range(count))
    with roles.shipped():
        generator = Generator(backbone)
        pictures = generator.generate(prompts, preview.steps, PREVIEW_SEED, data.size, guidance=preview.guidance)
    path = folder / "previews" / f"step-{step:07d}.png"
    if leads():
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            picture_grid(pictures, scale=2 if pictures[0].width <= 64 else 1).save(path)
    return path
