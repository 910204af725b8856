"""What a run needs before its first step: a backbone and cached data."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from apexflow.backbones import Backbone, load_backbone
from apexflow.data.cache import CachedSet, cache_set
from apexflow.data.captioned import write_scenes
from apexflow.data.scenes import Scene, scenes, vocabulary
from apexflow.progress import Progress
from apexflow.training.config import Recipe

CACHE_HOME = Path("runs") / "cache"


def prepare(recipe: Recipe, folder: Path, device: torch.device) -> tuple[Backbone, CachedSet]:
    """Load (or, for "miniature", build) the model, and cache the data in its latents."""
    source = captioned_source(recipe)
    model = recipe.model if recipe.model != "miniature" else str(miniature(recipe, folder, source))
    backbone = load_backbone(model, device)
    size = (backbone.default_size, backbone.default_size)
    with_text = not recipe.tuning.text_encoder
    cache = Path(recipe.data.cache) if recipe.data.cache else folder / "cache"
    return backbone, cache_set(source, backbone, cache, size, with_text, recipe.data.skip_limit)


def captioned_source(recipe: Recipe) -> Path:
    """The folder of captioned pictures; scenes are drawn into a shared folder on first use."""
    data = recipe.data
    if data.source != "scenes":
        return Path(data.source)
    folder = CACHE_HOME / f"scenes-{data.count}-seed{data.seed}"
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with Progress("drawing scenes", data.count) as progress:
            write_scenes(_counted(scenes(data.count, data.seed), progress), partial)
        partial.rename(folder)
    return folder


def _counted(items: Iterable[Scene], progress: Progress) -> Iterator[Scene]:
    for item in items:
        progress.advance()
        yield item


def miniature(recipe: Recipe, folder: Path, source: Path) -> Path:
    """A SANA of tiny size: fitted autoencoder and text encoder, transformer with random weights, in `folder/base`; made once."""
    from apexflow.backbones.miniature import build_miniature
    from apexflow.training.autoencoder import fit_autoencoder
    from apexflow.training.text_encoder import fit_text_encoder

    base = folder / "base"
    if not (base / "model_index.json").is_file():
        backbone = build_miniature(vocabulary(), recipe.seed)
        fit_text_encoder(backbone.text_encoder, backbone.tokenizer, recipe.text_encoder_steps, recipe.seed)
        fit_autoencoder(backbone.vae, source, (64, 64), recipe.autoencoder_steps, recipe.seed)
        partial = folder / ".partial-base"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        backbone.save(partial, backbone.settings)
        partial.rename(base)
    return base
