"""For every method of the table, on a Gaussian and on a mixture: what theory calls its fixed point is one.

A new method adds its line to one of the three tables below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from exact_fields import UNIFORM, networks
from mixtures import Around, Mixture
from torch import Tensor

from apexflow.objectives import Batch, Networks, objectives
from apexflow.objectives.apex import APEX
from apexflow.objectives.cm import CM
from apexflow.objectives.ctm import CTM
from apexflow.objectives.dmd2 import DMD2
from apexflow.objectives.flow_matching import FlowMatching
from apexflow.objectives.lcm import LCM
from apexflow.objectives.meanflow import MeanFlow
from apexflow.objectives.pcm import PCM
from apexflow.objectives.rcgm import RCGM
from apexflow.objectives.sana_sprint import SanaSprint
from apexflow.objectives.scm import SCM
from apexflow.objectives.twinflow import TwinFlow
from apexflow.objectives.ucgm import UCGM

EITHER = pytest.mark.parametrize("data", [Mixture([0.7]), Mixture([-1.2, 1.0])], ids=["gaussian", "mixture"])
Loss = Callable[[Networks, Batch, Any], Any]

# Path loss of APEX alone, plainly squared.
PATH: Any = {"endpoint_weight": 0, "share": 0, "clip": None, "p": 0, "guidance": 1, "lambda_law": "constant"}
# RCGM's loss near the origin, where it is squared; jumps no longer than the stride are flow matching.
SQUARED: Any = {"guidance": 1, "clip": None, "c": 100, "target": "student"}
SHORT, LONG = RCGM(stride=0.49, **SQUARED), RCGM(stride=0.002, velocity="teacher", **SQUARED)

# The exact velocity is a fixed point in expectation over the samples' own velocities, at equal times where there are two.
VELOCITY: dict[str, Loss] = {
    "flow_matching": FlowMatching(UNIFORM),
    "apex": APEX(lambda_max=0, path_velocity="sample", times=UNIFORM, **PATH),
    "ucgm": UCGM(lam=0, zeta=0, theta=(1, 1)),
    "meanflow": MeanFlow(share=0, p=0, times=UNIFORM),
    "rcgm": SHORT,
    "twinflow": TwinFlow(SHORT, rectify=0),
    "ctm": lambda networks, batch, memory: CTM(times=UNIFORM)._matching(networks, batch),
}

# The map to data (or, with a second time, the whole flow) is a fixed point, up to the solver's error.
MAP: dict[str, tuple[Loss, float]] = {
    "apex": (APEX(lambda_max=0.99, path_velocity="teacher", times=UNIFORM, **PATH), 3e-2),
    "cm": (CM(intervals=(400, 400), times=UNIFORM), 1e-2),
    "scm": (SCM(warmup=0, c=None, times=UNIFORM), 1e-3),
    "scm, jvp": (SCM(warmup=0, c=None, times=UNIFORM, derivative="jvp"), 1e-4),
    "sana_sprint": (SanaSprint(SCM(warmup=0, c=None, times=UNIFORM), weight=0, judge_times=UNIFORM), 1e-3),
    "lcm": (LCM(guidance=1, skip=1, target="student"), 3e-2),
    "pcm": (PCM(guidance=1, skip=1, phases=1, target="student", adversarial=0), 3e-2),
    "ctm": (CTM(huber=None, matching=0, pieces=16, intervals=6), 1e-2),
    "meanflow": (MeanFlow(share=1, velocity="teacher", p=0, times=UNIFORM, derivative="difference"), 1e-2),
    "meanflow, jvp": (MeanFlow(share=1, velocity="teacher", p=0, times=UNIFORM), 1e-4),
    "rcgm": (LONG, 3e-2),
    "twinflow": (TwinFlow(LONG, rectify=0), 3e-2),
    "ucgm": (UCGM(lam=1, zeta=0, clip=None, theta=(1, 1), epsilon=2e-3), 2e-2),
}
MIXED_OVER_SAMPLES = {"ucgm"}

# Nothing moves where the student's pictures have the teacher's distribution and the critic knows it.
MATCHING = {"dmd2": DMD2(guidance=1, gan=0)}


def test_every_method_has_its_fixed_point_here() -> None:
    named = {name.partition(",")[0] for name in (*VELOCITY, *MAP, *MATCHING)}
    assert named == set(objectives())


def pull(loss: Loss, student: Around, batch: Batch, teacher: Mixture) -> Tensor:
    """How hard the loss pulls at the correction: the norm of its gradient."""
    roles = networks(student, lambda x_t, t, c: teacher.velocity(x_t, t.to(x_t)))
    judge = {"judge": lambda x_t, t, c: x_t}
    roles = replace(roles, frozen={**roles.frozen, **judge}, further={"critic": roles.teacher})
    answer = loss(roles, batch, {})
    (gradient,) = torch.autograd.grad(getattr(answer, "total", answer), [student.weights])
    return gradient.norm()


@EITHER
def test_the_mixtures_flow_is_exact(data: Mixture) -> None:
    x_t, t = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None], torch.linspace(0.3, 1, 7, dtype=torch.float64)
    half = data.carry(x_t, t, t / 2)
    torch.testing.assert_close(data.carry(half, t / 2, 0 * t), data.carry(x_t, t, 0 * t))
    step = (x_t - data.carry(x_t, t, t - 1e-5)) / 1e-5
    torch.testing.assert_close(step, data.velocity(x_t, t), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(data.direction(x_t, t, t), data.velocity(x_t, t))


@EITHER
@pytest.mark.parametrize("loss", VELOCITY.values(), ids=VELOCITY.keys())
def test_the_exact_velocity_is_a_fixed_point(loss: Loss, data: Mixture) -> None:
    aside = Mixture((data.means + 0.3).tolist())
    for time in (0.25, 0.6):
        there, elsewhere = (pull(loss, Around(one), data.rows([time], 48), data) for one in (data, aside))
        assert there < 1e-2 * elsewhere, time


@EITHER
@pytest.mark.parametrize("name", MAP)
def test_the_exact_map_is_a_fixed_point_and_the_velocity_is_not(name: str, data: Mixture) -> None:
    loss, tolerance = MAP[name]
    times, count = ([0.5], 48) if name in MIXED_OVER_SAMPLES else ([0.2, 0.4, 0.6, 0.8, 0.95], 4)
    there, velocity = (pull(loss, Around(data, jumps), data.rows(times, count), data) for jumps in (True, False))
    assert there < tolerance * velocity


@EITHER
@pytest.mark.parametrize("loss", MATCHING.values(), ids=MATCHING.keys())
def test_nothing_moves_where_the_distributions_agree(loss: Any, data: Mixture) -> None:
    """With the critic's distribution aside from the teacher's, the same pictures are moved."""
    batch, aside = data.rows([0.5], 8), Mixture((data.means + 0.3).tolist())
    assert pull(loss, Around(data, True), batch, data) < 1e-6

    def far(roles: Networks, batch: Batch, memory: Any) -> Any:
        return loss(replace(roles, further={"critic": lambda x_t, t, c: aside.velocity(x_t, t.to(x_t))}), batch, {})

    assert pull(far, Around(data, True), batch, data) > 1e-3
