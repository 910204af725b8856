"""CM: the grid, its intervals, the solver and the metric."""

from __future__ import annotations

import pytest
import torch
from closed_forms import GaussianField, make_batch, make_condition, make_roles
from exact_fields import MEAN, STD, networks

from apexflow.objectives.cm import CM, noise_levels, time_levels
from apexflow.objectives.distances import mean_huber, pseudo_huber
from apexflow.objectives.teacher import solve, teach
from apexflow.transport import expand


def test_the_number_of_intervals_doubles_over_the_run() -> None:
    counts = [CM().count(progress / 16) for progress in range(17)]
    assert counts == [10 * 2 ** (k // 2) for k in range(16)] + [1280]
    assert {CM(intervals=(18, 18)).count(progress) for progress in (0.0, 0.5, 1.0)} == {18}


def test_the_grid_is_edms_and_reaches_from_data_to_noise() -> None:
    sigma = noise_levels(17)
    assert sigma[0].item() == pytest.approx(0.002) and sigma[-1].item() == pytest.approx(80)
    torch.testing.assert_close((sigma ** (1 / 7)).diff(), (sigma ** (1 / 7)).diff()[:1].expand(17))
    t = time_levels(sigma)
    assert t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all()
    torch.testing.assert_close((t / (1 - t))[1:-1], 2 * sigma[1:-1])


def test_cm_asks_at_the_ends_of_one_interval() -> None:
    roles = make_roles()
    CM(mode="training")(roles.networks(), make_batch(64, progress=0.0), {})
    later, earlier = (call.t for call in roles.calls("student"))
    grid = time_levels(noise_levels(10)).float()
    index = torch.searchsorted(grid, later)
    assert torch.equal(grid[index], later) and torch.equal(grid[index - 1], earlier)
    assert len(later.unique()) > 4


def test_cm_weights_an_interval_by_the_inverse_of_its_length() -> None:
    t, sigma = torch.tensor([1e-3, 0.4, 0.99999]), noise_levels(10)
    later, earlier, weight = CM()._neighbours(t, 0.0)
    assert (earlier <= t).all() and (t < later).all() and earlier[0] == 0 and later[2] == 1
    assert weight[0].item() == pytest.approx(1 / (sigma[1] - sigma[0]).item())
    assert weight[2].item() == pytest.approx(1 / (sigma[10] - sigma[9]).item())
    assert CM(weighting="none")._neighbours(t, 0.0)[2].tolist() == [1, 1, 1]


@pytest.mark.parametrize("order", [1, 2])
def test_the_solver_has_its_order(order: int) -> None:
    teacher, x_t = GaussianField([MEAN], STD), torch.randn(8, 1).double()
    c, t, s = make_condition(8), torch.full((8,), 0.75), torch.full((8,), 0.25)

    def error(pieces: int) -> float:
        x, times = x_t, torch.linspace(0.75, 0.25, pieces + 1).double()
        for i in range(pieces):
            x = solve(networks(teacher), x, times[i].expand(8), times[i + 1].expand(8), c, order=order)
        scale = [(expand(i, x_t) ** 2 + (1 - expand(i, x_t)) ** 2 * STD**2).sqrt() for i in (t, s)]
        exact = 0.75 * MEAN + (x_t - 0.25 * MEAN) * scale[1] / scale[0]
        return (x - exact).norm().item()

    assert error(8) / error(16) == pytest.approx(2**order, rel=0.2)


def test_metrics_are_quadratic_at_the_origin_and_linear_far_away() -> None:
    e = torch.tensor([[3.0, 4.0], [3e4, 4e4]])
    assert pseudo_huber(e, None).tolist() == pytest.approx([12.5, 12.5e8])
    assert pseudo_huber(e, 5 / 2**0.5).tolist() == pytest.approx([50**0.5 - 5, 5e4 - 5], rel=1e-4)
    assert mean_huber(e, 1.0)[0].item() == pytest.approx((10**0.5 - 1 + 17**0.5 - 1) / 2)


def test_the_teachers_guidance_is_that_of_the_sampler() -> None:
    roles, batch = make_roles(), make_batch()
    t = torch.full((6,), 0.5)
    F = teach(roles.networks(), batch.x, t, batch.c, 3.0)
    conditional, unconditional = (call.F for call in roles.calls("teacher"))
    torch.testing.assert_close(F, 3 * conditional - 2 * unconditional)
    assert not F.requires_grad
