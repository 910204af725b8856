"""Which condition shift and guidance a run uses: the recipe's, else the model's own; a shift that cannot be seen is refused."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from apexflow.errors import UserError
from apexflow.objectives import guided, objectives
from apexflow.training.config import Recipe, Tuning
from apexflow.training.suited import suited_objective


def family(normalizes: bool = False, guidance: float = 4.0) -> SimpleNamespace:
    settings = SimpleNamespace(guidance=guidance)
    return SimpleNamespace(family="some", shift_defaults=(-0.7, 0.2), normalizes_text=normalizes, settings=settings)


@pytest.mark.parametrize(
    ("given", "shift"),
    [({}, (-0.7, 0.2)), ({"a": -1.0}, (-1.0, 0.2)), ({"b": 0.1}, (-0.7, 0.1)), ({"a": 1.0, "b": 3.0}, (1.0, 3.0))],
)
def test_the_family_s_shift_stands_in_for_what_is_not_given(
    given: dict[str, float], shift: tuple[float, float]
) -> None:
    objective = suited_objective(Recipe(output="x", objective=given), family())
    assert (objective.a, objective.b) == objective.condition_shift == shift


def test_a_shift_without_contrast_stops_a_run_before_it_starts() -> None:
    blind = {"a": 0.5, "b": 0.0}
    with pytest.raises(UserError, match="no contrast"):
        suited_objective(Recipe(output="x", objective=blind), family(normalizes=True))
    suited_objective(Recipe(output="x", objective=blind), family())
    # Path only: the shift is never used.
    unused = suited_objective(Recipe(output="x", objective=blind | {"endpoint_weight": 0.0}), family(normalizes=True))
    assert unused.condition_shift is None


@pytest.mark.parametrize("method", objectives())
def test_every_method_goes_with_a_family_that_normalizes_text(method: str) -> None:
    assert suited_objective(Recipe(output="x", method=method), family(normalizes=True)) is not None


def test_the_teacher_is_guided_as_it_is_drawn_or_as_the_recipe_says() -> None:
    assert suited_objective(Recipe(output="x"), family()).guidance == 4.0
    assert suited_objective(Recipe(output="x"), family(guidance=1.0), family()).guidance == 4.0  # the named teacher's
    assert suited_objective(Recipe(output="x", objective={"guidance": 1.5}), family()).guidance == 1.5


def test_a_lora_s_teacher_is_guided_in_the_noisier_half_or_as_the_recipe_says() -> None:
    lora = Tuning(kind="lora")
    assert suited_objective(Recipe(output="x"), family()).guided_above == 0.0
    assert suited_objective(Recipe(output="x", tuning=lora), family()).guided_above == 0.5
    everywhere = Recipe(output="x", tuning=lora, objective={"guided_above": 0.0})
    assert suited_objective(everywhere, family()).guided_above == 0.0


@pytest.mark.parametrize("method", objectives())
def test_no_guidance_is_put_on_top_of_a_teacher_that_is_drawn_without(method: str) -> None:
    own = objectives()[method]()
    suited = suited_objective(Recipe(output="x", method=method), family(guidance=1.0))
    assert guided(suited, 1.0) == {name: getattr(suited, name) for name in guided(own, 1.0)}
    if method != "apex":  # else the paper's own scale stays
        assert suited_objective(Recipe(output="x", method=method), family()) == own
    given = {
        name: 3.0 if name == "guidance" else asdict(value) | {"guidance": 3.0}
        for name, value in guided(own, 3.0).items()
    }
    kept = suited_objective(Recipe(output="x", method=method, objective=given), family(guidance=1.0))
    assert guided(kept, 3.0) == {name: getattr(kept, name) for name in given}
