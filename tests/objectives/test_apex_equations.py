"""APEX: Eq. 7-19 against closed forms."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from closed_forms import EVERY_TRANSPORT, gaussian_velocity, make_batch, mixture_velocity, quadrature
from plain import draw, plain_multi_scale, ten_times
from torch import Tensor

import apexflow
from apexflow.conditioning import Condition
from apexflow.objectives import Batch, Networks
from apexflow.objectives.apex import (
    APEX,
    adaptive_loss,
    adversarial_error,
    coefficient_difference,
    dual_loss,
    endpoint_difference,
    multi_scale_l2,
    primal_loss,
    residual,
    secant_target,
    shifting_error,
)
from apexflow.transport import LINEAR, Transport

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


@EVERY_TRANSPORT
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


@EVERY_TRANSPORT
def test_at_lambda_zero_the_secant_is_the_regression_error(transport: Transport) -> None:
    x, z, F_t, F_0 = (draw(10, 3, seed=seed) for seed in range(4))
    t = ten_times(0.1, 1)
    x_t = transport.interpolate(x, z, t)
    target = secant_target(F_t, F_0, x_t, x, t, 0 * t, transport, clip=None)
    torch.testing.assert_close(F_t - target, 2 * (F_t - transport.target(x, z, t)))


@EVERY_TRANSPORT
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.9, 0.99])
def test_a_straight_field_has_no_secant_at_any_lambda(transport: Transport, lam: float) -> None:
    x, z, t = draw(10, 3), draw(10, 3, seed=1), ten_times(0.1, 1)
    F_t, F_lt = transport.target(x, z, t), transport.target(x, z, lam * t)
    x_t = transport.interpolate(x, z, t)
    x_lt = transport.move(F_t, x_t, t, lam * t)
    torch.testing.assert_close(x_lt, transport.interpolate(x, z, lam * t))
    target = secant_target(F_t, F_lt, x_t, x_lt, t, lam * t, transport)
    torch.testing.assert_close(target, F_t, rtol=0, atol=1e-9)


def test_a_linear_move_is_an_euler_step() -> None:
    F, x_t, t, s = draw(10, 3), draw(10, 3, seed=1), ten_times(0.5, 1), ten_times(0, 0.5)
    torch.testing.assert_close(LINEAR.move(F, x_t, t, s), x_t - (t - s)[:, None] * F)


@EVERY_TRANSPORT
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


@EVERY_TRANSPORT
def test_adversarial_error_is_against_the_fakes_own_velocity(transport: Transport) -> None:
    F, x, z, t = draw(10, 3), draw(10, 3, seed=1), draw(10, 3, seed=2), ten_times(0.1, 1)
    torch.testing.assert_close(adversarial_error(F, x, z, t, transport), F - transport.target(x, z, t))
    assert torch.equal(adversarial_error(F, x, z, t), F - (z - x))


@EVERY_TRANSPORT
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
