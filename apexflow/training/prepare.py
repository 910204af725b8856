"""What a run needs before its first step: a backbone and cached data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from apexflow.backbones import Backbone, load_backbone, resolve
from apexflow.backbones.folder import INDEX
from apexflow.conditioning import Condition
from apexflow.data.cache import CachedSet, check_made_by, is_cache
from apexflow.data.caching import CacheSettings, make_cache, picture_sizes
from apexflow.data.captioned import Skipped, read_captioned
from apexflow.data.fingerprint import autoencoder_fingerprint, text_fingerprint
from apexflow.data.hub import located
from apexflow.data.mixture import Cached, Mixture
from apexflow.data.readers import recognise
from apexflow.data.scenes import scenes, vocabulary
from apexflow.data.shards import write_scenes
from apexflow.errors import UserError
from apexflow.files import new_folder
from apexflow.locking import alone_in
from apexflow.lora.merge import Pair
from apexflow.objectives import Objective
from apexflow.progress import counted
from apexflow.training.beginning import read_start
from apexflow.training.check import check_batch, check_data, check_networks, check_rows, check_teacher
from apexflow.training.config import Data, Recipe
from apexflow.training.distributed import leads, world
from apexflow.training.engine import memory_of, parallel_kind
from apexflow.training.preview import Shown, choose
from apexflow.training.roles import loaded_dtype
from apexflow.training.suited import suited_objective

CACHE_HOME = Path("runs") / "cache"
# What two models are asked to tell whether their encoders are the same.
GREY, WORDS = torch.zeros(1, 3, 64, 64), "a photo of a red circle"


@dataclass(frozen=True)
class Prepared:
    """What a run is made of. `teacher`: the model that the recipe names apart from its own; shown: None where this process draws
    no previews; parallel: see `_load`; start: the pairs of the LoRA that the student starts as.
    """

    backbone: Backbone
    objective: Objective
    teacher: Backbone | None
    data: Cached
    shown: Shown | None
    parallel: str
    start: Mapping[str, Pair]


def prepare(recipe: Recipe, folder: Path, device: torch.device, fresh: bool) -> Prepared:
    """Load (or, for "miniature", build) the model, and cache the data in its latents, unless a finished cache is named.

    Whatever can be told without the data is told before any of them is drawn or cached. The LoRA to start as is read for a
    `fresh` run alone. Autoencoder and text encoder stand on `device` only while the cache is made
    and own prompts of previews are encoded; the model is left on the CPU.
    """
    finished = finished_sets(recipe.data)
    check_teacher(recipe)
    check_rows(recipe)
    check_data(recipe, finished)
    if recipe.model == "miniature":
        pairs = zip(finished, recipe.data.parts, strict=True)
        model = miniature(recipe, folder, [one.folder if one else captioned_source(part) for one, part in pairs])
    else:
        model = resolve(recipe.model)
    folders = [model, resolve(recipe.teacher)] if recipe.teacher else [model]
    parallel, backbone, teacher = _load(recipe, folders, device)
    size = size_of(recipe.data, finished)
    for one in filter(None, (backbone, teacher)):
        one.draw_at(size or one.default_size)  # what it learns to draw, and so what the saved model draws
    objective = suited_objective(recipe, backbone, teacher)
    settings = cache_settings(recipe, size)
    if None in finished:
        picture_sizes(backbone, settings)
    check_networks(recipe, backbone, objective)
    start = read_start(recipe, backbone) if fresh else {}
    if teacher is not None:
        check_teaches(recipe, (backbone, teacher), folders)
    for cached in filter(None, finished):
        check_made_by(cached.folder, cached.index["made_by"], _expected(recipe.data, settings, backbone, model))
    data = cached_data(recipe, folder, device, backbone, model, finished, settings)
    check_batch(recipe, data.trained)
    # Sharded networks need all processes to draw; of others one does, and the rest read no text encoder for it.
    shown = choose(recipe, backbone, data, device) if leads() or parallel == "fsdp" else None
    return Prepared(backbone, objective, teacher, data, shown, parallel, start)


def cached_data(
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    backbone: Backbone,
    model: Path,
    finished: Sequence[CachedSet | None],
    settings: CacheSettings,
) -> Cached:
    """The finished caches that a recipe names, and of its other sources those that are made (or finished) now."""
    home = Path(recipe.data.cache) if recipe.data.cache else folder / "cache"
    if len(finished) > 1 and None in finished and is_cache(home):
        raise UserError(
            f"{home} is the cache of one source, and data.source lists several: choose another folder with data.cache"
        )
    folders = [home] if len(finished) == 1 else [home / name for name in cache_names(recipe.data)]
    sets = []
    for cached, part, cache in zip(finished, recipe.data.parts, folders, strict=True):
        if cached is None:
            with backbone.encoders_on(device):
                if not is_cache(cache):
                    _ = backbone.vae, backbone.text_encoder  # read now: damaged ones are told before scenes are drawn
                source = captioned_source(part)
                with alone_in(cache, wait=True):
                    make_cache(source, backbone, model, cache, settings)
            cached = CachedSet(cache, part.held_out)
        sets.append(cached)
    return sets[0] if len(sets) == 1 else Mixture(sets, recipe.data.shares)


def cache_names(data: Data) -> list[str]:
    """What the folders are called that keep the caches of several sources: each by its source, so that a list may change. Sets of
    one name are told apart by their order; a cache that then lies where another set is looked for is refused."""
    names: list[str] = []
    for part in data.parts:
        name = Path(str(part.source)).resolve().name or "set"
        while name in names:
            name += "-2"
        names.append(name)
    return names


def _load(recipe: Recipe, folders: Sequence[Path], device: torch.device) -> tuple[str, Backbone, Backbone | None]:
    """How the processes share the run ("alone", "ddp" or "fsdp"), its model, and the teacher that it names; where they shard,
    weights are left on disk."""

    def load(where: str, hollow: bool = False) -> list[Backbone]:
        return [load_backbone(str(folder), where, loaded_dtype(recipe), hollow) for folder in folders]

    parallel = "alone" if world() == 1 else parallel_kind(recipe, load("meta"), memory_of(device))
    models = load("cpu", hollow=parallel == "fsdp")
    return parallel, models[0], models[1] if recipe.teacher else None


@torch.no_grad()
def check_teaches(recipe: Recipe, pair: Sequence[Backbone], folders: Sequence[Path]) -> None:
    """UserError where the second of a pair cannot teach the first: their latents, texts and transports must be the same.

    Encoders of the same files are not read; what is read for it is let go.
    """
    backbone, teacher = pair
    side = recipe.data.size or backbone.default_size
    autoencoders = {autoencoder_fingerprint(folder) for folder in folders}
    texts = {text_fingerprint(folder, one.settings) for one, folder in zip(pair, folders, strict=True)}
    cpu = torch.device("cpu")
    with backbone.encoders_on(cpu), teacher.encoders_on(cpu):
        for what, differs in (
            ("transport", backbone.transport != teacher.transport),
            ("autoencoder", len(autoencoders) > 1 and _apart(*(one.encode_images(GREY) for one in pair))),
            ("text encoder", len(texts) > 1 and _read_apart(*(one.encode_prompts([WORDS]) for one in pair))),
            ("shape of latents", len({one.latent_shape((side, side)) for one in pair}) > 1),
        ):
            if differs:
                raise UserError(
                    f"teacher {recipe.teacher} has a different {what} than model {recipe.model}: choose one that matches"
                )


def _read_apart(one: Condition, other: Condition) -> bool:
    """Whether the same words are other conditions to two models: their embeddings, or the pooled vectors beside them."""
    if one.pooled is None or other.pooled is None:
        return one.pooled is not other.pooled or _apart(one.embeds, other.embeds)
    return _apart(one.embeds, other.embeds) or _apart(one.pooled, other.pooled)


def _apart(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two encoders answer differently; rounded weights still count as the same."""
    return one.shape != other.shape or bool((one.cpu() - other.cpu()).norm() > 0.1 * one.norm())


