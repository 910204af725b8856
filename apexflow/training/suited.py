"""A recipe's objective, completed by what suits its model."""

from __future__ import annotations

from apexflow.backbones import Backbone, check_shift
from apexflow.objectives import Objective
from apexflow.training.config import Recipe


def suited_objective(recipe: Recipe, backbone: Backbone, teacher: Backbone | None = None) -> Objective:
    """The recipe's objective; what it does not give of condition shift and guidance is the model's and its teacher's own, or
    suits a LoRA.

    UserError for a shift that the family cannot see.
    """
    scale, lora = (teacher or backbone).settings.guidance, recipe.tuning.kind == "lora"
    objective = recipe.build_objective().for_model(backbone.shift_defaults, scale, lora, recipe.objective)
    if objective.condition_shift is not None:
        check_shift(backbone, *objective.condition_shift)
    return objective
