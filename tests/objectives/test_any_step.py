"""Methods with a second time: CTM, MeanFlow, RCGM and TwinFlow against the exact flow map, and what each asks."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from closed_forms import (
    EVERY_TRANSPORT,
    GaussianField,
    gaussian_velocity,
    make_batch,
    make_roles,
    mixture_velocity,
    quadrature,
)
from exact_fields import MEAN, STD, AnyStep, Instant, Smooth, corners, gradient, networks
from mixtures import Repeating
from torch import Tensor, nn

from apexflow.conditioning import Condition
from apexflow.objectives import Batch
from apexflow.objectives.ctm import CTM
from apexflow.objectives.derivative import derivative, speed
from apexflow.objectives.flow_matching import FlowMatching
from apexflow.objectives.meanflow import MeanFlow
from apexflow.objectives.rcgm import ANY, JUMP, RCGM, SHORT, length_weight, short_tailed
from apexflow.objectives.times import TimeLaw
from apexflow.objectives.twinflow import FAKE, TwinFlow
from apexflow.transport import LINEAR, Transport, expand

UNIFORM = TimeLaw("uniform")


class SmoothJump(Smooth):
    """A smooth network that hears the second time as well."""

    def forward(self, x_t: Tensor, t: Tensor, c: Condition, s: Tensor | None = None) -> Tensor:
        F = super().forward(x_t, t, c)
        return F if s is None else F + expand(s.sin(), F) * x_t.tanh()


def two_times(times: list[float]) -> Batch:
    """The moments of the Gaussian at each time, each time with another earlier one."""
    batch: Any = corners(times)
    return replace(batch, random=Repeating(batch.random.z, batch.random.u), rows=batch.rows * 0 + ANY)


def test_the_flow_map_is_exact_and_has_the_velocity_as_its_limit() -> None:
    x_t, t = torch.randn(6, 1).double(), torch.linspace(0.3, 1, 6).double()
    whole = LINEAR.move(AnyStep()(x_t, t, None, 0 * t), x_t, t, 0 * t)  # type: ignore[arg-type]
    half = LINEAR.move(AnyStep()(x_t, t, None, t / 2), x_t, t, t / 2)  # type: ignore[arg-type]
    rest = LINEAR.move(AnyStep()(half, t / 2, None, 0 * t), half, t / 2, 0 * t)  # type: ignore[arg-type]
    torch.testing.assert_close(whole, rest)
    torch.testing.assert_close(AnyStep()(x_t, t, None, t), gaussian_velocity(MEAN, STD)(x_t, t))  # type: ignore[arg-type]


# -- Fixed points ------------------------------------------------------------------------------------------------------

DISTILLATIONS = {
    "ctm": (CTM(huber=None, matching=0, pieces=8, intervals=6), 1e-2),
    "meanflow-jvp": (MeanFlow(share=1, velocity="teacher", p=0, times=UNIFORM), 1e-4),
    "meanflow-difference": (MeanFlow(share=1, velocity="teacher", p=0, times=UNIFORM, derivative="difference"), 1e-2),
    "rcgm": (RCGM(velocity="teacher", guidance=1, clip=None, stride=0.002, c=100), 3e-2),
    "twinflow-base": (TwinFlow(RCGM(velocity="teacher", guidance=1, clip=None, stride=0.002, c=100), rectify=0), 3e-2),
}


@pytest.mark.parametrize(("objective", "tolerance"), DISTILLATIONS.values(), ids=DISTILLATIONS.keys())
def test_the_exact_flow_map_is_a_fixed_point_of_distillation(objective: Any, tolerance: float) -> None:
    """Where the exact mean directions stand still, those of another Gaussian are moved, and so is the velocity alone."""
    teacher = GaussianField([MEAN], STD)

    def norm(student: nn.Module) -> Tensor:
        return gradient(objective, student, two_times([0.2, 0.4, 0.6, 0.8, 0.95]), teacher=teacher).norm()

    assert norm(AnyStep()) < tolerance * min(norm(AnyStep(1.2, 0.4)), norm(Instant([MEAN], STD)))


def test_meanflow_from_samples_has_its_fixed_point_in_expectation() -> None:
    for times in ([0.3], [0.6], [0.9]):
        batch = corners(times)
        objective = MeanFlow(share=0, p=0, times=UNIFORM)
        there = gradient(objective, AnyStep(), batch).norm()
        assert there < 1e-4 * gradient(objective, AnyStep(1.2, 0.4), batch).norm()


@pytest.mark.parametrize("means", [(0.7,), (-1.5, 1.0)], ids=["gaussian", "mixture"])
def test_the_velocity_of_a_mixture_is_the_fixed_point_where_both_times_agree(means: tuple[float, ...]) -> None:
    """The target of MeanFlow at s = t is the sample's velocity, whose mean the exact field is."""
    x, z, weights = quadrature(means, 0.6, nodes=48)
    t = torch.full((len(x),), 0.6, dtype=torch.float64)
    x_t = LINEAR.interpolate(x, z, t)
    exact = mixture_velocity(torch.tensor(means, dtype=torch.float64)[:, None], 0.6)

    def student(x_t: Tensor, t: Tensor, c: Condition, s: Tensor) -> Tensor:
        return exact(x_t, t)

    target = MeanFlow()._target(networks(student), exact(x_t, t), x, z, t, t, make_batch(len(x)).c)
    torch.testing.assert_close(target, z - x, rtol=1e-6, atol=1e-6)
    pulls = [abs((weights * ((exact(x_t, t) - target) * feature)[:, 0]).sum().item()) for feature in (x_t**0, x_t)]
    assert max(pulls) < 1e-5


