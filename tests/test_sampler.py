"""Algorithm 2 and Appendix E: grids, convergence on an exact velocity, extrapolation, fresh noise, counted calls."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from closed_forms import EVERY_TRANSPORT, gaussian_endpoint, gaussian_velocity
from torch import Tensor

from apexflow.sampler import Velocity, extrapolate, kumaraswamy, refresh, sample, shift_times, time_grid
from apexflow.transport import LINEAR, TRIGONOMETRIC, Transport

MEAN, STD = 1.5, 0.4
SMOOTH = pytest.mark.parametrize("transport", [LINEAR, TRIGONOMETRIC], ids=lambda transport: transport.name)


@dataclass
class Counter:
    velocity: Velocity
    times: list[float]

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x_t),)
        self.times.append(t[0].item())
        return self.velocity(x_t, t)


def noise(rows: int = 16, width: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curved(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x_t) + t[:, None]


# -- Time grids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "gaps", "expected"),
    [
        (1, (0.0, 0.0), [1, 0]),
        (2, (0.0, 0.0), [1, 0.5, 0]),
        (4, (0.0, 0.0), [1, 0.75, 0.5, 0.25, 0]),
        (1, (0.001, 0.6), [0.999, 0]),
        (2, (0.001, 0.6), [0.999, 0.6, 0]),
        (3, (0.1, 0.5), [0.9, 0.7, 0.5, 0]),
        (2, (0.2, 0.0), [0.8, 0.4, 0]),
    ],
    ids=str,
)
def test_grid_examples(steps: int, gaps: tuple[float, float], expected: list[float]) -> None:
    grid = time_grid(steps, gaps)
    assert grid.dtype == torch.float64
    torch.testing.assert_close(grid, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
@pytest.mark.parametrize("gaps", [(0.0, 0.0), (0.001, 0.6), (0.3, 0.0)], ids=str)
@pytest.mark.parametrize("warp", [(1.0, 1.0, 1.0), (0.7, 1.6, 1.1), (2.0, 0.5, 1.0)], ids=str)
def test_grids_descend_strictly_to_zero(
    steps: int, gaps: tuple[float, float], warp: tuple[float, float, float]
) -> None:
    grid = time_grid(steps, gaps, warp)
    assert grid.shape == (steps + 1,) and grid[-1] == 0 and grid[0] <= 1
    assert bool((grid.diff() < 0).all())


def test_the_warp_is_kumaraswamys_and_keeps_the_ends() -> None:
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    assert torch.equal(kumaraswamy(u, 1, 1, 1), u)
    expected = [(1 - (1 - value**0.7) ** 1.6) ** 1.1 for value in u.tolist()]
    torch.testing.assert_close(kumaraswamy(u, 0.7, 1.6, 1.1), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(time_grid(8, warp=(0.7, 1.6, 1.1)), 1 - kumaraswamy(u, 0.7, 1.6, 1.1))


def test_a_time_shift_keeps_the_ends_and_moves_the_middle_to_noise() -> None:
    times = shift_times(time_grid(2), 3.0)
    torch.testing.assert_close(times, torch.tensor([1, 0.75, 0], dtype=torch.float64))
    torch.testing.assert_close(shift_times(time_grid(5), 1.0), time_grid(5))


@pytest.mark.parametrize("steps", [0, -1])
def test_grids_need_a_step(steps: int) -> None:
    with pytest.raises(ValueError, match="steps"):
        time_grid(steps)


OUTSIDE, NO_ROOM = [(-0.1, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, -0.1), (math.nan, 0.0)], [(0.5, 0.5), (0.5, 0.6)]


@pytest.mark.parametrize("gaps", OUTSIDE + NO_ROOM, ids=str)
def test_gaps_outside_the_unit_interval_or_without_room_are_refused(gaps: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="gaps"):
        time_grid(2, gaps)


@pytest.mark.parametrize("warp", [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, 0.0), (1.0, math.nan, 1.0)], ids=str)
def test_warps_must_be_positive(warp: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="warp"):
        time_grid(2, warp=warp)


# -- Convergence on the exact velocity of a Gaussian -------------------------------------------------------------------


def slope(transport: Transport, order: int) -> float:
    """Measured order of convergence: the exponent of 1 / steps in the error of the final picture."""
    z = noise()
    exact = gaussian_endpoint(z, MEAN, STD, transport)
    velocity = gaussian_velocity(MEAN, STD, transport)
    coarse, fine = (
        (sample(velocity, z, time_grid(steps), order=order, transport=transport) - exact).square().mean().sqrt()
        for steps in (64, 256)
    )
    return math.log(coarse / fine, 4)


@SMOOTH
def test_euler_converges_at_first_order(transport: Transport) -> None:
    assert slope(transport, 1) == pytest.approx(1, abs=0.1)


@SMOOTH
def test_heun_converges_at_second_order(transport: Transport) -> None:
    assert slope(transport, 2) == pytest.approx(2, abs=0.15)


@SMOOTH
def test_heun_is_the_better_at_equal_evaluations(transport: Transport) -> None:
    z, velocity = noise(), gaussian_velocity(MEAN, STD, transport)
    exact = gaussian_endpoint(z, MEAN, STD, transport)
    euler = sample(velocity, z, time_grid(31), transport=transport) - exact
    heun = sample(velocity, z, time_grid(16), order=2, transport=transport) - exact
    assert heun.square().mean() < euler.square().mean() / 4


@EVERY_TRANSPORT
def test_many_steps_reach_the_data_distribution(transport: Transport) -> None:
    z = noise()
    pictures = sample(gaussian_velocity(MEAN, STD, transport), z, time_grid(400), transport=transport)
    torch.testing.assert_close(pictures, gaussian_endpoint(z, MEAN, STD, transport), rtol=0, atol=0.02)


@EVERY_TRANSPORT
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_straight_path_is_exact_in_any_number_of_steps(transport: Transport, order: int, steps: int) -> None:
    x, z = noise(seed=1), noise()
    one = torch.ones(1, dtype=torch.float64)
    pictures = sample(
        lambda x_t, t: transport.target(x, z, t),
        transport.interpolate(x, z, one),
        time_grid(steps),
        order=order,
        transport=transport,
    )
    torch.testing.assert_close(pictures, x, rtol=0, atol=1e-9)


# -- Algorithm 2, line by line -----------------------------------------------------------------------------------------


@EVERY_TRANSPORT
def test_one_step_is_the_endpoint(transport: Transport) -> None:
    z, one = noise(), torch.ones(16, dtype=torch.float64)
    expected = transport.endpoint(curved(z, one), z, one)
    assert torch.equal(sample(curved, z, time_grid(1), transport=transport), expected)


def test_linear_steps_are_eulers() -> None:
    x_t, times = noise(), time_grid(5, (0.001, 0.2))
    expected = x_t
    for t, s in itertools.pairwise(times):
        expected = expected - (t - s) * curved(expected, t.expand(len(expected)))
    torch.testing.assert_close(sample(curved, x_t, times), expected)


def test_linear_heun_is_the_textbooks() -> None:
    x_t, times = noise(), time_grid(4)
    expected = x_t
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        rows = torch.ones(len(x_t), dtype=torch.float64)
        first = curved(expected, t * rows)
        second = curved(expected - (t - s) * first, s * rows) if s > 0 else first
        expected = expected - (t - s) * (first + second) / 2
    torch.testing.assert_close(sample(curved, x_t, times, order=2), expected)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@pytest.mark.parametrize("options", [{}, {"kappa": 0.3, "rho": 0.5}], ids=["plain", "kappa and rho"])
def test_evaluations_are_the_steps_or_twice_less_one(steps: int, options: dict[str, float]) -> None:
    for order, expected in ((1, steps), (2, 2 * steps - 1)):
        counter = Counter(curved, [])
        sample(counter, noise(), time_grid(steps), order=order, **options)
        assert len(counter.times) == expected


def test_evaluations_stand_on_the_grid_and_never_at_zero() -> None:
    grid, first, second = time_grid(3, (0.001, 0.3)), Counter(curved, []), Counter(curved, [])
    sample(first, noise(), grid)
    sample(second, noise(), grid, order=2)
    a, b, c, _ = grid.tolist()
    assert first.times == [a, b, c]
    assert second.times == [a, b, b, c, c]


def by_hand(z: Tensor, times: Tensor, kappa: float, raw_history: bool) -> Tensor:
    x_t, history = z, None
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        F = curved(x_t, torch.full((len(z),), t, dtype=torch.float64))
        raw, z_hat = x_t - t * F, x_t + (1 - t) * F
        x_hat = raw if history is None else raw + kappa * (raw - history)
        history = raw if raw_history else x_hat
        x_t = s * z_hat + (1 - s) * x_hat
    return x_t


def test_extrapolation_remembers_the_raw_prediction() -> None:
    z, times = noise(), time_grid(4)
    refined = by_hand(z, times, 0.4, raw_history=False)
    sampled = sample(curved, z, times, kappa=0.4)
    torch.testing.assert_close(sampled, by_hand(z, times, 0.4, raw_history=True))
    assert (sampled - refined).abs().max() > 1e-3


def test_extrapolation_is_equation_21() -> None:
    now, before = noise(), noise(seed=1)
    torch.testing.assert_close(extrapolate(now, before, 0.3), 1.3 * now - 0.3 * before)


@pytest.mark.parametrize("order", [1, 2])
def test_extrapolation_does_nothing_at_one_step_and_something_at_two(order: int) -> None:
    z = noise()
    for steps, same in ((1, True), (2, False)):
        plain, moved = (sample(curved, z, time_grid(steps), kappa=kappa, order=order) for kappa in (0.0, 0.5))
        assert torch.equal(plain, moved) is same


# -- Fresh noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_fresh_noise_keeps_the_variance(rho: float) -> None:
    z_hat = noise(20000, 1)
    mixed = refresh(z_hat, rho, torch.Generator().manual_seed(1))
    assert mixed.var().item() == pytest.approx(1, abs=0.04)
    assert (mixed * z_hat).mean().item() == pytest.approx(math.sqrt(1 - rho), abs=0.04)


def test_a_noise_ratio_of_one_is_fresh_noise_alone() -> None:
    one, other = (refresh(noise(seed=seed), 1.0, torch.Generator().manual_seed(7)) for seed in (0, 1))
    assert torch.equal(one, other)


@pytest.mark.parametrize("order", [1, 2])
def test_fresh_noise_leaves_a_one_step_generators_distribution(order: int) -> None:
    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        """Answers with the flow's endpoint, wherever it is asked."""
        t = t[:, None]
        return (x_t - MEAN - STD * (x_t - (1 - t) * MEAN) / (t**2 + (1 - t) ** 2 * STD**2).sqrt()) / t

    generator = torch.Generator().manual_seed(1)
    pictures = sample(velocity, noise(20000, 1), time_grid(2, (0.0, 0.7)), rho=1.0, order=order, generator=generator)
    assert pictures.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert pictures.std().item() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("order", [1, 2])
