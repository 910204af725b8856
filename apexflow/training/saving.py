"""The end of a run: the averaged student as a model folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from apexflow.backbones import Backbone, Settings, second_time, without_second_time, write_settings
from apexflow.errors import Diverged, writing
from apexflow.export.lora import is_loadable, save_lora
from apexflow.files import new_folder
from apexflow.progress import console
from apexflow.training.adapters import LoraRoles
from apexflow.training.config import Preview, Recipe
from apexflow.training.distributed import leads, together
from apexflow.training.roles import Roles


def save_model(backbone: Backbone, roles: Roles, recipe: Recipe, folder: Path, card: dict[str, Any]) -> Path:
    """Write `folder/model` as a diffusers folder, whole or not at all; a LoRA is merged there, and alone in `folder/lora`.

    All processes take part, one writes. Diverged where the averaged weights are not finite.
    """
    settings = shipped_settings(backbone, recipe, card)
    with together():
        check_finite(roles.average, folder)
    if isinstance(roles, LoraRoles):
        roles.gather_average()
        with together():
            if leads():  # before the merge, which takes room for the whole model and may find none
                save_adapter(roles, folder / "lora", settings)
    transformer = roles.final()
    with together():
        if leads():
            with roles.shipped():
                tuned, backbone.transformer = backbone.transformer, transformer
                _write(backbone, settings, folder)
                backbone.transformer = tuned
    return folder / "model"


def shipped_settings(backbone: Backbone, recipe: Recipe, card: dict[str, Any]) -> Settings:
    """How the saved model is drawn: a student as its previews were, a teacher as the model that it went on from; both by the
    sampler of their method."""
    objective = recipe.build_objective()
    default: Settings | Preview = backbone.settings if objective.keeps_sampling else recipe.preview
    steps = recipe.sampling_steps or default.steps
    samplers: Any = {1: objective.sampler, **objective.longer} if objective.longer else {}
    return replace(
        backbone.settings,
        steps=steps,
        guidance=default.guidance if recipe.sampling_guidance is None else recipe.sampling_guidance,
        **objective.sampling(steps),
        samplers=samplers,
        card={"recipe": recipe.to_dict()} | card,
    )


def check_finite(average: Mapping[str, Tensor], folder: Path) -> None:
    """Diverged unless the weights that `folder` has trained are finite; of sharded ones each process looks at its own."""
    shares = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in average.values())
    if all(bool(share.isfinite().all()) for share in shares):
        return
    raise Diverged(
        f"the trained weights of {folder} are not finite, so no model was saved: delete its last checkpoints "
        "and pass --resume, or start over with a lower optimizer.learning_rate"
    )


def _write(backbone: Backbone, settings: Settings, folder: Path) -> None:
    final = folder / "model"
    with new_folder(final, "free some space and pass --resume; the checkpoint is intact") as partial:
        _save_parts(backbone, partial, settings)
        shutil.rmtree(final, ignore_errors=True)


def _save_parts(backbone: Backbone, folder: Path, settings: Settings) -> None:
    """The diffusers folder, and beside it a second time, which stock diffusers neither knows nor needs."""
    with second_time.without(backbone.transformer) as second:
        backbone.save(folder, settings)
    if second is not None:
        second_time.save(second, folder)


def save_adapter(roles: LoraRoles, folder: Path, settings: Settings | None = None) -> None:
    """Write the adapter alone, for stock diffusers and ComfyUI, and beside it how it is drawn, where that is not as its base is.
    A family whose stock pipeline loads no LoRA goes without."""
    if is_loadable(roles.backbone):
        save_lora(roles, folder)
        if settings is not None:
            jumps = second_time.second_time_of(roles.backbone.transformer) is not None  # which no LoRA holds
            with writing(folder):
                write_settings(folder, without_second_time(settings) if jumps else settings)
    else:
        console.print("no LoRA file, since the stock pipeline cannot load one: use the merged model")
