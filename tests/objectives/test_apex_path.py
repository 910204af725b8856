"""APEX: the path loss of the whole objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closed_forms import EVERY_TRANSPORT, GaussianField, Roles, make_batch, make_condition, make_roles
from plain import PLAIN, draw
from torch import Tensor

from apexflow.conditioning import Condition
from apexflow.objectives import Batch, Networks, Objective
from apexflow.objectives.apex import APEX
from apexflow.objectives.flow_matching import FlowMatching
from apexflow.objectives.times import TimeLaw
from apexflow.transport import Transport


def gradients(objective: Objective, roles: Roles, batch: Batch, networks: Networks | None = None) -> list[Tensor]:
    roles.student.zero_grad()
    objective(networks or roles.networks(), batch, {}).total.backward()
    return [parameter.grad.clone() for parameter in roles.student.parameters() if parameter.grad is not None]


@EVERY_TRANSPORT
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
    objective = APEX(endpoint_weight=0, share=0, guidance=guidance, reference=reference, path_velocity="teacher")
    objective(roles.networks(), make_batch(), {})
    asked, second = roles.calls("student")[0], roles.calls(reference)[-1]
    null = make_condition(1, seed=99).expand(6)
    teacher, without = roles.teacher(asked.x_t, asked.t, asked.c), roles.teacher(asked.x_t, asked.t, null)
    step = (asked.t - second.t)[:, None, None, None]
    expected = asked.x_t - step * (without + guidance * (teacher - without))
    torch.testing.assert_close(second.x_t, expected.detach())
    assert len(roles.calls("teacher")) == (1 if guidance == 1 else 2)


@pytest.mark.parametrize("reference", ["student", "reference"])
def test_the_samples_own_velocity_carries_the_second_point(reference: Any) -> None:
    roles, batch = make_roles(), make_batch()
    APEX(endpoint_weight=0, share=0, path_velocity="sample", reference=reference)(roles.networks(), batch, {})
    asked, second = roles.calls("student")[0], roles.calls(reference)[-1]
    t, lt = (call.t[:, None, None, None] for call in (asked, second))
    velocity = (asked.x_t - batch.x) / t  # z - x
    torch.testing.assert_close(second.x_t, asked.x_t - (t - lt) * velocity, rtol=1e-4, atol=1e-5)
    assert not roles.calls("teacher")


@pytest.mark.parametrize(("rows", "walked"), [("others", 4), ("all", 8)])
def test_the_path_leaves_alone_the_rows_that_are_generated_from(rows: Any, walked: int) -> None:
    roles, batch = make_roles(), make_batch(8)
    APEX(path_rows=rows)(roles.networks(), batch, {})
    anchor, second, fake = roles.calls("student")
    assert len(anchor.t) == 8 and len(second.t) == walked and len(fake.t) == 4
    expected = batch.c.embeds if rows == "all" else batch.c.embeds[~batch.chosen(0.5)]
    assert torch.equal(second.c.embeds, expected)


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
    objective = APEX(path_rows="all", path_velocity=velocity, lambda_law="constant", lambda_max=1)
    objective(roles.networks(round_time=to_bfloat), batch, {})
    calls = roles.calls("student") + roles.calls("teacher")
    for call in calls:
        assert torch.equal(to_bfloat(call.t), call.t)
    first, second = roles.calls("student")[:2]
    assert bool((second.t < first.t).all())
    assert bool((first.t[batch.chosen(0.5)] == 1).all())
