"""Sample grids while training, from the averaged weights, at the number of steps that ships."""

from __future__ import annotations

from pathlib import Path

from apexflow.backbones import Backbone
from apexflow.data.scenes import scenes
from apexflow.errors import writing
from apexflow.generator import Generator, picture_grid
from apexflow.training.config import Preview
from apexflow.training.distributed import leads
from apexflow.training.roles import Roles

PREVIEW_SEED = 7


def save_preview(backbone: Backbone, roles: Roles, preview: Preview, folder: Path, step: int) -> Path:
    """Write `previews/step-N.png`: the same prompts and seeds every time. Whoever calls draws; the first process writes."""
    prompts = [scene.caption for scene in scenes(preview.count, seed=PREVIEW_SEED)]
    with roles.shipped():
        pictures = Generator(backbone).generate(prompts, preview.steps, PREVIEW_SEED, guidance=preview.guidance)
    path = folder / "previews" / f"step-{step:07d}.png"
    if leads():
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            picture_grid(pictures, scale=2 if pictures[0].width <= 64 else 1).save(path)
    return path