# -- Reductions --------------------------------------------------------------------------------------------------------


@EVERY_TRANSPORT
def test_meanflow_with_equal_times_is_flow_matching(transport: Transport) -> None:
    objective = MeanFlow(share=0, p=0, times=TimeLaw())
    ours, theirs = make_roles(objective), make_roles(objective)
    objective(ours.networks(transport=transport), make_batch(), {}).total.backward()
    asked = ours.calls("student")[0]
    assert asked.s is not None and torch.equal(asked.t, asked.s)
    call = theirs.student(asked.x_t, asked.t, asked.c, asked.s)
    z = (asked.x_t - expand(transport.gamma(asked.t), call) * make_batch().x) / expand(transport.alpha(asked.t), call)
    error = call - transport.target(make_batch().x, z, asked.t)
    error.square().flatten(1).sum(1).mean().backward()
    torch.testing.assert_close(ours.gradients("student"), theirs.gradients("student"), rtol=2e-3, atol=1e-3)


@EVERY_TRANSPORT
def test_rcgm_within_its_stride_is_flow_matching(transport: Transport) -> None:
    objective, student = RCGM(guidance=1, clip=None, stride=0.02), make_roles(RCGM()).student
    x, z = make_batch().x, torch.randn(6, 1, 4, 4)
    t = torch.linspace(0.2, 0.9, 6)
    for gap in (0.0, 0.01):
        losses, F = objective.rows(networks(student, transport=transport), x, z, t, t - gap, make_batch().c)
        expected = short_tailed(F - transport.target(x, z, t), objective.c) * length_weight(t, t - gap)
        torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-5)


def test_ctms_matching_is_flow_matching_at_equal_times() -> None:
    objective = CTM(intervals=1, pieces=1, times=UNIFORM)
    roles = make_roles(objective)
    losses = objective(roles.networks(), batch := make_batch(), {})
    asked = roles.calls("student")[-1]
    assert asked.s is not None and torch.equal(asked.s, asked.t) and asked.graph
    z = (asked.x_t - (1 - asked.t[:, None, None, None]) * batch.x) / asked.t[:, None, None, None]
    expected = (asked.F - (z - batch.x)).square().mean()
    torch.testing.assert_close(losses.terms["matching"], expected, rtol=1e-3, atol=1e-5)


# -- Derivatives -------------------------------------------------------------------------------------------------------


@EVERY_TRANSPORT
def test_meanflows_difference_approaches_its_jvp_to_second_order(transport: Transport) -> None:
    batch = corners()

    def target(**options: Any) -> Tensor:
        objective = MeanFlow(**options)
        t = torch.linspace(0.3, 0.8, batch.total).double()
        z = batch.random.normal(())
        student = SmoothJump(transport)
        F = student(transport.interpolate(batch.x, z, t), t, batch.c, t / 2)
        return objective._target(networks(student, transport=transport), F, batch.x, z, t, t / 2, batch.c).detach()

    exact = target()
    errors = [(target(derivative="difference", epsilon=e) - exact).norm().item() for e in (0.04, 0.02, 0.01)]
    assert errors[2] < 1e-2 * exact.norm()
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.25)


@EVERY_TRANSPORT
def test_speed_is_how_the_point_moves_by_the_prediction(transport: Transport) -> None:
    t, F, x_t = torch.linspace(0.2, 0.9, 5).double(), torch.randn(5, 2).double(), torch.randn(5, 2).double()
    h = 1e-5
    steps = [(transport.move(part, x_t, t, t - h) - transport.move(0 * F, x_t, t, t - h)) / -h for part in (F,)]
    torch.testing.assert_close(steps[0], expand(speed(t, transport), F) * F, rtol=1e-3, atol=1e-3)


def test_a_network_without_forward_derivatives_is_told_what_to_do() -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

    with pytest.raises(Exception, match=r"set objective\.derivative=difference"):
        derivative(lambda t: Opaque.apply(t)[:, None], torch.rand(3), "jvp", 0.01, lambda t: t)


