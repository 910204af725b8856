"""A checkpoint as a student of its own: the best step of a run need not be its last."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apexflow.backbones import load_backbone, resolve, second_time, write_settings
from apexflow.backbones.folder import CHECKPOINTS, RECIPE
from apexflow.errors import UserError, writing
from apexflow.export import export, save_lora
from apexflow.export.folder import check_asked, check_output
from apexflow.export.lora import is_loadable
from apexflow.files import write_json
from apexflow.training.adapters import LoraRoles
from apexflow.training.checkpoint import check_fit, checkpoints, read_into, read_shapes, read_state
from apexflow.training.config import Recipe, parse
from apexflow.training.roles import Roles, loaded_dtype, make_roles
from apexflow.training.saving import check_finite, save_model, shipped_settings
from apexflow.training.sharding import leave
from apexflow.training.spent import spent


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is what a run saves on its way; UserError for one that is not there, or not any more."""
    if path.parent.name == CHECKPOINTS and not path.exists():
        there = ", ".join(other.name for other in checkpoints(path.parent)) or "none"
        raise UserError(
            f"checkpoint {path} does not exist: give one that does ({there}); keep sets how many a run keeps"
        )
    return (path / "state.json").is_file()


def export_checkpoint(
    checkpoint: Path, output: Path, scheduler: Any = None, merge: bool = False, rank: int | None = None
) -> dict[str, Any]:
    """Hand over what a run would have left if it had ended at a checkpoint, under its own name, another (a copy) or by a link;
    as `export` otherwise. Nothing in the run changes.

    UserError for a checkpoint that is damaged, or whose model is not where the run found it.
    """
    check_output(output)  # told before any weights are read
    state = read_state(checkpoint)
    recipe = parse(Recipe, state["recipe"], str(checkpoint / "state.json"))
    check_asked(str(checkpoint), recipe.tuning.kind == "lora", recipe.tuning.text_encoder, merge, rank)
    own = checkpoint.resolve() if checkpoint.is_symlink() else checkpoint.absolute()
    # Always the same name, so that what a killed process left is not left for good.
    made = output.absolute().with_name(f".checkpoint-{output.name}")
    with _ended_at(own, state, recipe, made) as base:
        try:
            # What has no base is a run of its own, with the model in it.
            return export(str(made), output, scheduler, merge, base, rank, moving=base is None)
        except UserError as error:  # of a folder that is gone once this is read
            told = str(error).replace(str(made / "model"), str(checkpoint)).replace(str(made), str(checkpoint))
            raise UserError(told) from error


@contextmanager
def _ended_at(checkpoint: Path, state: Mapping[str, Any], recipe: Recipe, folder: Path) -> Iterator[str | None]:
    """Within, `folder` has the student of a checkpoint; given is the base that it belongs to if it is a LoRA alone."""
    run = checkpoint.parent.parent
    model = str(run / "base") if recipe.model == "miniature" else recipe.model
    needs = tuple(name for name in recipe.build_objective().needs if name == "second_time")
    backbone = load_backbone(model, "meta")
    # An adapter is a file by itself, if the family's stock pipeline loads one; a second time is kept in whole models only, and a
    # base with one that the method left out is not what the adapter belongs to.
    jumps = needs or (resolve(model) / second_time.FILE).is_file()
    alone = recipe.tuning.kind == "lora" and not jumps and is_loadable(backbone)
    if not alone:
        backbone = load_backbone(model, "cpu", loaded_dtype(recipe))
    backbone.draw_at(state.get("size") or recipe.data.size or backbone.default_size)
    roles = _averaged(checkpoint, make_roles(backbone, recipe, needs, leave, once=True))
    card = spent(state, recipe.batch)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with writing(folder):
            folder.mkdir(parents=True)
        if alone and isinstance(roles, LoraRoles):
            save_lora(roles, folder)
            write_settings(folder, shipped_settings(backbone, recipe, card))
        else:
            save_model(backbone, roles, recipe, folder, card)
            write_json(folder / RECIPE, recipe.to_dict() | {"model": model})  # which may lie in the run's folder
        yield model if alone else None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _averaged(checkpoint: Path, roles: Roles) -> Roles:
    found = read_shapes(checkpoint)
    check_fit(roles.average, found, "average", str(checkpoint))
    read_into(checkpoint, {f"average/{name}": tensor for name, tensor in roles.average.items()}, alone=True)
    check_finite(roles.average, checkpoint)
    return roles
