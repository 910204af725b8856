"""PCM: phases and their edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from closed_forms import EVERY_TRANSPORT, make_batch, make_roles

from apexflow.objectives.lcm import LCM
from apexflow.objectives.pcm import PCM, renoise
from apexflow.sampler import shift_times, time_grid
from apexflow.transport import LINEAR, Transport, expand


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@EVERY_TRANSPORT
def test_pcm_with_one_phase_is_latent_consistency(transport: Transport, guidance: float) -> None:
    pcm, lcm = make_roles(), make_roles()
    one = PCM(phases=1, guidance=guidance, adversarial=0)(pcm.networks(transport=transport), make_batch(), {}).total
    other = LCM(guidance=guidance)(lcm.networks(transport=transport), make_batch(), {}).total
    one.backward()
    other.backward()
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(pcm.gradients("student"), lcm.gradients("student"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("phases", [1, 3, 4])
def test_pcm_stays_within_the_phase(phases: int) -> None:
    roles, objective = make_roles(), PCM(phases=phases, skip=300, points=1000, adversarial=0)
    objective(roles.networks(), make_batch(64), {})
    t, s = roles.calls("student")[0].t, roles.calls("reference")[0].t
    edges = [phase * 1000 // phases / 1000 for phase in range(phases + 1)]
    for later, earlier in zip(t.tolist(), s.tolist(), strict=True):
        phase = next(i for i in range(phases) if edges[i] < later - 1e-6 <= edges[i + 1])
        assert earlier == pytest.approx(max(edges[phase], later - 0.3), abs=1e-6)
    assert phases == 1 or (s > 0).any()


@pytest.mark.parametrize(("shift", "sampled"), [(None, 3.0), (1.0, 1.0)])
def test_pcms_phases_end_where_the_models_sampler_stands(shift: float | None, sampled: float) -> None:
    roles, objective = make_roles(), PCM(skip=1000, points=1000, shift=shift, adversarial=0)
    objective(roles.networks(time_shift=3.0), make_batch(64), {})
    grid = shift_times(time_grid(4), sampled)
    s = roles.calls("reference")[0].t  # so long a step ends at the edge of its phase
    assert all(any(float(edge) == pytest.approx(float(time), abs=1e-6) for time in grid) for edge in s)
    assert roles.calls("student")[0].t.tolist() == [1.0] * 64 and float(s[0]) == pytest.approx(float(grid[1]))


def test_pcms_edges_belong_to_the_phase_above() -> None:
    index = torch.tensor([1, 250, 251, 500, 999, 1000])
    edge, top = PCM(phases=4).phase(index)
    assert edge.tolist() == [0, 0, 250, 250, 750, 750] and torch.equal(top, edge + 250)


@EVERY_TRANSPORT
def test_moving_to_where_one_stands_changes_nothing(transport: Transport) -> None:
    """PCM's boundary condition, Eq. (3) at s_m."""
    F, x_t, t = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0.0, 0.25, 0.9])
    torch.testing.assert_close(transport.move(F, x_t, t, t), x_t, rtol=1e-3, atol=1e-3)


@EVERY_TRANSPORT
def test_more_noise_leads_to_the_paths_own_spread(transport: Transport) -> None:
    """Of data, noise and fresh noise, the point at t has gamma(t) and noise of variance alpha(t)^2."""
    s, t = torch.tensor([0.0, 0.25, 0.5]), torch.tensor([0.25, 0.5, 1.0])
    one, none = torch.ones(3, 1), torch.zeros(3, 1)
    data, earlier, fresh = (
        renoise(transport.interpolate(x, z, s), new, s, t, transport)
        for x, z, new in ((one, none, none), (none, one, none), (none, none, one))
    )
    torch.testing.assert_close(data, expand(transport.gamma(t), data))
    torch.testing.assert_close(earlier**2 + fresh**2, expand(transport.alpha(t), data) ** 2)
    assert (fresh > 0).all()
    torch.testing.assert_close(renoise(one, one, s, s, transport), one)


@pytest.mark.parametrize("turn", [0, 1])
def test_pcms_judge_sees_both_ends_within_their_phase(turn: int) -> None:
    roles, batch = make_roles(PCM()), make_batch(16, turn=turn)
    losses = PCM()(roles.networks(), batch, {})
    student, minus = roles.calls("student")[0], roles.calls("reference")[0]
    edge = (student.t * 4 - 1e-5).floor() / 4
    f, target = (LINEAR.move(call.F, call.x_t, call.t, edge) for call in (student, minus))
    asked = roles.calls("teacher")[2:]  # the first two are the solver's, guided
    for seen, end in zip(asked, (f,) if turn == 0 else (target, f), strict=True):
        assert bool((edge <= seen.t).all()) and bool((seen.t <= edge + 0.25 + 1e-6).all())
        keep = expand((1 - seen.t) / (1 - edge), end)
        noise = (seen.x_t - keep * end) / expand((seen.t**2 - (keep.flatten() * edge) ** 2).sqrt(), end)
        assert noise.std().item() == pytest.approx(1, abs=0.15) and noise.mean().abs() < 0.15
    assert student.graph == (turn == 0) and losses.total.requires_grad == (turn == 0)
    assert set(losses.further) == (set() if turn == 0 else {"judge"})


def test_pcm_weighs_the_hinge_by_lambda() -> None:
    with_judge, without = (PCM(adversarial=weight) for weight in (0.1, 0.0))
    one = with_judge(make_roles(with_judge).networks(), make_batch(), {})
    other = without(make_roles(without).networks(), make_batch(), {})
    torch.testing.assert_close(one.terms["consistency"], other.total.detach())
    torch.testing.assert_close(one.terms["loss"], other.terms["loss"] + 0.1 * one.terms["fooling"])
    assert one.terms["fooling"] > 0 and without.further == ()


def test_pcms_judge_learns_as_in_the_released_training() -> None:
    """Twice as fast as the student, and without momentum; with no adversarial loss there is none."""
    (judge,) = PCM().further
    assert judge.rate == 2 and judge.betas is not None and judge.betas[0] == 0
    assert PCM(adversarial=0).further == ()


@pytest.mark.parametrize(("said", "fooling"), [(3.0, 0.0), (-1.0, 2.0)])
def test_pcms_student_seeks_what_the_judge_calls_real(said: float, fooling: float) -> None:
    roles = make_roles(PCM()).networks()
    judge = {"judge": lambda x, t, c: x.new_full((len(x), 1), said)}
    losses = PCM()(replace(roles, frozen={**roles.frozen, **judge}), make_batch(), {})
    assert losses.terms["fooling"].item() == fooling


@pytest.mark.parametrize(("answers", "loss"), [((1.0, -1.0), 0.0), ((-1.0, 1.0), 4.0)])
def test_pcms_judge_learns_that_the_ends_of_theta_minus_are_real(answers: tuple[float, float], loss: float) -> None:
    said = iter(answers)  # theta-minus' ends come first
    judge = {"judge": lambda x, t, c: x.new_full((len(x), 1), next(said))}
    losses = PCM()(replace(make_roles(PCM()).networks(), further=judge), make_batch(turn=1), {})
    assert losses.further["judge"].item() == loss