# -- What is asked -----------------------------------------------------------------------------------------------------


def test_meanflow_splits_the_rows_by_its_share() -> None:
    for share in (0.0, 0.25, 1.0):
        roles = make_roles(MeanFlow())
        MeanFlow(share=share)(roles.networks(), batch := make_batch(16), {})
        call = roles.calls("student")[0]
        assert call.s is not None and bool((call.s <= call.t).all())
        assert torch.equal(call.s < call.t, batch.chosen(share))


def test_ctm_jumps_down_the_grid_and_teachers_lead_part_of_the_way() -> None:
    roles = make_roles(CTM())
    CTM(matching=0)(roles.networks(), make_batch(64), {})
    jump, minus = roles.calls("student")[0], roles.calls("reference")[0]
    assert jump.s is not None and minus.s is not None and torch.equal(jump.s, minus.s)
    assert bool((minus.t < jump.t).all()) and bool((jump.s <= minus.t).all())
    assert bool((jump.s == 0).any()) and bool((jump.s > 0).any()) and bool((minus.t > jump.s).any())


def test_ctm_passes_gradients_through_theta_minus_alone_to_the_jump() -> None:
    roles = make_roles(CTM())
    CTM(matching=0)(roles.networks(), make_batch(), {}).total.backward()
    assert all(g is not None and g.any() for g in roles.gradients("student"))
    assert all(g is None for g in roles.gradients("reference"))


def test_rcgm_asks_theta_minus_along_its_own_path() -> None:
    objective = RCGM(order=3, target="reference", guidance=1)
    roles = make_roles(objective)
    objective(roles.networks(), make_batch(), {})
    (asked,), minus = roles.calls("student"), roles.calls("reference")
    assert asked.s is not None and len(minus) == 3
    torch.testing.assert_close(minus[0].t, torch.maximum(asked.t - 0.01, asked.s))
    for one, following in pairwise(minus):
        assert one.s is not None and torch.equal(one.s, following.t)
        torch.testing.assert_close(following.x_t, LINEAR.move(one.F, one.x_t, one.t, one.s))
    assert minus[-1].s is not None
    torch.testing.assert_close(minus[-1].s, asked.s)


def test_a_third_of_rcgms_rows_jump_from_noise_to_data() -> None:
    """And a third over a short stretch; or all between any two times."""
    for jumps in ("thirds", "any"):
        roles = make_roles(RCGM())
        RCGM(guidance=1, jumps=jumps)(roles.networks(), batch := make_batch(48), {})
        (asked,) = roles.calls("student")
        assert asked.s is not None
        kind = batch.rows.remainder(3)
        whole, near = (asked.t == 1) & (asked.s == 0), asked.t - asked.s <= 0.05 * asked.t + 1e-6
        if jumps == "thirds":
            assert torch.equal(whole, kind == JUMP) and bool(near[kind == SHORT].all())
            assert not near[kind == ANY].all()
        else:
            assert not whole.any() and near.sum() < 16


def test_the_weight_of_the_short_tailed_loss_has_no_gradient() -> None:
    error = torch.tensor([[3.0, -1.0], [0.02, 0.01]], requires_grad=True)
    (slope,) = torch.autograd.grad(short_tailed(error, 0.1).sum(), error)
    weight = 1 / (error.detach().square().mean(1, keepdim=True) / 0.1**2 + 1).sqrt()
    torch.testing.assert_close(slope, weight * error.detach() / 0.1)


def test_short_jumps_weigh_more() -> None:
    t, s = torch.tensor([1.0, 0.5, 0.5]), torch.tensor([0.0, 0.0, 0.5])
    expected = [1.0, 1 + math.tan(0.5 * math.pi / 2.5), 1 + math.tan(math.pi / 2.5)]
    assert length_weight(t, s).tolist() == pytest.approx(expected) and expected == sorted(expected)


def test_the_adaptive_weight_of_meanflow_has_no_gradient() -> None:
    """With p = 1 a row has the gradient 2 error / (error^2 + c); were there one in the weight too, next to none would be left."""
    roles, batch = make_roles(MeanFlow()), make_batch()
    MeanFlow(share=0)(roles.networks(), batch, {}).total.backward()
    asked = roles.calls("student")[0]
    other = make_roles(MeanFlow())
    F = other.student(asked.x_t, asked.t, asked.c, asked.s)
    squared = (F - (asked.x_t - batch.x) / asked.t[:, None, None, None]).square().flatten(1).sum(1)
    (squared / (squared.detach() + 1e-3)).mean().backward()
    torch.testing.assert_close(roles.gradients("student"), other.gradients("student"), rtol=2e-3, atol=1e-4)


