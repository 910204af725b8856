"""sCM: TrigFlow on any transport, derivatives, tangents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closed_forms import EVERY_TRANSPORT, GaussianField, gaussian_velocity
from exact_fields import (
    MEAN,
    STD,
    TIMES,
    UNIFORM,
    OneStep,
    Smooth,
    Straight,
    corners,
    gradient,
    networks,
    norm,
)
from torch import Tensor, nn

from apexflow.conditioning import Condition
from apexflow.objectives.scm import SCM, angle, angular_prediction
from apexflow.transport import LINEAR, TRIGONOMETRIC, Transport, expand


@pytest.mark.parametrize("derivative", ["difference", "jvp"])
@EVERY_TRANSPORT
def test_the_one_step_map_is_a_fixed_point_of_scm_distillation(transport: Transport, derivative: Any) -> None:
    def velocity(x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        return gaussian_velocity(MEAN, STD, transport)(x_t, t)

    objective = SCM(times=UNIFORM, warmup=0, c=None, derivative=derivative, epsilon=2e-3)
    there = gradient(objective, OneStep(transport=transport), corners(), teacher=velocity, transport=transport)
    aside = gradient(objective, OneStep(1.1, STD, transport), corners(), teacher=velocity, transport=transport)
    assert there.norm() < 1e-3 * aside.norm()


def test_tangent_warmup_begins_at_the_teachers_field_and_ends_at_the_one_step_map() -> None:
    objective, teacher = SCM(times=UNIFORM, warmup=0.2), GaussianField([MEAN], STD)

    def norm(student: nn.Module, progress: float) -> float:
        return gradient(objective, student, corners(progress=progress), teacher=teacher).norm().item()

    begin, middle, end = ((norm(GaussianField([MEAN], STD), p), norm(OneStep(), p)) for p in (0.0, 0.1, 0.2))
    assert begin[0] < 1e-6 < begin[1]
    assert end[1] < 1e-2 * end[0]
    assert 0 < middle[0] < end[0] and 0 < middle[1] < begin[1]
    assert norm(OneStep(), 1.0) == end[1]


@EVERY_TRANSPORT
def test_the_central_difference_approaches_the_jvp_to_second_order(transport: Transport) -> None:
    def vector(**options: Any) -> Tensor:
        objective = SCM(times=UNIFORM, warmup=0, c=None, **options)
        return gradient(objective, Smooth(transport), corners(), teacher=Straight(transport=transport), **role)

    role = {"transport": transport}
    exact = vector(derivative="jvp")
    errors = [(vector(epsilon=epsilon) - exact).norm().item() for epsilon in (0.04, 0.02, 0.01)]
    assert errors[2] < 1e-2 * exact.norm()
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.25)


def test_trigflow_is_the_same_method_on_every_transport() -> None:
    """At equal angles the same function gives the same loss, whether its network speaks linear or trigonometric."""
    objective = SCM(times=UNIFORM, warmup=0, derivative="jvp")
    linear, batch = torch.tensor(TIMES), corners()
    trigonometric = corners((angle(linear, LINEAR) * 2 / torch.pi).tolist())
    losses = [
        objective(networks(Smooth(on), Straight(transport=on), on), rows, {}).total.item()
        for on, rows in ((LINEAR, batch), (TRIGONOMETRIC, trigonometric))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] > 1e-3


@EVERY_TRANSPORT
def test_an_angular_prediction_implies_the_same_endpoint(transport: Transport) -> None:
    """TrigFlow, Eq. (5): `cos x_trig - sin F_trig` is our endpoint, and F_trig = n F + (1 - 2t) x_trig if linear."""
    F, x_t, t = torch.randn(6, 1).double(), torch.randn(6, 1).double(), torch.tensor(TIMES)
    theta, x_trig = angle(t, transport), x_t / expand(norm(t, transport), x_t)
    F_trig = angular_prediction(F, x_t, t, transport)
    end = expand(theta.cos(), F) * x_trig - expand(theta.sin(), F) * F_trig
    torch.testing.assert_close(end, transport.endpoint(F, x_t, t), rtol=1e-4, atol=1e-4)
    if transport is LINEAR:
        expected = expand(norm(t, LINEAR), F) * F + expand(1 - 2 * t, F) * x_trig
        torch.testing.assert_close(F_trig, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("c", "reduction", "norm"), [(0.1, "mean", 4.0), (0.1, "sum", 8.0), (None, "mean", None)])
def test_tangents_are_normalised_by_row(c: float | None, reduction: Any, norm: float | None) -> None:
    g = torch.tensor([4.0, -4.0, 4.0, 4.0]).expand(2, 4) * torch.tensor([[1.0], [0.0]])
    expected = g if norm is None else g / (norm + 0.1)
    torch.testing.assert_close(SCM(c=c, reduction=reduction)._normalised(g), expected)
