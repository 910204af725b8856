"""The scale of guidance that a method is given is the one that it trains in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from closed_forms import make_batch, make_condition, make_roles
from exact_fields import UNIFORM, networks
from mixtures import Mixture
from torch import Tensor, nn

from apexflow.conditioning import Condition, guide
from apexflow.objectives import Batch, Networks
from apexflow.objectives.ctm import CTM
from apexflow.objectives.meanflow import MeanFlow
from apexflow.objectives.rcgm import RCGM
from apexflow.objectives.teacher import teach
from apexflow.objectives.twinflow import TwinFlow
from apexflow.objectives.ucgm import UCGM

# The second row's time is where guidance begins; where none is as noisy, none is guided.
ABOVE = pytest.mark.parametrize(
    ("times", "guided"), [([0.2, 0.5, 0.9], [False, True, True]), ([0.2, 0.3, 0.4], [False] * 3)]
)
NULL = make_condition(1, seed=99)
PROMPTED, ANYTHING = Mixture([1.0]), Mixture([-0.5])
Loss = Callable[[Networks, Batch, Any], Any]
# Squared, and within the stride: the target is the guided velocity itself.
SHORT: Any = {"clip": None, "c": 100, "stride": 0.49, "target": "student"}


class Guided(nn.Module):
    """The exact velocities with and without a condition, the former guided by a scale; a correction that starts at nothing."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.weights = scale, nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, c: Condition, s: Tensor | None = None) -> Tensor:
        t = t.to(x_t)
        null = ANYTHING.velocity(x_t, t)
        if torch.equal(c.embeds, NULL.embeds.expand_as(c.embeds)):
            return null
        slope, shift = self.weights
        return guide(PROMPTED.velocity(x_t, t), null, self.scale) + slope * x_t + shift


METHODS: dict[str, Callable[[float], Loss]] = {
    "rcgm": lambda scale: RCGM(guidance=scale, **SHORT),
    "twinflow": lambda scale: TwinFlow(RCGM(guidance=scale, **SHORT), rectify=0),
    "meanflow": lambda scale: MeanFlow(share=0, guidance=scale, p=0, drop=0, times=UNIFORM),
    "meanflow, kappa": lambda scale: MeanFlow(share=0, guidance=scale, kappa=0.4, p=0, drop=0, times=UNIFORM),
    "ucgm": lambda scale: UCGM(lam=0, theta=(1, 1), threshold=1, guidance=scale),
    "ucgm, zeta 1/2": lambda scale: UCGM(lam=0, theta=(1, 1), threshold=1, zeta=0.5, guidance=scale),
    "ctm": lambda scale: lambda given, batch, memory: CTM(times=UNIFORM, guidance=scale)._matching(given, batch),
}


@pytest.mark.parametrize("scale", [1.5, 2.5, 5.0])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_the_field_guided_by_the_given_scale_is_the_fixed_point(method: Callable[[float], Loss], scale: float) -> None:
    teacher = Guided(1.0)

    def pull(student: Guided) -> Tensor:
        given = replace(networks(student, teacher), null=NULL)
        answer: Any = method(scale)(given, PROMPTED.rows([0.4], 24), {})
        return torch.autograd.grad(getattr(answer, "total", answer), [student.weights])[0].norm()

    assert pull(Guided(scale)) < 1e-2 * min(pull(Guided(scale - 0.4)), pull(Guided(scale + 0.4)))


def test_the_ratio_that_rcgms_authors_use_is_a_scale_of_five() -> None:
    assert 1 - 1 / RCGM().guidance == pytest.approx(0.8)


@pytest.mark.parametrize("at_once", [False, True])
@ABOVE
def test_guidance_from_a_time_on_leaves_the_rows_below_alone(
    times: list[float], guided: list[bool], at_once: bool
) -> None:
    """Only rows that are guided are asked without caption; one at least, so that every process asks equally often."""
    roles, batch, t = make_roles(), make_batch(3), torch.tensor(times)
    networks = replace(roles.networks(guided_at_once=at_once), null=NULL)
    plain, whole, found = (
        teach(networks, batch.x, t, batch.c, *scale).detach() for scale in ((1.0,), (3.0,), (3.0, 0.5))
    )
    expected = torch.where(torch.tensor(guided).view(-1, 1, 1, 1), whole, plain)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(whole, plain)
    rows = [len(call.t) for call in roles.calls("teacher")][-(1 if at_once else 2) :]
    assert sum(rows) == 3 + max(sum(guided), 1)