def test_twinflow_tells_fakes_by_a_negative_second_time() -> None:
    roles = make_roles(TwinFlow())
    TwinFlow(RCGM(guidance=1))(roles.networks(), batch := make_batch(16), {})
    calls = roles.calls("student")
    kind = batch.rows.remainder(4)
    first = calls[0]
    assert first.s is not None and first.t.shape == (12,)
    assert bool((first.t[kind[kind != FAKE] == JUMP] == 1).all())
    gaps = (first.t - first.s)[kind[kind != FAKE] == SHORT]
    assert bool((gaps <= 0.05 * first.t[kind[kind != FAKE] == SHORT] + 1e-6).all())
    negative = [call for call in calls if call.s is not None and bool((call.s < 0).all())]
    assert [call.graph for call in negative] == [False, True]  # rectify looks, the fakes' rows learn
    for call in negative:
        assert call.s is not None and torch.equal(call.s, -call.t)


@pytest.mark.parametrize(("fake", "sign"), [(-1.0, 1.0), (3.0, -1.0)])
def test_twinflows_rectification_moves_the_picture_towards_the_data(fake: float, sign: float) -> None:
    """A student that makes N(fake, std^2) in one step, and knows both velocities: descent moves its picture to the data."""

    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.tensor([fake]))

        def forward(self, x_t: Tensor, t: Tensor, c: Condition, s: Tensor) -> Tensor:
            if bool((s == 0).all()):
                return x_t * (1 - STD) - self.mean
            return gaussian_velocity(fake if bool((s < 0).all()) else MEAN, STD)(x_t, t)

    student = Twin()
    batch = make_batch(x=torch.zeros(32, 1))
    z = torch.randn(8, 1)
    objective = TwinFlow(clip=None)
    one = torch.ones(8)
    F = student(z, one, batch.c[:8], 0 * one)
    objective._rectify(networks(student), batch, batch.rows.remainder(4) == JUMP, F, z, batch.c[:8]).backward()
    assert student.mean.grad is not None and sign * -student.mean.grad.item() > 0


@pytest.mark.parametrize(
    "objective", [MeanFlow(guidance=3), MeanFlow(guidance=3, velocity="teacher"), RCGM(), CTM(guidance=2)]
)
def test_guidance_needs_a_null_condition(objective: Any) -> None:
    roles = make_roles(objective)
    assert objective(roles.networks(), make_batch(), {}).total.isfinite()
    with pytest.raises(ValueError, match="null"):
        objective(replace(roles.networks(), null=None), make_batch(), {})


@pytest.mark.parametrize("kappa", [0.0, 0.4])
def test_meanflows_guided_field_has_a_share_of_its_own_answer(kappa: float) -> None:
    roles, batch = make_roles(MeanFlow()), make_batch()
    loss = MeanFlow(share=0, guidance=3, kappa=kappa, p=0, drop=0)(roles.networks(), batch, {}).total
    asked, null, *own = roles.calls("student")
    t = asked.t[:, None, None, None]
    v = (asked.x_t - batch.x) / t  # z - x
    omega = 3 * (1 - kappa)
    guided = omega * v + (1 - omega - kappa) * null.F
    if kappa:
        guided = guided + kappa * own[0].F
        assert own[0].s is not None and torch.equal(own[0].s, own[0].t)
    expected = (asked.F - guided).square().sum() / batch.total
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


def test_a_tenth_of_meanflows_rows_learn_the_field_without_a_condition() -> None:
    """Where it guides itself by that field; the target of these rows is not guided."""
    objective = MeanFlow(share=0, guidance=3, p=0, drop=0.5)
    roles, batch = make_roles(objective), make_batch(32)
    loss = objective(roles.networks(), batch, {}).total.detach()
    asked, null, *_ = roles.calls("student")
    dropped = (asked.c.embeds == null.c.embeds).flatten(1).all(1)
    assert 4 < int(dropped.sum()) < 28
    t = asked.t[:, None, None, None]
    v = (asked.x_t - batch.x) / t
    target = torch.where(dropped[:, None, None, None], v, 3 * v - 2 * null.F)
    torch.testing.assert_close(loss, (asked.F - target).square().sum() / batch.total, rtol=1e-3, atol=0)
    assert MeanFlow().drop == 0.1
    for other in (MeanFlow(drop=0.5), MeanFlow(guidance=3, velocity="teacher", drop=0.5)):
        roles = make_roles(other)
        other(roles.networks(), batch, {})
        assert torch.equal(roles.calls("student")[0].c.embeds, batch.c.embeds)


def test_flow_matching_never_asks_with_a_second_time() -> None:
    roles = make_roles(MeanFlow())
    FlowMatching()(roles.networks(), make_batch(), {})
    assert roles.calls("student")[0].s is None
