"""Section 3 of the paper: Eq. 7-19 against closed forms, and Algorithm 1 with its readings."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from closed_forms import (
    Call,
    GaussianField,
    Roles,
    gaussian_velocity,
    make_batch,
    make_condition,
    make_roles,
    micro_batches,
    mixture_velocity,
    quadrature,
)
from torch import Tensor

import apexflow
from apexflow.conditioning import Condition
from apexflow.objectives import Batch, Field, Networks, Objective
from apexflow.objectives.apex import (
    APEX,
    adaptive_loss,
    adversarial_error,
    coefficient_difference,
    dual_loss,
    endpoint_difference,
    move,
    multi_scale_l2,
    primal_loss,
    residual,
    secant_target,
    shifting_error,
)
from apexflow.objectives.flow_matching import FlowMatching
from apexflow.objectives.times import TimeLaw
from apexflow.sampler import sample, shift_times, time_grid
from apexflow.transport import LINEAR, TRANSPORTS, Transport

ALL = pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS.keys())
# Path loss of Eq. 12-13 with theta-minus = theta, along the sample's own path, as plain least squares without clip.
PLAIN = {"reference": "student", "path_velocity": "sample", "clip": None, "p": 0.0}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ten_times(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, 10, dtype=torch.float64)


# -- Eq. 10-12: the secant target --------------------------------------------------------------------------------------


def test_linear_secant_target_is_the_closed_form() -> None:
    F_t, F_lt, x_t, x_lt = (draw(10, 3, seed=seed) for seed in range(4))
    t, lt = ten_times(0.3, 1), ten_times(0.1, 0.7)
    column, lower = t[:, None], lt[:, None]
    difference = (x_t - column * F_t) - (x_lt - lower * F_lt)
    torch.testing.assert_close(endpoint_difference(F_t, F_lt, x_t, x_lt, t, lt), difference)
    torch.testing.assert_close(coefficient_difference(t, lt, x_t), lower - column)
    secant = -difference / (column - lower)
    for clip in (1.0, 0.25, None):
        clipped = secant if clip is None else secant.clip(-clip, clip)
        torch.testing.assert_close(secant_target(F_t, F_lt, x_t, x_lt, t, lt, clip=clip), F_t - 2 * clipped)
    assert bool((secant.abs() > 1).any()) and bool((secant.abs() < 1).any())


def test_the_clip_of_one_is_the_default() -> None:
    parts, times = [draw(10, 3, seed=seed) for seed in range(4)], (ten_times(0.3, 1), ten_times(0.1, 0.7))
    assert torch.equal(secant_target(*parts, *times), secant_target(*parts, *times, clip=1.0))
    assert (secant_target(*parts, *times) - parts[0]).abs().max() == pytest.approx(2)


@ALL
def test_secant_target_is_the_ratio_of_endpoints_and_coefficients(transport: Transport) -> None:
    F_t, F_lt, x_t, x_lt = (draw(10, 3, seed=seed) for seed in range(4))
    t, lt = ten_times(0.3, 1), ten_times(0.1, 0.7)
    target = secant_target(F_t, F_lt, x_t, x_lt, t, lt, transport, clip=None)
    for row in range(10):
        one, other = t[row : row + 1], lt[row : row + 1]
        delta = transport.endpoint(F_t[row : row + 1], x_t[row : row + 1], one)
        delta = delta - transport.endpoint(F_lt[row : row + 1], x_lt[row : row + 1], other)
        expected = F_t[row] - 2 * delta[0] / (transport.a(one) - transport.a(other))
        torch.testing.assert_close(target[row], expected)


@ALL
def test_at_lambda_zero_the_secant_is_the_regression_error(transport: Transport) -> None:
    x, z, F_t, F_0 = (draw(10, 3, seed=seed) for seed in range(4))
    t = ten_times(0.1, 1)
    x_t = transport.interpolate(x, z, t)
    target = secant_target(F_t, F_0, x_t, x, t, 0 * t, transport, clip=None)
    torch.testing.assert_close(F_t - target, 2 * (F_t - transport.target(x, z, t)))


@ALL
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.9, 0.99])
def test_a_straight_field_has_no_secant_at_any_lambda(transport: Transport, lam: float) -> None:
    x, z, t = draw(10, 3), draw(10, 3, seed=1), ten_times(0.1, 1)
    F_t, F_lt = transport.target(x, z, t), transport.target(x, z, lam * t)
    x_t = transport.interpolate(x, z, t)
    x_lt = move(F_t, x_t, t, lam * t, transport)
    torch.testing.assert_close(x_lt, transport.interpolate(x, z, lam * t))
    target = secant_target(F_t, F_lt, x_t, x_lt, t, lam * t, transport)
    torch.testing.assert_close(target, F_t, rtol=0, atol=1e-9)


def test_a_linear_move_is_an_euler_step() -> None:
    F, x_t, t, s = draw(10, 3), draw(10, 3, seed=1), ten_times(0.5, 1), ten_times(0, 0.5)
    torch.testing.assert_close(move(F, x_t, t, s, LINEAR), x_t - (t - s)[:, None] * F)


@ALL
@pytest.mark.parametrize("means", [(0.7,), (-1.5, 1.0)], ids=["gaussian", "mixture"])
def test_an_exact_velocity_is_a_fixed_point_at_lambda_zero(transport: Transport, means: tuple[float, ...]) -> None:
    x, z, weights = quadrature(means, 0.6, nodes=48)
    exact = mixture_velocity(torch.tensor(means, dtype=torch.float64)[:, None], 0.6, transport)
    for time in (0.3, 0.7):
        t = torch.tensor([time], dtype=torch.float64)
        x_t = transport.interpolate(x, z, t)
        for offset, stays in ((0.0, True), (0.1, False)):
            F_t = exact(x_t, t) + offset
            error = F_t - secant_target(F_t, exact(x, 0 * t), x_t, x, t, 0 * t, transport, clip=None)
            pulls = [abs((weights * (error * feature)[:, 0]).sum().item()) for feature in (x_t**0, x_t, x_t**2)]
            assert (max(pulls) < 1e-6) is stays


# -- Eq. 7-8: the reference forms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.4, 0.9])
def test_primal_gradient_over_t_squared_is_the_dual_gradient(lam: float) -> None:
    x, z, F_t, F_lt = (draw(10, 3, seed=seed) for seed in range(4))
    F_t.requires_grad_(), F_lt.requires_grad_()
    t, lams = ten_times(0.1, 1), torch.full((10,), lam, dtype=torch.float64)
    x_t, x_lt = LINEAR.interpolate(x, z, t), LINEAR.interpolate(x, z, lam * t)
    primal = primal_loss(F_t, F_lt, x_t, x_lt, t, lam * t)
    dual = dual_loss(F_t, F_lt, z - x, lams)
    assert primal.shape == dual.shape == (10,)
    (from_primal,) = torch.autograd.grad(primal.sum(), F_t)
    (from_dual,) = torch.autograd.grad(dual.sum(), F_t)
    torch.testing.assert_close(from_primal / (t**2)[:, None], from_dual)
    assert from_dual.abs().max() > 0.1


def test_primal_and_dual_are_the_printed_sums() -> None:
    x, z, F_t, F_lt = (draw(10, 3, seed=seed) for seed in range(4))
    t, lam = ten_times(0.1, 1), ten_times(0, 0.9)
    x_t, x_lt = LINEAR.interpolate(x, z, t), LINEAR.interpolate(x, z, lam * t)
    primal, dual = primal_loss(F_t, F_lt, x_t, x_lt, t, lam * t), dual_loss(F_t, F_lt, z - x, lam)
    for i in range(10):
        ends = (x_t[i] - t[i] * F_t[i]) - (x_lt[i] - lam[i] * t[i] * F_lt[i])
        mixed = (1 - lam[i]) * (F_t[i] - z[i] + x[i]).dot(F_t[i] - z[i] + x[i])
        mixed = mixed + lam[i] * (F_t[i] - F_lt[i]).dot(F_t[i] - F_lt[i])
        torch.testing.assert_close(primal[i], ends.dot(ends))
        torch.testing.assert_close(dual[i], mixed)


def test_the_reference_forms_stop_at_the_reference() -> None:
    F_t, F_lt, x_t, x_lt = (draw(10, 3, seed=seed).requires_grad_() for seed in range(4))
    t, lt = ten_times(0.3, 1), ten_times(0.1, 0.7)
    loss = primal_loss(F_t, F_lt, x_t, x_lt, t, lt).sum() + dual_loss(F_t, F_lt, x_t, lt / t).sum()
    loss.backward()
    assert F_lt.grad is None and F_t.grad is not None


# -- Eq. 14: the multi-scale norm --------------------------------------------------------------------------------------


def plain_adaptive(values: list[float], p: float, c: float, reduction: str) -> float:
    norm = sum(value * value for value in values) / (len(values) if reduction == "mean" else 1)
    return norm / (norm + c) ** p


def plain_multi_scale(error: Tensor, p: float, c: float, reduction: str) -> list[float]:
    rows = []
    for row in error.tolist():
        losses = []
        for s in (1, 2, 4):
            pooled = [
                sum(plane[i + k][j + m] for k in range(s) for m in range(s)) / s**2
                for plane in row
                for i in range(0, len(plane), s)
                for j in range(0, len(plane[0]), s)
            ]
            losses.append(plain_adaptive(pooled, p, c, reduction))
        rows.append(sum(losses) / 3)
    return rows


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("c", [1e-3, 1.0])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_multi_scale_norm_is_the_plain_loop(p: float, c: float, reduction: str) -> None:
    error = draw(3, 2, 8, 4, dtype=torch.float32)
    expected = torch.tensor(plain_multi_scale(error, p, c, reduction))
    torch.testing.assert_close(multi_scale_l2(error, p, c, reduction), expected)


def test_multi_scale_norm_defaults_to_the_papers_constants() -> None:
    error = draw(3, 2, 8, 8, dtype=torch.float32)
    assert torch.equal(multi_scale_l2(error), multi_scale_l2(error, 0.5, 1e-3, "sum"))


def test_a_constant_error_has_the_same_mean_norm_at_every_scale() -> None:
    error = torch.full((2, 3, 8, 8), 0.5)
    torch.testing.assert_close(multi_scale_l2(error, p=0.0, reduction="mean"), torch.full((2,), 0.25))
    torch.testing.assert_close(multi_scale_l2(error, p=0.0), torch.full((2,), 0.25 * 3 * (64 + 16 + 4) / 3))


def test_a_checkerboard_counts_at_full_resolution_alone() -> None:
    board = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).float() * 2 - 1
    torch.testing.assert_close(multi_scale_l2(board[None, None], p=0.0), torch.tensor([64 / 3]))


@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 3), (4, 3, 1, 1)], ids=str)
def test_errors_without_coarse_scales_use_the_one_they_have(shape: tuple[int, ...]) -> None:
    error = draw(*shape, dtype=torch.float32)
    torch.testing.assert_close(multi_scale_l2(error), adaptive_loss(error, 0.5, 1e-3, "sum"))


def test_small_and_odd_pictures_use_the_scales_that_fit() -> None:
    small, odd = draw(2, 1, 2, 2, dtype=torch.float32), draw(2, 1, 5, 7, dtype=torch.float32)
    expected = (small.flatten(1).square().sum(1) + small.mean((1, 2, 3)).square()) / 2
    torch.testing.assert_close(multi_scale_l2(small, p=0.0), expected)
    assert multi_scale_l2(odd).isfinite().all()


def test_norms_are_taken_in_float32_and_vanish_with_a_finite_gradient() -> None:
    zero = torch.zeros(2, 1, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    norm = multi_scale_l2(zero)
    norm.sum().backward()
    assert norm.dtype == torch.float32 and not norm.any()
    assert zero.grad is not None and not zero.grad.any()


# -- Eq. 17-19: the endpoint terms -------------------------------------------------------------------------------------


@ALL
def test_adversarial_error_is_against_the_fakes_own_velocity(transport: Transport) -> None:
    F, x, z, t = draw(10, 3), draw(10, 3, seed=1), draw(10, 3, seed=2), ten_times(0.1, 1)
    torch.testing.assert_close(adversarial_error(F, x, z, t, transport), F - transport.target(x, z, t))
    assert torch.equal(adversarial_error(F, x, z, t), F - (z - x))


@ALL
def test_the_exact_fake_velocity_minimises_the_adversarial_error(transport: Transport) -> None:
    x, z, weights = quadrature((-1.0, 1.5), 0.5, nodes=48)
    t = torch.tensor([0.6], dtype=torch.float64)
    x_adv = transport.interpolate(x, z, t)
    exact = mixture_velocity(torch.tensor([[-1.0], [1.5]], dtype=torch.float64), 0.5, transport)(x_adv, t)

    def loss(F_fake: Tensor) -> float:
        return (weights * adversarial_error(F_fake, x, z, t, transport).square()[:, 0]).sum().item()

    for change in (0.1 + 0 * x_adv, 0.1 * x_adv, 0.1 * x_adv.sin(), -0.1 * x_adv**2):
        excess = (weights * change.square()[:, 0]).sum().item()
        assert loss(exact + change) - loss(exact) == pytest.approx(excess, abs=1e-6)


def test_residual_of_two_gaussians_is_their_score_difference() -> None:
    x_t, t, (real, fake, std) = draw(10, 3), ten_times(0.1, 0.9), (2.0, -1.0, 0.5)
    delta = residual(gaussian_velocity(fake, std)(x_t, t), gaussian_velocity(real, std)(x_t, t))
    variance = (t**2 + (1 - t) ** 2 * std**2)[:, None]
    scores = [-(x_t - (1 - t)[:, None] * mean) / variance for mean in (real, fake)]
    torch.testing.assert_close(delta, (t / (1 - t))[:, None] * (scores[0] - scores[1]))
    assert bool((delta > 0).all())


def test_residual_stops_at_the_real_branch_and_shifting_at_everything_but_the_anchor() -> None:
    F, F_fake, F_real = (draw(10, 3, seed=seed).requires_grad_() for seed in range(3))
    delta = residual(F_fake, F_real)
    torch.testing.assert_close(delta, F_fake - F_real)
    (shifting_error(F, delta).square().sum() / 2).backward()
    assert F_fake.grad is None and F_real.grad is None
    torch.testing.assert_close(F.grad, delta.detach())


def test_shifting_error_is_minus_the_residual() -> None:
    F, delta = draw(10, 3), draw(10, 3, seed=1)
    torch.testing.assert_close(shifting_error(F, delta), -delta)


class ShiftedGaussians:
    """One-step generator of N(mean, std^2) under a zero condition; the exact velocity of that under any other."""

    def __init__(self, mean: Tensor, std: float) -> None:
        self.mean, self.std = mean, std

    def __call__(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        if not c.embeds.any():  # asked at t = 1: the picture z - F is mean + std z
            return x_t * (1 - self.std) - self.mean
        return gaussian_velocity(self.mean.detach(), self.std)(x_t, t)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("role", ["teacher", "reference"])
def test_one_step_on_the_shift_moves_the_picture_to_the_real_mean(p: float, role: Any) -> None:
    real, start, z = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([-1.0, 1.0, 0.0]), draw(64, 3, dtype=torch.float32)
    mean = start.clone().requires_grad_()
    student = ShiftedGaussians(mean, 0.5)

    def exact(x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        return gaussian_velocity(real, 0.5)(x_t, t)

    batch = make_batch(x=torch.zeros(64, 3))
    plain = Condition(torch.zeros(64, 2, 3))
    batch = Batch(batch.x, plain, batch.random, batch.rows, batch.total)
    objective = APEX(path_weight=0, share=1, guidance=1, real=role, p=p)
    objective(Networks(student, exact, exact), batch, {}).total.backward()
    assert mean.grad is not None
    towards = real - start
    assert torch.cosine_similarity(-mean.grad, towards, dim=0) > 0.99

    def picture() -> Tensor:
        return (z - student(z, torch.ones(64), plain)).mean(0)

    before = picture()
    with torch.no_grad():
        mean -= 0.05 * mean.grad
    assert (real - picture()).norm() < 0.99 * (real - before).norm()


# -- The path loss of the whole objective ------------------------------------------------------------------------------


def gradients(objective: Objective, roles: Roles, batch: Batch, networks: Networks | None = None) -> list[Tensor]:
    roles.student.zero_grad()
    objective(networks or roles.networks(), batch, {}).total.backward()
    return [parameter.grad.clone() for parameter in roles.student.parameters() if parameter.grad is not None]


@ALL
@pytest.mark.parametrize("law", [TimeLaw(), TimeLaw("uniform"), TimeLaw(shift=3.0)], ids=["normal", "uniform", "shift"])
def test_at_lambda_zero_the_path_gradient_is_twice_flow_matchings(transport: Transport, law: TimeLaw) -> None:
    # Error F - F_target = 2 (F - v) with F_target held: d ||error||^2 = 2 * 2 (F - v) dF, flow matching's 2 (F - v) dF.
    roles = make_roles()
    path = APEX(endpoint_weight=0, share=0, lambda_max=0, reduction="mean", times=law, **PLAIN)  # type: ignore[arg-type]
    networks = roles.networks(transport=transport)

    def flat() -> Batch:  # vectors have one scale alone, so Eq. 14 with p = 0 is the plain squared error
        return make_batch(x=draw(8, 16, dtype=torch.float32))

    matching = gradients(FlowMatching(law), roles, flat(), networks)
    for ours, theirs in zip(gradients(path, roles, flat(), networks), matching, strict=True):
        torch.testing.assert_close(ours, 2 * theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
        assert theirs.abs().max() > 1e-2


def train(objective: Objective, start: GaussianField, steps: int = 200, rows: int = 64) -> GaussianField:
    optimizer = torch.optim.Adam(start.parameters(), lr=0.02)
    networks = Networks(start, start, start)
    for step in range(steps):
        x = torch.tensor([1.0, -0.5]) + 0.6 * draw(rows, 2, seed=step, dtype=torch.float32)
        optimizer.zero_grad()
        objective(networks, make_batch(x=x, step=step), {}).total.backward()
        optimizer.step()
    return start


@pytest.mark.parametrize("start", [([1.0, -0.5], 0.6), ([0.0, 0.5], 1.0)], ids=["good stays good", "poor turns good"])
def test_training_on_the_path_at_lambda_zero_fits_the_gaussian(start: tuple[list[float], float]) -> None:
    path = APEX(endpoint_weight=0, share=0, lambda_max=0, reduction="mean", **PLAIN)  # type: ignore[arg-type]
    fitted = train(path, GaussianField(*start))
    assert (fitted.mean.detach() - torch.tensor([1.0, -0.5])).abs().max() < 0.15
    assert abs(fitted.log_std.exp().item() - 0.6) < 0.1


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("velocity", ["sample", "teacher"])
def test_the_velocity_of_one_point_has_no_path_loss_at_any_lambda(lam: float, velocity: Any) -> None:
    point = torch.tensor([0.5, -1.0])

    def straight(x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        return (x_t - point) / t[:, None].clamp_min(1e-9)

    def offset(x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        return straight(x_t, t, c) + 0.1

    options: dict[str, Any] = {"lambda_max": lam, "lambda_law": "constant", "path_velocity": velocity}
    # At lambda = 0 the endpoint at t = 0 is the point itself whatever the field answers there.
    objective = APEX(endpoint_weight=0, guidance=1, times=TimeLaw("uniform"), p=0, **options)
    batch = make_batch(x=point.expand(8, 2))
    assert objective(Networks(straight, straight, straight), batch, {}).total < 1e-6
    assert objective(Networks(offset, straight, straight), batch, {}).total > 1e-5


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("reference", ["student", "reference"])
def test_the_teachers_velocity_carries_the_second_point(guidance: float, reference: Any) -> None:
    roles = make_roles()
    objective = APEX(endpoint_weight=0, guidance=guidance, reference=reference, path_velocity="teacher", path_steps=1)
    objective(roles.networks(), make_batch(), {})
    asked, second = roles.calls("student")[0], roles.calls(reference)[-1]
    null = make_condition(1, seed=99).expand(6)
    teacher, without = roles.teacher(asked.x_t, asked.t, asked.c), roles.teacher(asked.x_t, asked.t, null)
    step = (asked.t - second.t)[:, None, None, None]
    expected = asked.x_t - step * (without + guidance * (teacher - without))
    torch.testing.assert_close(second.x_t, expected.detach())
    assert len(roles.calls("teacher")) == (1 if guidance == 1 else 2)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_teachers_steps_lie_on_the_models_own_grid(shift: float) -> None:
    roles = make_roles()
    objective = APEX(
        endpoint_weight=0,
        guidance=1,
        share=1,
        lambda_law="constant",
        lambda_max=0,
        path_velocity="teacher",
        path_steps=4,
    )
    objective(roles.networks(time_shift=shift), make_batch(), {})
    asked, end, times = roles.calls("student")[0], roles.calls("student")[1], shift_times(time_grid(4), shift)
    for call, time in zip(roles.calls("teacher"), times, strict=False):
        torch.testing.assert_close(call.t, time.float().expand(len(call.t)))
    z = sample(lambda x_t, t: roles.teacher(x_t, t, asked.c).detach(), asked.x_t, times)
    torch.testing.assert_close(end.x_t, z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reference", ["student", "reference"])
def test_the_samples_own_velocity_carries_the_second_point(reference: Any) -> None:
    roles, batch = make_roles(), make_batch()
    APEX(endpoint_weight=0, path_velocity="sample", reference=reference)(roles.networks(), batch, {})
    asked, second = roles.calls("student")[0], roles.calls(reference)[-1]
    t, lt = (call.t[:, None, None, None] for call in (asked, second))
    velocity = (asked.x_t - batch.x) / t  # z - x
    torch.testing.assert_close(second.x_t, asked.x_t - (t - lt) * velocity, rtol=1e-4, atol=1e-5)
    assert not roles.calls("teacher")


@pytest.mark.parametrize(
    ("law", "progress", "low", "high"),
    [("uniform", 0.0, 0.0, 0.8), ("ramp", 0.0, 0.0, 0.0), ("ramp", 0.5, 0.0, 0.4), ("constant", 0.0, 0.8, 0.8)],
)
def test_lambda_laws_keep_their_bounds(law: Any, progress: float, low: float, high: float) -> None:
    roles = make_roles()
    objective = APEX(endpoint_weight=0, lambda_law=law, lambda_max=0.8)
    objective(roles.networks(), make_batch(64, progress=progress), {})
    first, second = roles.calls("student")
    lam = second.t / first.t
    assert low - 1e-6 <= lam.min() and lam.max() <= high + 1e-6
    assert lam.max() > 0.8 * high or high == 0


def test_lambda_never_reaches_one() -> None:
    roles = make_roles()
    APEX(endpoint_weight=0, lambda_law="constant", lambda_max=1)(roles.networks(), make_batch(), {})
    first, second = roles.calls("student")
    assert bool((second.t < first.t).all())


def to_bfloat(t: Tensor) -> Tensor:
    return t.bfloat16().float()


@pytest.mark.parametrize("velocity", ["sample", "teacher"])
def test_every_time_is_one_that_the_backbone_sees(velocity: Any) -> None:
    roles, batch = make_roles(), make_batch(32)
    objective = APEX(path_velocity=velocity, lambda_law="constant", lambda_max=1)
    objective(roles.networks(round_time=to_bfloat), batch, {})
    calls = roles.calls("student") + roles.calls("teacher")
    for call in calls:
        assert torch.equal(to_bfloat(call.t), call.t)
    first, second = roles.calls("student")[:2]
    assert bool((second.t < first.t).all())
    assert bool((first.t[batch.chosen(0.5)] == 1).all())


# -- Algorithm 1 as a whole --------------------------------------------------------------------------------------------


def algorithm_1(objective: APEX, roles: Roles, batch: Batch, calls: list[Call]) -> dict[str, float]:
    """The losses of Algorithm 1 for linear transport, row by row, from the points at which the student was asked."""
    anchor, second, fake = calls
    chosen = batch.chosen(objective.share)
    loss = {"path": 0.0, "adv": 0.0, "shift": 0.0}

    def norm(error: Tensor) -> float:
        return plain_multi_scale(error[None], objective.p, objective.c, objective.reduction)[0]

    for i in range(batch.total):
        t, lt = anchor.t[i], second.t[i]
        ends = (anchor.x_t[i] - t * anchor.F[i]) - (second.x_t[i] - lt * second.F[i])
        target = anchor.F[i] - 2 * (-ends / (t - lt)).clip(-1, 1)
        loss["path"] += norm(anchor.F[i] - target) / batch.total
    for k, i in enumerate(chosen.nonzero().flatten().tolist()):
        x_fake, t = anchor.x_t[i] - anchor.F[i], fake.t[k]
        z_fake = (fake.x_t[k] - (1 - t) * x_fake) / t
        real = roles.reference(fake.x_t[k : k + 1], fake.t[k : k + 1], batch.c[i : i + 1])[0].detach()
        loss["adv"] += norm(fake.F[k] - (z_fake - x_fake)) / int(chosen.sum())
        loss["shift"] += norm(real - fake.F[k]) / int(chosen.sum())
    return loss


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_losses_are_algorithm_1s(reduction: Any) -> None:
    roles, batch = make_roles(), make_batch(8)
    objective = APEX(real="reference", path_velocity="sample", reduction=reduction, p=0.3, c=0.1)
    losses = objective(roles.networks(), batch, {})
    expected = algorithm_1(objective, roles, batch, roles.calls("student"))
    expected["loss"] = sum(expected.values())
    assert {name: term.item() for name, term in losses.terms.items()} == pytest.approx(expected, rel=1e-3)
    assert losses.total.item() == pytest.approx(expected["loss"], rel=1e-3)


def test_the_shifted_branch_hears_the_shifted_condition_and_the_anchor_stands_at_noise() -> None:
    roles, batch = make_roles(), make_batch(8)
    APEX(a=-0.5, b=1.0)(roles.networks(), batch, {})
    anchor, _, fake = roles.calls("student")
    chosen = batch.chosen(0.5)
    torch.testing.assert_close(fake.c.embeds, -0.5 * batch.c.embeds[chosen] + 1)
    assert torch.equal(anchor.c.embeds, batch.c.embeds)
    assert bool((anchor.t[chosen] == 1).all()) and bool((anchor.t[~chosen] < 1).all())


@pytest.mark.parametrize(("role", "guidance"), [("teacher", 1.0), ("teacher", 2.5), ("reference", 2.5)])
def test_the_real_branch_hears_the_plain_condition_at_the_noisy_fake(role: Any, guidance: float) -> None:
    roles, batch = make_roles(), make_batch(8)
    APEX(path_weight=0, real=role, guidance=guidance)(roles.networks(), batch, {})
    fake, real = roles.calls("student")[-1], roles.calls(role)[0]
    assert torch.equal(real.x_t, fake.x_t) and torch.equal(real.t, fake.t)
    assert torch.equal(real.c.embeds, batch.c.embeds[batch.chosen(0.5)])
    assert len(roles.calls(role)) == (2 if role == "teacher" and guidance != 1 else 1)


def test_weights_scale_their_own_objective() -> None:
    def total(path: float, endpoint: float) -> float:
        return APEX(path_weight=path, endpoint_weight=endpoint)(make_roles().networks(), make_batch(), {}).total.item()

    unit = APEX()(make_roles().networks(), make_batch(), {}).terms
    path, endpoint = unit["path"].item(), unit["adv"].item() + unit["shift"].item()
    assert min(path, endpoint) > 0.1
    for weights in ((1.0, 1.0), (1.0, 0.5), (2.0, 1.0), (0.5, 3.0)):
        assert total(*weights) == pytest.approx(weights[0] * path + weights[1] * endpoint, rel=1e-5)


def test_cosine_beta_weighs_each_row_by_its_time() -> None:
    def run(beta: Any) -> tuple[list[float], Tensor]:
        losses, roles = [], make_roles()
        for piece in micro_batches(make_batch, 1):
            losses.append(APEX(endpoint_weight=0, beta=beta)(roles.networks(), piece, {}).total.item())
        return losses, torch.cat([call.t for call in roles.calls("student")[::2]])

    (constant, t), (cosine, _) = run("constant"), run("cosine")
    expected = [loss * (1 - torch.cos(torch.pi / 2 * time).item()) for loss, time in zip(constant, t, strict=True)]
    assert cosine == pytest.approx(expected, rel=1e-4)


READINGS = list(
    product(
        ("rows", "printed"),
        ("teacher", "reference", "student"),
        ("reference", "student"),
        ("sample", "teacher"),
        ("uniform", "ramp", "constant"),
        ("constant", "cosine"),
    )
)


@pytest.mark.parametrize(("pairing", "real", "reference", "velocity", "law", "beta"), READINGS)
def test_gradients_reach_the_student_alone(
    pairing: Any, real: Any, reference: Any, velocity: Any, law: Any, beta: Any
) -> None:
    objective = APEX(pairing=pairing, real=real, reference=reference, path_velocity=velocity, lambda_law=law, beta=beta)
    roles, memory = make_roles(), {}
    losses = objective(roles.networks(), make_batch(), memory)
    losses.total.backward()
    assert losses.total.isfinite() and set(losses.terms) == {"path", "adv", "shift", "loss"}
    assert roles.gradients("teacher") == [None, None] and roles.gradients("reference") == [None, None]
    for gradient in roles.gradients("student"):
        assert gradient is not None and gradient.isfinite().all() and gradient.abs().max() > 0
    kept = [*losses.terms.values(), *memory.values()]
    assert not any(tensor.requires_grad for tensor in kept)
    # The cost of a step rests on this: the anchor and the shifted branch build a graph, nothing else does.
    assert [call.graph for call in roles.calls("student")].count(True) == 2
    assert not any(call.graph for name in ("teacher", "reference") for call in roles.calls(name))
    assert set(objective.needs) == {name for name in ("teacher", "reference") if roles.calls(name)}


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)], ids=["path only", "endpoint only"])
@pytest.mark.parametrize(
    ("real", "reference", "velocity"),
    product(*(axis for axis in (("teacher", "reference", "student"), ("reference", "student"), ("sample", "teacher")))),
)
def test_needs_are_the_roles_called_when_one_objective_is_off(
    weights: tuple[float, float], real: Any, reference: Any, velocity: Any
) -> None:
    roles = make_roles()
    objective = APEX(*weights, real=real, reference=reference, path_velocity=velocity)
    losses = objective(roles.networks(), make_batch(), {})
    assert sorted(objective.needs) == sorted(name for name in ("teacher", "reference") if roles.calls(name))
    assert set(losses.terms) == ({"path", "loss"} if weights[0] else {"adv", "shift", "loss"})


@dataclass
class Separate:
    """Two linear fields behind one student: `plain` answers the plain condition, `shifted` the shifted one."""

    plain: Field
    shifted: Field
    original: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        is_plain = bool(torch.isin(c.embeds, self.original).all())
        return (self.plain if is_plain else self.shifted)(x_t, t, c)


@pytest.mark.parametrize("pairing", ["rows", "printed"])
def test_the_shift_loss_gives_no_gradient_through_the_shifted_branch(pairing: Any) -> None:
    plain, shifted = make_roles(), make_roles()
    objective = APEX(path_weight=0, pairing=pairing)

    def step(real: Field) -> tuple[list[Tensor | None], list[Tensor | None]]:
        plain.student.zero_grad(), shifted.student.zero_grad()
        batch = make_batch()
        student = Separate(plain.student, shifted.student, batch.c.embeds)
        objective(Networks(student, real, real), batch, {}).total.backward()
        return plain.gradients("student"), shifted.gradients("student")

    # F_real enters L_shift alone: whoever L_shift moves must feel who answers for real data.
    (anchor, fake), (other_anchor, other_fake) = step(plain.teacher), step(plain.reference)
    for one, other in zip(anchor, other_anchor, strict=True):
        assert one is not None and other is not None and not torch.allclose(one, other, rtol=0.1)
    for one, other in zip(fake, other_fake, strict=True):
        assert one is not None and other is not None and torch.equal(one, other) and one.abs().max() > 1e-3


# -- Batches, buffer, randomness ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize(
    "options",
    [{}, {"path_weight": 0}, {"endpoint_weight": 0}, {"share": 0.3}, {"real": "reference", "path_velocity": "sample"}],
    ids=str,
)
def test_micro_batches_add_up_to_the_whole(size: int, options: dict[str, Any]) -> None:
    whole, pieces, objective = make_roles(), make_roles(), APEX(**options)
    expected = objective(whole.networks(), make_batch(8), {})
    expected.total.backward()
    summed = dict.fromkeys(expected.terms, 0.0)
    for piece in micro_batches(lambda: make_batch(8), size):
        losses = objective(pieces.networks(), piece, {})
        losses.total.backward()
        for name, term in losses.terms.items():
            summed[name] += term.item()
    assert summed == pytest.approx({name: term.item() for name, term in expected.terms.items()}, rel=1e-4)
    for one, other in zip(whole.gradients("student"), pieces.gradients("student"), strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def near_fakes(x_adv: Tensor, buffer: Tensor) -> Tensor:
    """Index of the buffered picture nearest to each of the noisy fakes."""
    return torch.cdist(x_adv.flatten(1), buffer.flatten(1)).argmin(1)


# Fakes noised by 0.001 alone: what the shifted branch is asked at is the buffered picture, nearly.
ALMOST_CLEAN = TimeLaw(mean=-30.0)


def test_the_buffer_grows_to_its_size_and_no_further() -> None:
    roles, memory, objective = make_roles(), {}, APEX(pairing="printed", buffer_size=8)
    sizes, before = [], torch.empty(0, 1, 4, 4)
    for step in range(5):
        objective(roles.networks(), make_batch(step=step), memory)
        sizes.append(len(memory["buffer"]))
        kept = min(len(before), sizes[-1] - 3)  # three fresh pictures a step; the oldest go first
        assert torch.equal(memory["buffer"][-3 - kept : -3], before[len(before) - kept :])
        before = memory["buffer"]
    assert sizes == [3, 6, 8, 8, 8]


def test_the_buffer_holds_the_students_one_step_pictures() -> None:
    roles, memory, batch = make_roles(), {}, make_batch()
    APEX(pairing="printed", path_weight=0)(roles.networks(), batch, memory)
    made = roles.calls("student")[1]
    assert bool((made.t == 1).all()) and not made.graph
    assert torch.equal(made.c.embeds, batch.c.embeds[batch.chosen(0.5)])
    torch.testing.assert_close(memory["buffer"], made.x_t - made.F)


def test_fakes_are_drawn_from_the_buffer_of_earlier_steps_too() -> None:
    roles, old = make_roles(), 10 * draw(200, 1, 4, 4, dtype=torch.float32)
    memory = {"buffer": old.clone()}
    APEX(pairing="printed", fake_times=ALMOST_CLEAN, share=1)(roles.networks(), make_batch(40), memory)
    x_adv = roles.calls("student")[-1].x_t
    drawn = near_fakes(x_adv, memory["buffer"])
    torch.testing.assert_close(x_adv, memory["buffer"][drawn], rtol=0.01, atol=0.01)
    assert len(memory["buffer"]) == 240 and len(set(drawn.tolist())) > 25
    assert bool((drawn < 200).any()) and bool((drawn >= 200).any())


def test_paired_fakes_are_the_rows_own_pictures_and_need_no_buffer() -> None:
    roles, memory, batch = make_roles(), {}, make_batch()
    APEX(pairing="rows", fake_times=ALMOST_CLEAN)(roles.networks(), batch, memory)
    anchor, fake, chosen = roles.calls("student")[0], roles.calls("student")[-1], batch.chosen(0.5)
    torch.testing.assert_close(fake.x_t, (anchor.x_t - anchor.F)[chosen], rtol=0.01, atol=0.01)
    assert not memory


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lambda_max": 1.1}, "lambda_max"),
        ({"lambda_max": -0.1}, "lambda_max"),
        ({"share": 1.5}, "share"),
        ({"share": -0.5}, "share"),
        ({"path_weight": -1.0}, "path_weight"),
        ({"path_weight": 0.0, "endpoint_weight": 0.0}, "path_weight"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        APEX(**options)  # type: ignore[arg-type]


# -- The paper's equations have owners ---------------------------------------------------------------------------------


def docstrings() -> list[str]:
    package = Path(apexflow.__file__).parent
    files = [*package.glob("*.py"), *(package / "objectives").glob("*.py")]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text())))
    owners = (ast.FunctionDef, ast.ClassDef)
    return [text for node in nodes if isinstance(node, owners) and (text := ast.get_docstring(node))]


@pytest.mark.parametrize("number", [1, 2, 3, 7, 8, 10, 11, 12, 14, 16, 17, 18, 19, 20, 21])
def test_each_equation_opens_the_docstring_of_its_owner(number: int) -> None:
    assert any(text.startswith(f"Eq. ({number})") for text in docstrings())


@pytest.mark.parametrize("number", [9, 13, 15])
def test_the_remaining_equations_are_named(number: int) -> None:
    package = Path(apexflow.__file__).parent
    assert any(f"Eq. ({number})" in path.read_text() for path in package.rglob("*.py"))
