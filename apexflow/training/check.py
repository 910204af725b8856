"""What of a run can be told wrong before anything is drawn, cached or trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch

from apexflow.backbones import Backbone, storage
from apexflow.backbones.lora_targets import most_rank
from apexflow.data.cache import CachedSet
from apexflow.data.hub import located
from apexflow.data.mixture import check_sizes
from apexflow.data.readers import recognise
from apexflow.errors import UserError
from apexflow.objectives import Objective
from apexflow.training.config import Data, Recipe
from apexflow.training.depth import SHALLOW, at_depth, layers_of
from apexflow.training.further import blocks_at
from apexflow.training.roles import make_roles


def check_teacher(recipe: Recipe) -> None:
    """UserError for a teacher that nobody would ask."""
    if recipe.teacher and "teacher" not in recipe.build_objective().needs:
        raise UserError(f"teacher: method {recipe.method} with these settings uses no teacher: leave it out")


def check_rows(recipe: Recipe) -> None:
    """UserError for a batch so small that a part of the method's loss would get no row of it."""
    try:
        recipe.build_objective().check_rows(recipe.batch)
    except ValueError as error:
        raise UserError(f"batch {recipe.batch} is too small: {error}") from None


def check_data(recipe: Recipe, finished: Sequence[CachedSet | None]) -> None:
    """UserError for data that are not there, are too few for a batch, or have no pictures where the method reads them.

    finished: for each source the finished cache that it names, if it does. No picture is read.
    """
    check_sizes([one for one in finished if one is not None])
    found = [_records(recipe, part, cached) for part, cached in zip(recipe.data.parts, finished, strict=True)]
    if None not in found:
        check_batch(recipe, sum(filter(None, found)))


def _records(recipe: Recipe, part: Data, cached: CachedSet | None) -> int | None:
    """How many records a source has, counted up to a batch; None where a file cannot be read, which is told with the reason when
    the cache is made. UserError as `check_data`."""
    if cached is not None:
        check_pictures(recipe, part, cached.has_pictures)
        return cached.trained
    if part.drawn:
        return part.count
    origin = recognise(located(str(part.source)))
    check_pictures(recipe, part, origin.kind.pictures)
    broken: dict[str, str] = {}
    found = sum(1 for _ in islice(origin.samples(broken), recipe.batch))
    return None if broken else found


def check_pictures(recipe: Recipe, part: Data, pictures: bool) -> None:
    """UserError when a source is prompts alone and the method reads pictures."""
    if not pictures and recipe.build_objective().needs_pictures:
        raise UserError(
            f"{part.told} holds only prompts, and {recipe.method} with these settings starts "
            "from pictures: generate them with `apexflow synthesize`, or use a method that starts from noise alone "
            "(apex with objective.path_weight=0)"
        )


def check_batch(recipe: Recipe, rows: int) -> None:
    """UserError when the data are fewer than a batch, which would show the same ones several times in every step."""
    if rows < recipe.batch:
        kept = " that are not held out" if recipe.data.held_out else ""
        raise UserError(
            f"batch {recipe.batch} is more than the {rows} records of {recipe.data.told}{kept}: set batch to {rows} or less, "
            "or add data"
        )


def check_rank(recipe: Recipe, backbone: Backbone) -> None:
    """UserError for a LoRA of a rank that no matrix of the model has room for: what goes beyond it adds nothing."""
    most, rank = most_rank(backbone), recipe.tuning.rank
    if recipe.tuning.kind == "lora" and 0 < most < rank:
        raise UserError(
            f"tuning.rank is {rank}, and no matrix that a LoRA adapts in {recipe.model} has a shorter side above {most}: "
            f"set tuning.rank={most} or less"
        )


def check_tokens(tokens: int | None, backbone: Backbone) -> None:
    """UserError for more tokens of text than the model reads: a longer prompt is cut, so no run would take so many."""
    most = backbone.most_tokens
    if tokens is not None and tokens > most:
        raise UserError(f"--tokens is {tokens}, and the model reads {most} of a prompt at most: give {most} or less")


def check_networks(recipe: Recipe, backbone: Backbone, objective: Objective) -> None:
    """UserError where this model cannot be tuned as the recipe says: its roles are made on shapes."""
    check_rank(recipe, backbone)
    if recipe.tuning.storage == "nf4":
        storage.four_bit_functions()
    if recipe.tuning.storage and "jvp" in _derivatives(asdict(objective)):
        # Under forward-mode differentiation a weight that changes its type ends in a crash of the interpreter.
        raise UserError(
            f"derivative jvp is not possible on a base in {recipe.tuning.storage}: set the method's derivative to difference, "
            "or leave out tuning.storage"
        )
    shallow = at_depth(backbone, None if layers_of(backbone) is None else SHALLOW[0])
    alone = replace(recipe, tuning=replace(recipe.tuning, text_encoder=False))
    with torch.device("meta"):
        make_roles(shallow, alone, objective.needs)
    for one in objective.further:
        if one.kind != "field":
            blocks_at(backbone.transformer, one.depths)


def _derivatives(settings: Mapping[str, Any]) -> set[Any]:
    """How a method, or one within it, takes derivatives along a path."""
    inner = [_derivatives(value) for value in settings.values() if isinstance(value, dict)]
    return {settings.get("derivative")}.union(*inner)
