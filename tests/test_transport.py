"""Eq. 1-3, 9 and 11 against closed forms."""

from __future__ import annotations

import pytest
import torch
from closed_forms import EVERY_TRANSPORT, gaussian_velocity, mixture_velocity, quadrature
from torch import Tensor

from apexflow.transport import LINEAR, TRIGONOMETRIC, VARIANCE_PRESERVING, Transport, expand

TIMES = torch.tensor([0.0, 1e-3, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)


def pair(shape: tuple[int, ...] = (6, 2, 3)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, z


def at(t: float) -> Tensor:
    return torch.tensor([t], dtype=torch.float64)


@pytest.mark.parametrize("transport", [LINEAR, TRIGONOMETRIC], ids=lambda transport: transport.name)
def test_paths_run_from_data_to_noise(transport: Transport) -> None:
    x, z = pair()
    torch.testing.assert_close(transport.interpolate(x, z, at(0)), x, rtol=0, atol=1e-15)
    torch.testing.assert_close(transport.interpolate(x, z, at(1)), z, rtol=0, atol=1e-15)


def test_variance_preserving_starts_at_data_and_ends_almost_at_noise() -> None:
    x, z = pair()
    assert torch.equal(VARIANCE_PRESERVING.interpolate(x, z, at(0)), x)
    assert VARIANCE_PRESERVING.gamma(at(1)).item() == pytest.approx(0.00657, abs=1e-5)  # exp(-(0.1 + 9.95) / 2)
    squares = VARIANCE_PRESERVING.alpha(TIMES) ** 2 + VARIANCE_PRESERVING.gamma(TIMES) ** 2
    torch.testing.assert_close(squares, torch.ones_like(TIMES))


@EVERY_TRANSPORT
def test_endpoint_and_noise_invert_interpolate_and_target(transport: Transport) -> None:
    x, z = pair()
    x_t, F = transport.interpolate(x, z, TIMES), transport.target(x, z, TIMES)
    torch.testing.assert_close(transport.endpoint(F, x_t, TIMES), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(transport.noise(F, x_t, TIMES), z, rtol=0, atol=1e-10)


@EVERY_TRANSPORT
def test_a_move_stays_on_the_path_whose_target_is_predicted(transport: Transport) -> None:
    x, z = pair()
    x_t, F = transport.interpolate(x, z, TIMES), transport.target(x, z, TIMES)
    for s in (TIMES, TIMES.flip(0)):
        there = transport.interpolate(x, z, s)
        torch.testing.assert_close(transport.move(F, x_t, TIMES, s), there, rtol=0, atol=1e-10)


@EVERY_TRANSPORT
def test_endpoint_moves_by_a_with_the_prediction(transport: Transport) -> None:
    F, x_t = pair()
    F.requires_grad_()
    (slope,) = torch.autograd.grad(transport.endpoint(F, x_t, TIMES).sum(), F)
    torch.testing.assert_close(slope, expand(transport.a(TIMES), F).expand_as(F))


def test_linear_endpoint_is_equation_9_and_its_coefficient_minus_t() -> None:
    F, x_t = pair()
    torch.testing.assert_close(LINEAR.endpoint(F, x_t, TIMES), x_t - TIMES[:, None, None] * F, rtol=0, atol=1e-12)
    torch.testing.assert_close(LINEAR.a(TIMES), -TIMES, rtol=0, atol=1e-15)


def test_linear_target_is_noise_minus_data() -> None:
    x, z = pair()
    assert torch.equal(LINEAR.target(x, z, TIMES), z - x)


@pytest.mark.parametrize(("transport", "speed"), [(LINEAR, 1.0), (TRIGONOMETRIC, torch.pi / 2)], ids=["linear", "trig"])
def test_target_is_the_time_derivative_of_the_path(transport: Transport, speed: float) -> None:
    x, z = pair()
    t, h = TIMES.clamp(0.01, 0.99), 1e-5
    derivative = (transport.interpolate(x, z, t + h) - transport.interpolate(x, z, t - h)) / (2 * h)
    torch.testing.assert_close(speed * transport.target(x, z, t), derivative, rtol=0, atol=1e-8)


@pytest.mark.parametrize("transport", [LINEAR, TRIGONOMETRIC], ids=lambda transport: transport.name)
def test_determinant_is_minus_one(transport: Transport) -> None:
    torch.testing.assert_close(transport.determinant(TIMES), -torch.ones_like(TIMES))


@EVERY_TRANSPORT
@pytest.mark.parametrize("means", [(0.7,), (-1.5, 1.0)], ids=["gaussian", "mixture"])
def test_exact_velocities_are_conditional_means_of_the_target(transport: Transport, means: tuple[float, ...]) -> None:
    x, z, weights = quadrature(means, 0.6, nodes=48)
    velocity = mixture_velocity(torch.tensor(means, dtype=torch.float64)[:, None], 0.6, transport)
    for t in (at(0.3), at(0.7)):
        x_t = transport.interpolate(x, z, t)
        error = velocity(x_t, t) - transport.target(x, z, t)
        for feature in (x_t**0, x_t, x_t**2):
            assert abs((weights * (error * feature)[:, 0]).sum()) < 1e-6


def test_a_mixture_of_one_is_a_gaussian() -> None:
    x_t, t = pair((6, 2))[0], TIMES.clamp_min(1e-3)
    mean = torch.tensor([0.5, -2.0], dtype=torch.float64)
    torch.testing.assert_close(mixture_velocity(mean[None], 0.3)(x_t, t), gaussian_velocity(mean, 0.3)(x_t, t))


@EVERY_TRANSPORT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_keep_the_dtype_of_the_data_whatever_the_times(transport: Transport, dtype: torch.dtype) -> None:
    x, z = (part.to(dtype) for part in pair())
    x_t, F = transport.interpolate(x, z, TIMES), transport.target(x, z, TIMES)
    assert {part.dtype for part in (x_t, F, transport.endpoint(F, x_t, TIMES), transport.noise(F, x_t, TIMES))} == {
        dtype
    }


def test_coefficients_are_computed_before_the_last_cast() -> None:
    t = torch.tensor([1 - 1e-9], dtype=torch.float64)
    one = torch.ones(1, 1)
    assert LINEAR.interpolate(one, 0 * one, t).item() == pytest.approx(1e-9, rel=1e-6)


@EVERY_TRANSPORT
def test_one_time_serves_every_row(transport: Transport) -> None:
    x, z = pair()
    everywhere = transport.interpolate(x, z, at(0.4).expand(len(x)))
    assert torch.equal(transport.interpolate(x, z, at(0.4)), everywhere)


@EVERY_TRANSPORT
@pytest.mark.parametrize("shape", [(), (6, 1), (5,), (0,)], ids=str)
def test_times_of_another_shape_are_refused(transport: Transport, shape: tuple[int, ...]) -> None:
    x, z = pair()
    for call in (transport.interpolate, transport.target, transport.endpoint, transport.noise):
        with pytest.raises(ValueError, match=r"times must have shape \(6,\)"):
            call(x, z, torch.full(shape, 0.5))
