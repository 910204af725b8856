"""The baselines against closed forms: fixed points, orders of accuracy, reductions to one another, and short runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from closed_forms import GaussianField, gaussian_endpoint, gaussian_velocity, make_batch, make_condition, make_roles
from torch import Tensor, nn

from apexflow.conditioning import Condition
from apexflow.objectives import Batch, Field, Networks, objectives
from apexflow.objectives.apex import move
from apexflow.objectives.cm import CM, noise_levels, pseudo_huber, solve, teach, time_levels
from apexflow.objectives.flow_matching import FlowMatching
from apexflow.objectives.lcm import LCM, mean_huber
from apexflow.objectives.pcm import PCM
from apexflow.objectives.scm import SCM, angle, angular, angular_prediction
from apexflow.objectives.times import TimeLaw
from apexflow.objectives.ucgm import UCGM
from apexflow.sampler import sample, time_grid
from apexflow.transport import LINEAR, TRANSPORTS, TRIGONOMETRIC, Transport, expand

MEAN, STD = 1.0, 0.5
UNIFORM = TimeLaw("uniform")
EVERY_TRANSPORT = pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS.keys())


class OneStep(nn.Module):
    """The consistency field of N(mean, std^2): the prediction whose endpoint is the end of the exact flow."""

    def __init__(self, mean: float = MEAN, std: float = STD, transport: Transport = LINEAR) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std).log())
        self.transport = transport

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        transport, t, std = self.transport, t.clamp_min(1e-6), self.log_std.exp()
        alpha, gamma = expand(transport.alpha(t), x_t), expand(transport.gamma(t), x_t)
        end = self.mean + std * (x_t - gamma * self.mean) / (alpha**2 + gamma**2 * std**2).sqrt()
        return (end + expand(transport.alpha_hat(t) / transport.determinant(t), x_t) * x_t) / expand(
            transport.a(t), x_t
        )


class Phased(OneStep):
    """The field that leads, by `move`, to the point of the exact flow at the clean edge of the phase; linear transport."""

    def __init__(self, phases: int) -> None:
        super().__init__()
        self.phases = phases

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        t = t.double()
        s = ((t * self.phases - 1e-9).floor() / self.phases).clamp_min(0)
        spread = [(time**2 + (1 - time) ** 2 * self.log_std.exp() ** 2).sqrt() for time in (t, s)]
        x_s = expand(1 - s, x_t) * self.mean + expand(spread[1] / spread[0], x_t) * (
            x_t - expand(1 - t, x_t) * self.mean
        )
        return (x_t - x_s) / expand((t - s).clamp_min(1e-9), x_t)


class Straight(OneStep):
    """A field whose flow is straight, noise z to mean + std z: its velocity and its consistency field are the same."""

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        alpha, gamma = expand(self.transport.alpha(t), x_t), expand(self.transport.gamma(t), x_t)
        z = (x_t - gamma * self.mean) / (alpha + gamma * self.log_std.exp())
        return self.transport.target(self.mean + self.log_std.exp() * z, z, t)


class Smooth(nn.Module):
    """A small smooth network in float64."""

    def __init__(self, transport: Transport = LINEAR) -> None:
        super().__init__()
        self.transport = transport
        generator = torch.Generator().manual_seed(4)
        self.inner, self.outer = (
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) / 2) for shape in ((2, 8), (8, 1))
        )

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        theta, x_trig = angle(t, self.transport), x_t / expand(_norm(t, self.transport), x_t)
        F = torch.tanh(torch.cat([x_trig, theta[:, None].to(x_t)], 1) @ self.inner) @ self.outer
        x, z = angular(x_trig, F, -theta)  # the endpoint and noise of an angular velocity
        return self.transport.target(x, z, t)


def _norm(t: Tensor, transport: Transport) -> Tensor:
    return (transport.alpha(t) ** 2 + transport.gamma(t) ** 2).sqrt()


class Given:
    """Stands in for RowRandom: hands out the same numbers every time."""

    def __init__(self, z: Tensor, u: Tensor) -> None:
        self.z, self.u = z, u

    def normal(self, shape: Sequence[int], where: Tensor | None = None) -> Tensor:
        return self.z

    def uniform(self, where: Tensor | None = None) -> Tensor:
        return self.u


class Stream:
    """Stands in for RowRandom: one generator for a whole run."""

    def __init__(self, rows: int) -> None:
        self.rows, self.generator = rows, torch.Generator().manual_seed(11)

    def normal(self, shape: Sequence[int], where: Tensor | None = None) -> Tensor:
        return torch.randn(self.rows, *shape, generator=self.generator)

    def uniform(self, where: Tensor | None = None) -> Tensor:
        return torch.rand(self.rows, generator=self.generator)


TIMES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)


def corners(times: Sequence[float] = TIMES, progress: float = 1.0) -> Batch:
    """Data mean +- std and noise +- 1 in all pairs, at each time: the second moments of the Gaussian, exactly.

    For affine fields and squared errors the gradient depends on those alone, so it is the expected gradient.
    """
    x = MEAN + STD * torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    z = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    count = len(times)
    u = torch.tensor(times, dtype=torch.float64).repeat_interleave(4)
    random: Any = Given(z.repeat(count)[:, None], u)
    return Batch(
        x.repeat(count)[:, None], make_condition(4 * count), random, torch.arange(4 * count), 4 * count, progress
    )


def networks(student: Field, teacher: Field | None = None, transport: Transport = LINEAR) -> Networks:
    """The student is its own reference, and its own teacher unless another is given."""
    return Networks(student, student, teacher or student, transport=transport)


def gradient(objective: Any, student: nn.Module, batch: Batch, **roles: Any) -> Tensor:
    """The gradient by all parameters of the student, as one vector."""
    total = objective(networks(student, **roles), batch, {}).total
    parts = torch.autograd.grad(total, list(student.parameters()))
    return torch.cat([part.flatten().double() for part in parts])


# -- Fixed points ------------------------------------------------------------------------------------------------------

DISTILLATIONS = {
    "cm-ddim": CM(order=1, intervals=(20, 20), times=UNIFORM),
    "cm-heun": CM(order=2, intervals=(20, 20), times=UNIFORM),
    "cm-reference": CM(target="reference", intervals=(20, 20), times=UNIFORM),
    "scm-difference": SCM(warmup=0, times=UNIFORM),
    "scm-jvp": SCM(warmup=0, times=UNIFORM, derivative="jvp"),
    "lcm": LCM(guidance=1, skip=100),
    "pcm": PCM(guidance=1, skip=100),
    "pcm-one-phase": PCM(guidance=1, skip=100, phases=1),
}


@EVERY_TRANSPORT
@pytest.mark.parametrize("objective", DISTILLATIONS.values(), ids=DISTILLATIONS.keys())
def test_a_straight_flow_is_an_exact_fixed_point_of_distillation(objective: Any, transport: Transport) -> None:
    """One step of the solver is exact on a straight flow, however long, so nothing but rounding is left."""
    teacher = Straight(transport=transport)
    there = gradient(objective, Straight(transport=transport), corners(), teacher=teacher, transport=transport)
    aside = gradient(objective, Straight(1.2, 0.4, transport), corners(), teacher=teacher, transport=transport)
    assert there.norm() < 1e-2 * aside.norm()


@pytest.mark.parametrize(
    ("coarse", "fine", "phases", "factor"),
    [
        (CM(order=1, intervals=(20, 20)), CM(order=1, intervals=(40, 40)), 1, 2**4),
        (CM(order=2, intervals=(20, 20)), CM(order=2, intervals=(40, 40)), 1, 2**6),
        (LCM(guidance=1, skip=200, huber=1), LCM(guidance=1, skip=100, huber=1), 1, 2**4),
        (PCM(guidance=1, phases=1, skip=200, huber=1), PCM(guidance=1, phases=1, skip=100, huber=1), 1, 2**4),
        (PCM(guidance=1, phases=2, skip=200, huber=1), PCM(guidance=1, phases=2, skip=100, huber=1), 2, 2**4),
    ],
    ids=["cm-ddim", "cm-heun", "lcm", "pcm", "pcm-two-phases"],
)
def test_the_map_to_the_edge_is_a_fixed_point_of_distillation_to_the_solvers_order(
    coarse: Any, fine: Any, phases: int, factor: int
) -> None:
    """At the consistency field the squared loss is the solver's local error, squared: halved steps, twice the order."""

    def loss(objective: Any) -> float:
        later = [0.75 + 0.01 * i for i in range(20)]
        if isinstance(objective, CM):
            objective = replace(objective, times=UNIFORM, huber=None, weighting="none")
        else:  # the same later points, whatever the skip
            later = [(1000 * t - objective.skip + 0.5) / (1001 - objective.skip) for t in later]
        student = Phased(phases) if phases > 1 else OneStep()
        return objective(networks(student, GaussianField([MEAN], STD)), corners(later), {}).total.item()

    assert factor / 2 < loss(coarse) / loss(fine) < factor * 2