@torch.no_grad()
def null_condition(recipe: Recipe, backbone: Backbone, data: Cached) -> Condition:
    """The condition of the empty prompt: from the cache, unless the text encoder is trained."""
    cached = None if recipe.tuning.text_encoder else data.null()
    return cached or backbone.encode_prompts([""])


def finished_sets(data: Data) -> list[CachedSet | None]:
    """For each source the finished cache that it names, opened, or None."""
    found = [(part, finished_cache(part)) for part in data.parts]
    return [CachedSet(folder, part.held_out) if folder else None for part, folder in found]


def size_of(data: Data, finished: Sequence[CachedSet | None]) -> int | None:
    """The side of a run's pictures: that of its finished caches, else what the recipe says; None for the model's own."""
    return next((one.size for one in finished if one), data.size)


def finished_cache(data: Data) -> Path | None:
    """The finished cache that `source`, a single one, names, or `cache` where no source is given."""
    named = None if data.source == "scenes" else data.source or data.cache
    return Path(str(named)) if named and is_cache(Path(str(named))) else None


def cache_settings(recipe: Recipe, size: int | None) -> CacheSettings:
    """How a source is cached, at a size that may be that of the finished caches beside it."""
    data = recipe.data
    return CacheSettings(size, data.buckets, not recipe.tuning.text_encoder, data.captions, data.skip_limit)


