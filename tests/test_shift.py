"""Which condition shift a run uses: the recipe's, else the family's; one that the family cannot see is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from apexflow.errors import UserError
from apexflow.objectives import objectives
from apexflow.training.config import Recipe
from apexflow.training.prepare import suited_objective


def family(normalizes: bool = False) -> SimpleNamespace:
    return SimpleNamespace(family="some", shift_defaults=(-0.7, 0.2), normalizes_text=normalizes)


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
