"""What theory calls a fixed point is one, over all methods; and short runs lower the few-step error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from closed_forms import EVERY_TRANSPORT, GaussianField
from exact_fields import MEAN, STD, TIMES, UNIFORM, OneStep, Phased, Straight, corners, gradient, networks

from apexflow.objectives.cm import CM
from apexflow.objectives.lcm import LCM
from apexflow.objectives.pcm import PCM
from apexflow.objectives.scm import SCM
from apexflow.objectives.ucgm import UCGM
from apexflow.transport import Transport

DISTILLATIONS = {
    "cm-ddim": CM(order=1, intervals=(20, 20), times=UNIFORM),
    "cm-heun": CM(order=2, intervals=(20, 20), times=UNIFORM),
    "cm-reference": CM(target="reference", intervals=(20, 20), times=UNIFORM),
    "scm-difference": SCM(warmup=0, times=UNIFORM),
    "scm-jvp": SCM(warmup=0, times=UNIFORM, derivative="jvp"),
    "lcm": LCM(guidance=1, skip=100),
    "pcm": PCM(guidance=1, skip=100, adversarial=0),
    "pcm-one-phase": PCM(guidance=1, skip=100, phases=1, adversarial=0),
}


@EVERY_TRANSPORT
@pytest.mark.parametrize("objective", DISTILLATIONS.values(), ids=DISTILLATIONS.keys())
def test_a_straight_flow_is_an_exact_fixed_point_of_distillation(objective: Any, transport: Transport) -> None:
    """One step of the solver is exact on a straight flow, however long, so nothing but rounding is left."""
    teacher = Straight(transport=transport)
    there = gradient(objective, Straight(transport=transport), corners(), teacher=teacher, transport=transport)
    aside = gradient(objective, Straight(1.2, 0.4, transport), corners(), teacher=teacher, transport=transport)
    assert there.norm() < 1e-2 * aside.norm()


@pytest.mark.parametrize(
    ("coarse", "fine", "phases", "factor"),
    [
        (CM(order=1, intervals=(20, 20)), CM(order=1, intervals=(40, 40)), 1, 2**4),
        (CM(order=2, intervals=(20, 20)), CM(order=2, intervals=(40, 40)), 1, 2**6),
        (LCM(guidance=1, skip=200, huber=1), LCM(guidance=1, skip=100, huber=1), 1, 2**4),
        (
            PCM(guidance=1, phases=1, skip=200, huber=1, adversarial=0),
            PCM(guidance=1, phases=1, skip=100, huber=1, adversarial=0),
            1,
            2**4,
        ),
        (
            PCM(guidance=1, phases=2, skip=200, huber=1, adversarial=0),
            PCM(guidance=1, phases=2, skip=100, huber=1, adversarial=0),
            2,
            2**4,
        ),
    ],
    ids=["cm-ddim", "cm-heun", "lcm", "pcm", "pcm-two-phases"],
)
def test_the_map_to_the_edge_is_a_fixed_point_of_distillation_to_the_solvers_order(
    coarse: Any, fine: Any, phases: int, factor: int
) -> None:
    """At the consistency field the squared loss is the solver's local error, squared: halved steps, twice the order."""

    def loss(objective: Any) -> float:
        later = [0.75 + 0.01 * i for i in range(20)]
        if isinstance(objective, CM):
            objective = replace(objective, times=UNIFORM, huber=None, weighting="none")
        else:  # the same later points, whatever the skip
            later = [(1000 * t - objective.skip + 0.5) / (1001 - objective.skip) for t in later]
        student = Phased(phases) if phases > 1 else OneStep()
        return objective(networks(student, GaussianField([MEAN], STD)), corners(later), {}).total.item()

    assert factor / 2 < loss(coarse) / loss(fine) < factor * 2


TRAININGS = {
    "cm": CM(mode="training", intervals=(1280, 1280), huber=None, times=UNIFORM),
    "scm-difference": SCM(mode="training", c=None, warmup=0, times=UNIFORM),
    "scm-jvp": SCM(mode="training", c=None, warmup=0, times=UNIFORM, derivative="jvp"),
    "ucgm": UCGM(zeta=0, clip=None, theta=(1, 1)),
    "ucgm-enhanced": UCGM(zeta=2, clip=None, theta=(1, 1)),
}


@pytest.mark.parametrize("objective", TRAININGS.values(), ids=TRAININGS.keys())
def test_the_one_step_map_is_a_fixed_point_of_training_in_expectation(objective: Any) -> None:
    """From single samples, whose own direction is right only on average; at each time by itself."""
    teacher = GaussianField([MEAN], STD)
    for time in TIMES:
        there = gradient(objective, OneStep(), corners([time]), teacher=teacher)
        velocity = gradient(objective, GaussianField([MEAN], STD), corners([time]), teacher=teacher)
        assert there.norm() < 2e-2 * velocity.norm(), time
