"""A short run of every method from the exact velocity: its few-step pictures come nearer to the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closed_forms import GaussianField, gaussian_endpoint, gaussian_velocity, held
from exact_fields import MEAN, STD, Bent, BentJump, Stream, networks
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from apexflow.conditioning import Condition
from apexflow.objectives import Batch, Networks, objectives
from apexflow.objectives.apex import APEX
from apexflow.objectives.cm import CM
from apexflow.objectives.ctm import CTM
from apexflow.objectives.dmd2 import DMD2
from apexflow.objectives.lcm import LCM
from apexflow.objectives.meanflow import MeanFlow
from apexflow.objectives.pcm import PCM
from apexflow.objectives.rcgm import RCGM
from apexflow.objectives.sana_sprint import SanaSprint
from apexflow.objectives.scm import SCM
from apexflow.objectives.twinflow import TwinFlow
from apexflow.objectives.ucgm import UCGM
from apexflow.sampler import sample, time_grid

ROWS, ITERATIONS = 64, 200


class Branches(Bent):
    """As `Bent`, with a correction of its own for shifted conditions; plain ones are all ones."""

    def __init__(self) -> None:
        super().__init__()
        self.shifted = Bent()

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        plain = c.embeds.mean((1, 2)) == 1
        return torch.where(plain[:, None], super().forward(x_t, t, c), self.shifted(x_t, t, c))


class Judge(nn.Module):
    """Logits (B, 2), linear in a point's coordinates, their squares and the time."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 2)
        nn.init.zeros_(self.head.weight)

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        return self.head(torch.cat([x_t, x_t**2, t[:, None]], 1))


RUNS: dict[str, tuple[Any, int]] = {
    "apex": (APEX(guidance=1), 1),
    "cm": (CM(), 1),
    "cm, training": (CM(mode="training"), 1),
    "scm": (SCM(), 1),
    "scm, training": (SCM(mode="training", derivative="jvp"), 1),
    "ucgm": (UCGM(), 1),
    "lcm": (LCM(guidance=1), 1),
    "pcm, one phase": (PCM(guidance=1, phases=1, adversarial=0), 1),
    "pcm": (PCM(guidance=1), 4),
    "ctm": (CTM(), 1),
    "meanflow": (MeanFlow(), 1),
    "meanflow, distilled": (MeanFlow(share=0.75, velocity="teacher", derivative="difference"), 1),
    "rcgm": (RCGM(guidance=1, velocity="teacher", stride=0.05), 1),
    "twinflow": (TwinFlow(RCGM(guidance=1, velocity="teacher", stride=0.05)), 1),
    "dmd2": (DMD2(guidance=1, student_every=2), 1),
    "sana_sprint": (SanaSprint(SCM()), 1),
}
IN_DISTRIBUTION = {"apex", "dmd2"}  # they do not say which picture a noise becomes


def test_every_method_but_flow_matching_runs_here() -> None:
    assert {name.partition(",")[0] for name in RUNS} == set(objectives()) - {"flow_matching"}


def cast(objective: Any, student: nn.Module) -> tuple[Networks, list[nn.Parameter]]:
    """The networks of a run, and all that is trained."""
    further: Any = {one.name: Bent() if one.kind == "field" else Judge() for one in objective.further}
    frozen = {name: held(network, network.parameters) for name, network in further.items()}
    roles = networks(student, GaussianField([MEAN, MEAN], STD))
    roles = Networks(student, student, roles.teacher, further=further, frozen={**roles.frozen, **frozen})
    return roles, [p for network in (student, *further.values()) for p in network.parameters()]


def error(name: str, steps: int, student: nn.Module, c: Condition) -> float:
    """Mean square distance from the ends of the exact flow; or of the moments from the data's."""
    noise = torch.randn(256, 2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ends = sample(lambda x_t, t: student(x_t, t, c), noise, time_grid(steps).float())
    if name in IN_DISTRIBUTION:
        return ((ends.mean() - MEAN) ** 2 + (ends.std() - STD) ** 2).item()
    return (ends - gaussian_endpoint(noise, MEAN, STD)).square().mean().item()


@pytest.mark.parametrize("name", RUNS)
def test_a_short_run_from_the_exact_velocity_lowers_the_few_step_error(name: str) -> None:
    objective, steps = RUNS[name]
    student: Any = BentJump() if "second_time" in objective.needs else Branches() if name == "apex" else Bent()
    c, many = Condition(torch.ones(ROWS, 1, 1)), Condition(torch.ones(256, 1, 1))
    roles, trained = cast(objective, student)
    before = error(name, steps, student, many)
    assert before > 1e-3
    random: Any = Stream(ROWS)
    optimizer = torch.optim.Adam(trained, lr=2e-2)
    average = AveragedModel(student)  # as a run saves it: those who chase their own pictures go in circles
    for i in range(ITERATIONS):
        x = MEAN + STD * random.normal((2,))
        batch = Batch(x, c, random, torch.arange(ROWS), ROWS, i / ITERATIONS, i)
        optimizer.zero_grad()
        objective(roles, batch, {}).everything.backward()
        optimizer.step()
        if i >= ITERATIONS / 2:
            average.update_parameters(student)
    assert error(name, steps, average, many) < before / 3
    torch.testing.assert_close(
        roles.teacher(x, x[:, 0].sigmoid(), c), gaussian_velocity(MEAN, STD)(x, x[:, 0].sigmoid())
    )
