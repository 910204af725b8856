"""APEX: Algorithm 1 with its readings, its buffer and its rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from closed_forms import Call, Roles, make_batch, make_roles, micro_batches
from plain import draw, plain_multi_scale
from torch import Tensor

from apexflow.conditioning import Condition
from apexflow.objectives import Batch, Field, Networks
from apexflow.objectives.apex import APEX
from apexflow.objectives.times import TimeLaw

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
        answer = z_fake - x_fake if t < objective.exact_below else fake.F[k]
        loss["shift"] += norm(real - answer) / int(chosen.sum())
    return loss


@pytest.mark.parametrize(("reduction", "exact_below"), [("sum", 0.0), ("mean", 0.0), ("sum", 0.5)])
def test_losses_are_algorithm_1s(reduction: Any, exact_below: float) -> None:
    roles, batch = make_roles(), make_batch(8)
    readings: dict[str, Any] = {"real": "reference", "path_velocity": "sample", "path_rows": "all"}
    objective = APEX(**readings, reduction=reduction, exact_below=exact_below, p=0.3, c=0.1)
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
            losses.append(APEX(endpoint_weight=0, path_rows="all", beta=beta)(roles.networks(), piece, {}).total.item())
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
    objective = APEX(path_weight=0, pairing=pairing, guidance=1)

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
    [
        {},
        {"path_weight": 0},
        {"endpoint_weight": 0},
        {"share": 0.3},
        {"path_rows": "all"},
        {"real": "reference", "path_velocity": "sample"},
        {"guided_above": 0.5},
    ],
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
    APEX(pairing="printed", path_rows="all", fake_times=ALMOST_CLEAN, share=1)(roles.networks(), make_batch(40), memory)
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
