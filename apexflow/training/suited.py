"""A recipe's objective, completed by what suits its model."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass, replace

from apexflow.backbones import Backbone, check_shift
from apexflow.objectives import Objective
from apexflow.training.config import Recipe


def suited_objective(recipe: Recipe, backbone: Backbone, teacher: Backbone | None = None) -> Objective:
    """The recipe's objective; what it does not give of condition shift and guidance is the model's and its teacher's own.

    UserError for a shift that the family cannot see.
    """
    scale = (teacher or backbone).settings.guidance
    objective = recipe.build_objective().for_model(backbone.shift_defaults, scale, recipe.objective)
    if objective.condition_shift is not None:
        check_shift(backbone, *objective.condition_shift)
    return objective


def saying(recipe: Recipe, objective: Objective) -> Recipe:
    """The recipe with what its model has put in said: a run is resumed with that, or told that the model now says otherwise."""
    plain, suited = vars(recipe.build_objective()), vars(objective)
    said = {name: value for name, value in suited.items() if value != plain[name]}
    whole = {name: asdict(value) if is_dataclass(value) else value for name, value in said.items()}  # type: ignore[arg-type]
    return replace(recipe, objective=recipe.objective | whole)