@pytest.mark.parametrize("derivative", ["difference", "jvp"])
@EVERY_TRANSPORT
def test_the_one_step_map_is_a_fixed_point_of_scm_distillation(transport: Transport, derivative: Any) -> None:
    def velocity(x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        return gaussian_velocity(MEAN, STD, transport)(x_t, t)

    objective = SCM(times=UNIFORM, warmup=0, c=None, derivative=derivative, epsilon=2e-3)
    there = gradient(objective, OneStep(transport=transport), corners(), teacher=velocity, transport=transport)
    aside = gradient(objective, OneStep(1.1, STD, transport), corners(), teacher=velocity, transport=transport)
    assert there.norm() < 1e-3 * aside.norm()


TRAININGS = {
    "cm": CM(mode="training", intervals=(1280, 1280), huber=None, times=UNIFORM),
    "scm-difference": SCM(mode="training", c=None, warmup=0, times=UNIFORM),
    "scm-jvp": SCM(mode="training", c=None, warmup=0, times=UNIFORM, derivative="jvp"),
    "ucgm": UCGM(zeta=0, clip=None, theta=(1, 1)),
    "ucgm-enhanced": UCGM(zeta=2, clip=None, theta=(1, 1)),
}


@pytest.mark.parametrize("objective", TRAININGS.values(), ids=TRAININGS.keys())
def test_the_one_step_map_is_a_fixed_point_of_training_in_expectation(objective: Any) -> None:
    """From single samples, whose own direction is right only on average; at each time by itself."""
    teacher = GaussianField([MEAN], STD)
    for time in TIMES:
        there = gradient(objective, OneStep(), corners([time]), teacher=teacher)
        velocity = gradient(objective, GaussianField([MEAN], STD), corners([time]), teacher=teacher)
        assert there.norm() < 2e-2 * velocity.norm(), time


def test_tangent_warmup_begins_at_the_teachers_field_and_ends_at_the_one_step_map() -> None:
    objective, teacher = SCM(times=UNIFORM, warmup=0.2), GaussianField([MEAN], STD)

    def norm(student: nn.Module, progress: float) -> float:
        return gradient(objective, student, corners(progress=progress), teacher=teacher).norm().item()

    begin, middle, end = ((norm(GaussianField([MEAN], STD), p), norm(OneStep(), p)) for p in (0.0, 0.1, 0.2))
    assert begin[0] < 1e-6 < begin[1]
    assert end[1] < 1e-2 * end[0]
    assert 0 < middle[0] < end[0] and 0 < middle[1] < begin[1]
    assert norm(OneStep(), 1.0) == end[1]


# -- Derivatives -------------------------------------------------------------------------------------------------------


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
    theta, x_trig = angle(t, transport), x_t / expand(_norm(t, transport), x_t)
    F_trig = angular_prediction(F, x_t, t, transport)
    end = expand(theta.cos(), F) * x_trig - expand(theta.sin(), F) * F_trig
    torch.testing.assert_close(end, transport.endpoint(F, x_t, t), rtol=1e-4, atol=1e-4)
    if transport is LINEAR:
        expected = expand(_norm(t, LINEAR), F) * F + expand(1 - 2 * t, F) * x_trig
        torch.testing.assert_close(F_trig, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("c", "reduction", "norm"), [(0.1, "mean", 4.0), (0.1, "sum", 8.0), (None, "mean", None)])
def test_tangents_are_normalised_by_row(c: float | None, reduction: Any, norm: float | None) -> None:
    g = torch.tensor([4.0, -4.0, 4.0, 4.0]).expand(2, 4) * torch.tensor([[1.0], [0.0]])
    expected = g if norm is None else g / (norm + 0.1)
    torch.testing.assert_close(SCM(c=c, reduction=reduction)._normalised(g), expected)


# -- UCGM --------------------------------------------------------------------------------------------------------------


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


# -- CM, LCM, PCM ------------------------------------------------------------------------------------------------------


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


@EVERY_TRANSPORT
def test_lcms_function_is_the_identity_on_data_and_the_endpoint_elsewhere(transport: Transport) -> None:
    F, x_t = torch.randn(2, 3), torch.randn(2, 3)
    clean, noisy = (LCM().consistency(F, x_t, torch.full((2,), time), transport) for time in (0.0, 0.5))
    assert torch.equal(clean, x_t)
    torch.testing.assert_close(noisy, transport.endpoint(F, x_t, torch.full((2,), 0.5)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@EVERY_TRANSPORT
def test_pcm_with_one_phase_is_latent_consistency(transport: Transport, guidance: float) -> None:
    pcm, lcm = make_roles(), make_roles()
    one = PCM(phases=1, guidance=guidance)(pcm.networks(transport=transport), make_batch(), {}).total
    other = LCM(guidance=guidance)(lcm.networks(transport=transport), make_batch(), {}).total
    one.backward()
    other.backward()
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(pcm.gradients("student"), lcm.gradients("student"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("phases", [1, 3, 4])
def test_pcm_stays_within_the_phase(phases: int) -> None:
    roles, objective = make_roles(), PCM(phases=phases, skip=300, points=1000)
    objective(roles.networks(), make_batch(64), {})
    t, s = roles.calls("student")[0].t, roles.calls("reference")[0].t
    edges = [phase * 1000 // phases / 1000 for phase in range(phases + 1)]
    for later, earlier in zip(t.tolist(), s.tolist(), strict=True):
        phase = next(i for i in range(phases) if edges[i] < later - 1e-6 <= edges[i + 1])
        assert earlier == pytest.approx(max(edges[phase], later - 0.3), abs=1e-6)
    assert phases == 1 or (s > 0).any()


def test_pcms_edges_belong_to_the_phase_above() -> None:
    index = torch.tensor([1, 250, 251, 500, 999, 1000])
    assert PCM(phases=4).edge(index).tolist() == [0, 0, 250, 250, 750, 750]


@pytest.mark.parametrize("method", [LCM, PCM])
def test_a_shift_moves_the_grid_towards_noise(method: Any) -> None:
    times = []
    for shift in (1.0, 3.0):
        roles = make_roles()
        method(shift=shift)(roles.networks(), make_batch(), {})
        times.append(roles.calls("student")[0].t)
    torch.testing.assert_close(times[1], 3 * times[0] / (1 + 2 * times[0]))


@pytest.mark.parametrize("objective", [CM(guidance=3), SCM(guidance=3), UCGM(guidance=3), LCM(), PCM()], ids=repr)
def test_a_guided_teacher_needs_a_null_condition(objective: Any) -> None:
    roles = make_roles()
    objective(roles.networks(), make_batch(), {})
    asked = {call.c.embeds.sum().item() for call in roles.calls("teacher")}
    assert len(asked) == 2
    with pytest.raises(ValueError, match="null"):
        objective(replace(roles.networks(), null=None), make_batch(), {})


def test_the_teachers_guidance_is_that_of_the_sampler() -> None:
    roles, batch = make_roles(), make_batch()
    t = torch.full((6,), 0.5)
    F = teach(roles.networks(), batch.x, t, batch.c, 3.0)
    conditional, unconditional = (call.F for call in roles.calls("teacher"))
    torch.testing.assert_close(F, 3 * conditional - 2 * unconditional)
    assert not F.requires_grad


# -- Short runs --------------------------------------------------------------------------------------------------------


class Bent(nn.Module):
    """The exact velocity plus a correction, affine in x_t with coefficients of second order in t, that starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.shift = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        powers = torch.stack([t**0, t, t * t], 1)
        correction = (powers @ self.slope)[:, None] * x_t + (powers @ self.shift)[:, None]
        return gaussian_velocity(MEAN, STD)(x_t, t) + correction


RUNS = {
    "cm-distillation": (CM(), 1),
    "cm-training": (CM(mode="training"), 1),
    "scm-distillation": (SCM(), 1),
    "scm-training": (SCM(mode="training", derivative="jvp"), 1),
    "ucgm": (UCGM(), 1),
    "lcm": (LCM(guidance=1), 1),
    "pcm-one-phase": (PCM(guidance=1, phases=1), 1),
    "pcm": (PCM(guidance=1), 4),
}


@pytest.mark.parametrize(("objective", "steps"), RUNS.values(), ids=RUNS.keys())
def test_a_short_run_from_the_exact_velocity_lowers_the_few_step_error(objective: Any, steps: int) -> None:
    rows, iterations, student = 64, 200, Bent()
    noise = torch.randn(256, 2, generator=torch.Generator().manual_seed(3))
    roles, c = networks(student, GaussianField([MEAN, MEAN], STD)), make_condition(rows)

    def error(ask: Callable[[Tensor, Tensor], Tensor]) -> float:
        with torch.no_grad():
            ends = sample(ask, noise, time_grid(steps).float())
        return (ends - gaussian_endpoint(noise, MEAN, STD)).square().mean().item()

    before = error(lambda x_t, t: student(x_t, t, c))
    assert before > 1e-3
    random: Any = Stream(rows)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-2)
    for i in range(iterations):
        x = MEAN + STD * random.normal((2,))
        batch = Batch(x, c, random, torch.arange(rows), rows, i / iterations)
        optimizer.zero_grad()
        objective(roles, batch, {}).total.backward()
        optimizer.step()
    assert error(lambda x_t, t: student(x_t, t, c)) < before / 3


# -- The table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", objectives().values(), ids=objectives().keys())
def test_every_method_recommends_sampler_settings(method: Any) -> None:
    assert {"kappa", "rho"} <= set(method.sampler) <= {"kappa", "rho", "order"}
    ends = sample(gaussian_velocity(MEAN, STD), torch.zeros(2, 1), time_grid(3).float(), **method.sampler)
    assert ends.isfinite().all()


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        (CM, {"intervals": (20, 10)}, "intervals"),
        (CM, {"intervals": (0, 10)}, "intervals"),
        (CM, {"rho": 0.0}, "rho"),
        (CM, {"huber": 0.0}, "huber"),
        (CM, {"order": 3}, "order"),
        (SCM, {"epsilon": 0.0}, "epsilon"),
        (SCM, {"warmup": 1.5}, "warmup"),
        (SCM, {"c": 0.0}, "c must"),
        (UCGM, {"lam": 1.1}, "lam"),
        (UCGM, {"threshold": -0.1}, "threshold"),
        (UCGM, {"zeta": -1.0}, "zeta"),
        (UCGM, {"zeta": 1.0, "enhance": "self"}, "zeta"),
        (UCGM, {"theta": (0.0, 1.0)}, "theta"),
        (UCGM, {"epsilon": 0.5}, "epsilon"),
        (UCGM, {"clip": 0.0}, "clip"),
        (LCM, {"skip": 0}, "skip"),
        (LCM, {"skip": 1001}, "skip"),
        (LCM, {"huber": 0.0}, "huber"),
        (PCM, {"phases": 0}, "phases"),
        (PCM, {"phases": 1001}, "phases"),
        (PCM, {"skip": 0}, "skip"),
        (PCM, {"shift": 0.0}, "shift"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(method: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        method(**options)


@pytest.mark.parametrize(
    ("objective", "needs"),
    [
        (CM(), ("teacher",)),
        (CM(mode="training"), ()),
        (CM(mode="training", target="reference"), ("reference",)),
        (SCM(mode="training"), ()),
        (UCGM(zeta=0), ()),
        (UCGM(zeta=0.5, enhance="self"), ("reference",)),
        (LCM(target="student"), ("teacher",)),
        (PCM(target="student"), ("teacher",)),
    ],
    ids=repr,
)
def test_needs_follow_the_options(objective: Any, needs: tuple[str, ...]) -> None:
    roles = make_roles()
    objective(roles.networks(), make_batch(), {}).total.backward()
    assert objective.needs == needs
    assert tuple(name for name in ("teacher", "reference") if roles.calls(name)) == needs
    assert all(part is not None and part.any() for part in roles.gradients("student"))


@EVERY_TRANSPORT
def test_moving_to_where_one_stands_changes_nothing(transport: Transport) -> None:
    """PCM's boundary condition, Eq. (3) at s_m."""
    F, x_t, t = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0.0, 0.25, 0.9])
    torch.testing.assert_close(move(F, x_t, t, t, transport), x_t, rtol=1e-3, atol=1e-3)
