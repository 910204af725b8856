"""The LoRA that a student starts from, where a recipe names one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from apexflow.backbones import Backbone
from apexflow.backbones.lora_targets import target_modules
from apexflow.errors import UserError, in_a_shell
from apexflow.lora.added import MEND
from apexflow.lora.merge import Pair, file_of, read_lora
from apexflow.training.config import Recipe


def read_start(recipe: Recipe, backbone: Backbone) -> dict[str, Pair]:
    """The pairs of `tuning.start` by module, none if the recipe has none.

    UserError for a LoRA that is not of the rank, or not on the modules, that the recipe trains.
    """
    if recipe.tuning.start is None:
        return {}
    file = file_of(Path(recipe.tuning.start))
    if not file.is_file():
        raise UserError(f"tuning.start: {file} does not exist: {MEND}")
    pairs = read_lora(file, backbone)
    check_start(file, pairs, recipe, backbone)
    return pairs


def check_start(file: Path, pairs: Mapping[str, Pair], recipe: Recipe, backbone: Backbone) -> None:
    """UserError unless each module that is trained has a pair of its shape and of the recipe's rank, and no other has one."""
    targets = target_modules(backbone)
    command = f"apexflow export {in_a_shell(file)} --base {in_a_shell(recipe.model)} --merge -o FOLDER"
    merge = f"merge it first (`{command}`) and use that model"
    own = {name for name, _ in backbone.transformer.named_modules()}
    if foreign := sorted(pairs.keys() - own):  # which could not be merged either
        raise UserError(f"tuning.start: {file} is a LoRA for another model: {recipe.model} has no {foreign[0]}")
    if apart := sorted(targets.keys() ^ pairs.keys()):
        what = "lacks" if apart[0] in targets else "has modules that are not trained, such as"
        raise UserError(f"tuning.start: {file} {what} {apart[0]} (the first of {len(apart)} such modules): {merge}")
    for module, shape in targets.items():
        if not pairs[module].fits(shape):
            raise UserError(f"tuning.start: {file} is a LoRA for another model: {module} has the shape {shape} here")
    ranks = {len(pair.down) for pair in pairs.values()}
    if ranks != {recipe.tuning.rank}:
        mend = f"set tuning.rank={min(ranks)}" if len(ranks) == 1 else merge
        told = ", ".join(map(str, sorted(ranks)))
        raise UserError(f"tuning.start: {file} has rank {told}, and tuning.rank is {recipe.tuning.rank}: {mend}")