def test_the_generator_decides_the_fresh_noise(order: int) -> None:
    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample(curved, noise(), time_grid(3), rho=0.5, order=order, generator=generator)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_no_fresh_noise_is_drawn_without_a_ratio_or_at_the_last_step() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    sample(curved, noise(), time_grid(4), generator=generator)
    sample(curved, noise(), time_grid(1), rho=1.0, generator=generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_have_the_dtype_and_shape_of_the_noise(dtype: torch.dtype) -> None:
    z = noise().to(dtype).reshape(16, 1, 2, 2)
    pictures = sample(lambda x_t, t: x_t / 2, z, time_grid(3), kappa=0.1, rho=0.1, order=2)
    assert pictures.dtype == dtype and pictures.shape == z.shape


# -- Bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "times",
    [[1.0], [], [0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.2, 0.5, 0.0], [[1.0, 0.0]], [math.nan, 0.0]],
    ids=str,
)
def test_grids_that_do_not_descend_are_refused(times: list[float]) -> None:
    with pytest.raises(ValueError, match="descending"):
        sample(curved, noise(), torch.tensor(times))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rho": -0.1}, "rho"),
        ({"rho": 1.1}, "rho"),
        ({"kappa": -0.1}, "kappa"),
        ({"kappa": math.nan}, "kappa"),
        ({"order": 0}, "order"),
        ({"order": 3}, "order"),
    ],
    ids=str,
)
def test_ratios_and_orders_out_of_range_are_refused(options: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        sample(curved, noise(), time_grid(2), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("times", [[1000.0, 500.0, 0.0], [1.0, 0.5, -0.5]], ids=str)
def test_times_outside_the_unit_interval_are_refused(times: list[float]) -> None:
    with pytest.raises(ValueError, match="times"):
        sample(curved, noise(), torch.tensor(times))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_velocity_that_computes_with_time_keeps_the_precision_of_the_noise(dtype: torch.dtype) -> None:
    z = noise().to(dtype)
    told = []

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        told.append(t.dtype)
        return x_t * t.to(x_t.dtype)[:, None] if dtype == torch.bfloat16 else x_t * t[:, None]

    assert sample(velocity, z, time_grid(3)).dtype == dtype
    assert set(told) == {torch.float64 if dtype == torch.float64 else torch.float32}