def _expected(data: Data, settings: CacheSettings, backbone: Backbone, model: Path) -> dict[str, Any]:
    """What a finished cache must have been made with: the model, and whatever the recipe says of the data."""
    said = {"size": data.size, "buckets": data.buckets or None, "captions": list(data.captions) or None}
    by_text = {"text": True, "text encoder": text_fingerprint(model, backbone.settings)} if settings.text else {}
    return {"autoencoder": autoencoder_fingerprint(model)} | by_text | {k: v for k, v in said.items() if v is not None}


def captioned_source(data: Data) -> Path:
    """The set that a single source names; scenes are drawn into a shared folder on first use."""
    if not data.drawn:
        return located(str(data.source))
    folder = CACHE_HOME / f"scenes-{data.count}-seed{data.seed}"
    with alone_in(folder, wait=True):
        if not folder.is_dir():
            with new_folder(folder) as partial:
                write_scenes(counted("drawing scenes", scenes(data.count, data.seed), data.count), partial)
    return folder


def miniature(recipe: Recipe, folder: Path, sources: Sequence[Path]) -> Path:
    """A SANA of tiny size, in `folder/base`; made once: fitted autoencoder, transformer with random weights.

    Its vocabulary is the words of the captions. The text encoder is taught to read scenes; of other captions its random
    weights tell the words apart, which is enough to draw what was seen.
    """
    from apexflow.backbones.miniature import build_miniature
    from apexflow.training.autoencoder import fit_autoencoder
    from apexflow.training.text_encoder import fit_text_encoder

    base = folder / "base"
    if not (base / INDEX).is_file():
        if cached := [source for source in sources if is_cache(source)]:
            raise UserError(f"model: miniature is trained on pictures, and {cached[0]} is a cache: give the pictures")
        of_scenes = recipe.data.drawn
        words = vocabulary() if of_scenes else words_of(sources, recipe.data.captions)
        backbone = build_miniature(words, recipe.seed)
        if of_scenes:
            fit_text_encoder(backbone.text_encoder, backbone.tokenizer, recipe.text_encoder_steps, recipe.seed)
        pictured = [source for source in sources if recognise(source).kind.pictures]
        fit_autoencoder(backbone.vae, pictured or sources, (64, 64), recipe.autoencoder_steps, recipe.seed)
        with new_folder(base) as partial:
            backbone.save(partial, backbone.settings)
    return base


def words_of(sources: Sequence[Path], captions: Sequence[str]) -> list[str]:
    """Every word that the captions of some sets hold."""
    words: set[str] = set()
    for record in chain.from_iterable(read_captioned(source, Skipped(), captions) for source in sources):
        words.update(re.findall(r"[a-z0-9]+", record.caption.lower()))
    return sorted(words)
