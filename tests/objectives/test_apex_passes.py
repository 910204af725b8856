"""What a step of APEX asks the networks: every row once, every answer used. `docs/training.md` has the account."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from closed_forms import make_batch, make_roles
from torch import Tensor

from apexflow.conditioning import Condition
from apexflow.objectives import Field, objectives
from apexflow.objectives.apex import APEX
from apexflow.training.passes import Pass, cost, count_passes

READINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "as the shipped student": {"path_weight": 0.0, "share": 1.0},
    "path on all rows": {"path_rows": "all"},
    "endpoint on half of the rows": {"path_weight": 0.0},
    "the teacher's velocity on the path": {"lambda_max": 0.0},
    "guided in its noisier half": {"guided_above": 0.5},
}
READING = pytest.mark.parametrize("options", READINGS.values(), ids=READINGS.keys())


@pytest.mark.parametrize("at_once", [False, True])
@READING
def test_no_answer_is_asked_for_twice(options: dict[str, Any], at_once: bool) -> None:
    roles = make_roles()
    APEX(**options)(roles.networks(guided_at_once=at_once), make_batch(8), {})
    asked = [
        (role, *torch.cat([call.x_t[row].flatten(), call.t[row : row + 1], call.c.embeds[row].flatten()]).tolist())
        for role in ("student", "reference", "teacher")
        for call in roles.calls(role)
        for row in range(len(call.t))
    ]
    assert len(set(asked)) == len(asked) >= 16


def gradient(options: dict[str, Any], changed: tuple[int, int] | None = None) -> tuple[Tensor, list[int]]:
    """The student's gradient with one row of one pass answered otherwise, and how many rows each pass had."""
    roles, rows = make_roles(), []

    def differently(field: Field) -> Field:
        def answer(x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
            F = field(x_t, t, c)
            rows.append(len(F))
            if changed is None or len(rows) - 1 != changed[0]:
                return F
            return F + (torch.arange(len(F)) == changed[1]).to(F).view(-1, 1, 1, 1)

        return answer

    plain = roles.networks()
    networks = replace(plain, student=differently(plain.student), teacher=differently(plain.teacher))
    APEX(**options, clip=None)(networks, make_batch(8), {}).total.backward()
    return torch.cat([g.flatten() for g in roles.gradients("student") if g is not None]), rows


@READING
def test_a_teacher_asked_for_both_at_once_teaches_the_same_in_half_the_passes(options: dict[str, Any]) -> None:
    losses, passes, rows = [], [], []
    for at_once in (False, True):
        roles = make_roles()
        losses.append(APEX(**options)(roles.networks(guided_at_once=at_once), make_batch(8), {}).total)
        passes.append(len(roles.calls("teacher")))
        rows.append(sum(len(call.t) for call in roles.calls("teacher")))
    torch.testing.assert_close(losses[1], losses[0])
    assert passes[0] == 2 * passes[1] > 0 and rows[0] == rows[1]


@READING
def test_no_answer_is_thrown_away(options: dict[str, Any]) -> None:
    untouched, rows = gradient(options)
    for changed in ((index, row) for index, count in enumerate(rows) for row in range(count)):
        assert not torch.allclose(gradient(options, changed)[0], untouched, rtol=1e-4, atol=1e-6), changed


@pytest.mark.parametrize(
    ("options", "lora", "ratio"),
    [
        ({}, False, 2.125),
        ({}, True, 7 / 3),
        ({"guidance": 1.0}, True, 2.0),
        ({"path_velocity": "sample"}, True, 2.0),
        ({"share": 0.25}, True, 13 / 6),
        ({"lambda_max": 0.0}, True, 13 / 6),
        (READINGS["as the shipped student"], False, 2.5),
        (READINGS["as the shipped student"], True, 8 / 3),
    ],
)
def test_an_apex_step_costs_so_many_flow_matching_steps(options: dict[str, Any], lora: bool, ratio: float) -> None:
    """By passes, with checkpointing."""
    matching = count_passes(objectives()["flow_matching"](), 8)
    assert matching == [Pass("student", 8, True)]
    assert cost(count_passes(APEX(**options), 8), True, lora) / cost(matching, True, lora) == pytest.approx(ratio)


def test_a_loras_step_costs_less_than_two_and_a_fifth_by_default() -> None:
    """Its teacher is guided in the noisier half; which rows that are is chance."""
    rows, lora = 1024, APEX().for_model((-0.5, 1.0), 2.5, True, {})
    made = count_passes(lora, rows)
    assert cost(made, True, True) / cost(count_passes(objectives()["flow_matching"](), rows), True, True) < 2.2
