"""UCGM: reductions, enhanced targets, lines 8-15."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from closed_forms import EVERY_TRANSPORT, GaussianField, make_batch, make_condition, make_roles
from exact_fields import STD, TIMES, UNIFORM, Given, Smooth, corners, gradient, networks
from torch import Tensor

from apexflow.objectives.flow_matching import FlowMatching
from apexflow.objectives.ucgm import UCGM
from apexflow.transport import Transport


@EVERY_TRANSPORT
def test_ucgm_without_consistency_is_flow_matching(transport: Transport) -> None:
    ucgm, matching = make_roles(), make_roles()
    plain = UCGM(lam=0, zeta=0, theta=(1, 1), weighting="none")
    one = plain(ucgm.networks(transport=transport), make_batch(), {}).total
    other = FlowMatching(UNIFORM)(matching.networks(transport=transport), make_batch(), {}).total
    one.backward()
    other.backward()
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(ucgm.gradients("student"), matching.gradients("student"))


@EVERY_TRANSPORT
def test_ucgms_secant_turns_into_weighted_flow_matching(transport: Transport) -> None:
    """Eq. (5) with lambda near 0: the gradient of flow matching times 4 a(t)^2 / (t sin t), up to the cosine."""
    for time in TIMES:
        t = torch.tensor(time, dtype=torch.float64)
        secant, matching = (
            gradient(
                UCGM(lam=lam, zeta=0, clip=None, theta=(1, 1)), Smooth(transport), corners([time]), transport=transport
            )
            for lam in (1e-8, 0.0)
        )
        torch.testing.assert_close(secant, 4 * transport.a(t) ** 2 / (t * t.sin()) * matching, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("clip", [1.0, 0.01])
def test_ucgm_clips_the_derivative_elementwise(clip: float) -> None:
    """At t the prediction moves by at most 4 t / sin(t) times the clip, and by exactly that where the derivative is large."""
    batch, student = corners(), GaussianField([50.0], STD)
    t = batch.random.uniform()
    expected = (t.cos() * (4 * t / t.sin() * clip) ** 2).mean()
    loss = UCGM(zeta=0, theta=(1, 1), clip=clip)(networks(student), batch, {}).total.detach()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("enhance", ["teacher", "self"])
def test_ucgms_enhanced_target(enhance: Any) -> None:
    """At lambda = 0 and linear transport the enhanced target of the velocity is read off directly."""
    roles, zeta = make_roles(), 0.5
    objective = UCGM(lam=0, zeta=zeta, enhance=enhance, theta=(1, 1), threshold=0.4, weighting="none")
    loss = objective(roles.networks(), batch := make_batch(), {}).total.detach()
    asked = roles.calls("student")[0]
    t = asked.t[:, None, None, None]
    v = (asked.x_t - batch.x) / t
    if enhance == "teacher":
        b, d = roles.calls("teacher")[0].F, v
    else:
        b, null = asked.F, roles.calls("reference")[0]
        d = null.F
        assert torch.equal(null.c.embeds, make_condition(1, seed=99).embeds.expand_as(null.c.embeds))
    target = torch.where(t > 0.4, (v + b) / 2, v + zeta * (b - d))
    assert (t > 0.4).any() and (t < 0.4).any()
    torch.testing.assert_close(loss, (asked.F - target).square().mean(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("lam", [0.5, 1.0])
def test_ucgm_asks_on_the_samples_path_and_reads_endpoints_off_the_enhanced_one(lam: float) -> None:
    """Lines 8-15, written out for linear transport: the secant at lambda < 1, the central difference at 1."""
    roles, zeta, epsilon = make_roles(), 0.5, 0.02
    objective = UCGM(lam=lam, zeta=zeta, theta=(1, 1), threshold=1, clip=None, epsilon=epsilon, weighting="none")
    loss = objective(roles.networks(), batch := make_batch(), {}).total.detach()
    asked, *others = roles.calls("student")
    b, t = roles.calls("teacher")[0].F, asked.t[:, None, None, None]
    z = (asked.x_t - (1 - t) * batch.x) / t
    x_star = batch.x + zeta * (asked.x_t - t * b - batch.x)
    z_star = z + zeta * (asked.x_t + (1 - t) * b - z)

    def endpoint(F: Tensor, s: Tensor) -> Tensor:
        return s * z_star + (1 - s) * x_star - s * F

    if lam == 1:
        times = [t + epsilon, t - epsilon]
        ends = [endpoint(call.F, s) for call, s in zip(others, times, strict=True)]
    else:
        times = [t, lam * t]
        ends = [endpoint(asked.F, t), endpoint(others[0].F, lam * t)]
    for call, s in zip(others, times[-len(others) :], strict=True):
        torch.testing.assert_close(call.t[:, None, None, None], s)
        torch.testing.assert_close(call.x_t, s * z + (1 - s) * batch.x, rtol=1e-4, atol=1e-4)
    moved = 4 * t / t.sin() * (ends[0] - ends[1]) / (times[0] - times[1])
    torch.testing.assert_close(loss, moved.square().mean(), rtol=1e-3, atol=1e-5)


def test_ucgm_draws_times_from_its_beta_law() -> None:
    u = torch.linspace(0.01, 0.99, 99)
    drawn = UCGM(theta=(0.8, 1.0))._times(replace(make_batch(), random=Given(u, u)))  # type: ignore[arg-type]
    torch.testing.assert_close(drawn, (u ** (1 / 0.8)).clamp_min(1e-3))
