"""What every training method promises, run over the table of methods, and the pieces that they share."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from closed_forms import EVERY_TRANSPORT, GaussianField, gaussian_velocity, make_batch, make_roles, micro_batches
from torch import Tensor

import apexflow
from apexflow.objectives import Batch, Networks, Objective, objectives, share_of
from apexflow.objectives.apex import APEX
from apexflow.objectives.cm import CM
from apexflow.objectives.flow_matching import FlowMatching
from apexflow.objectives.sana_sprint import SanaSprint
from apexflow.objectives.scm import SCM
from apexflow.objectives.times import TimeLaw
from apexflow.randomness import RowRandom
from apexflow.transport import LINEAR, Transport

EVERY = pytest.mark.parametrize("method", objectives().values(), ids=objectives().keys())


# -- Every method ------------------------------------------------------------------------------------------------------


@EVERY
@EVERY_TRANSPORT
def test_losses_are_finite_and_gradients_reach_the_student_alone(method: Any, transport: Transport) -> None:
    roles = make_roles(method())
    losses = method()(roles.networks(transport=transport), make_batch(), {})
    losses.total.backward()
    assert losses.total.shape == () and losses.total.isfinite()
    for gradient in roles.gradients("student"):
        assert gradient is not None and gradient.isfinite().all() and gradient.any()
    assert all(gradient is None for name in ("reference", "teacher") for gradient in roles.gradients(name))


@EVERY
def test_terms_are_detached_scalars_that_include_the_loss(method: Any) -> None:
    losses = method()(make_roles(method()).networks(), make_batch(), {})
    assert losses.terms["loss"].item() == losses.total.item()
    assert all(term.shape == () and not term.requires_grad for term in losses.terms.values())


@EVERY
def test_needs_names_exactly_the_roles_called(method: Any) -> None:
    roles, objective = make_roles(method()), method()
    for turn in range(2):
        objective(roles.networks(), make_batch(turn=turn), {})
    assert roles.calls("student")
    called = [name for name in ("reference", "teacher") if roles.calls(name)]
    jumps = ["second_time"] * any(call.s is not None for call in roles.calls("student"))
    assert sorted(objective.needs) == sorted(called + jumps)


@EVERY
def test_each_loss_reaches_its_own_role_and_a_turn_says_whose_it_is(method: Any) -> None:
    objective = method()
    stepped: set[str] = set()
    for turn in range(2):
        roles = make_roles(objective)
        losses = objective(roles.networks(), make_batch(turn=turn), {})
        losses.everything.backward()
        felt = {name for name in ("student", *roles.further) if any(g is not None for g in roles.gradients(name))}
        wanted = set(losses.further) | ({"student"} if losses.total.requires_grad else set())
        assert felt == wanted
        stepped |= felt
        if losses.total.requires_grad:  # the student's loss passes through the others and leaves them be
            other = make_roles(objective)
            objective(other.networks(), make_batch(turn=turn), {}).total.backward()
            assert all(gradient is None for name in other.further for gradient in other.gradients(name))
            torch.testing.assert_close(other.gradients("student"), roles.gradients("student"))
    assert stepped == {"student", *(declared.name for declared in objective.further)}


@EVERY
def test_every_method_cites_its_paper(method: Any) -> None:
    assert isinstance(method.citation, str) and len(method.citation) > 10


@EVERY
def test_the_seed_and_the_step_decide_the_loss(method: Any) -> None:
    def loss(seed: int = 0, step: int = 0) -> float:
        batch = make_batch()
        random = RowRandom(seed, step, batch.rows.tolist())
        fresh = Batch(batch.x, batch.c, random, batch.rows, batch.total)
        return method()(make_roles(method()).networks(), fresh, {}).total.item()

    assert loss() == loss()
    assert len({loss(), loss(seed=1), loss(step=1)}) == 3


@EVERY
def test_global_random_numbers_are_neither_used_nor_moved(method: Any) -> None:
    objective, networks, batch = method(), make_roles(method()).networks(), make_batch()
    state = torch.get_rng_state()
    objective(networks, batch, {})
    assert torch.equal(torch.get_rng_state(), state)


@EVERY
@pytest.mark.parametrize("size", [1, 3, 6])
def test_micro_batches_add_up_to_the_whole(method: Any, size: int) -> None:
    whole, pieces = make_roles(method()), make_roles(method())
    expected = method()(whole.networks(), make_batch(), {}).total
    expected.backward()
    summed = 0.0
    for piece in micro_batches(make_batch, size):
        loss = method()(pieces.networks(), piece, {}).total
        loss.backward()
        summed += loss.item()
    assert summed == pytest.approx(expected.item(), rel=1e-4)
    for one, other in zip(whole.gradients("student"), pieces.gradients("student"), strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


SETTINGS = [APEX(lambda_law="ramp"), SCM(warmup=0), CM(intervals=(18, 18)), SanaSprint(SCM(warmup=0))]


@pytest.mark.parametrize("objective", [*(method() for method in objectives().values()), *SETTINGS], ids=str)
def test_what_follows_the_runs_progress_says_so(objective: Any) -> None:
    """A comparison may only let one run pass two budgets where the way does not depend on the end."""
    networks = make_roles(objective).networks()

    def losses(progress: float) -> list[float]:
        batches = [replace(make_batch(turn=turn), progress=progress) for turn in range(2)]
        return [float(objective(networks, batch, {}).everything) for batch in batches]

    assert (losses(0.0) != losses(0.5)) == objective.scheduled


@EVERY
def test_data_and_conditions_are_left_as_they_were(method: Any) -> None:
    batch = make_batch()
    x, embeds = batch.x.clone(), batch.c.embeds.clone()
    method()(make_roles(method()).networks(), batch, {}).total.backward()
    assert torch.equal(batch.x, x) and torch.equal(batch.c.embeds, embeds)


@pytest.mark.parametrize("turn", [0, 1])
@EVERY
def test_conditions_learn_from_the_students_loss_alone(method: Any, turn: int) -> None:
    """Their text encoder, where it is trained, is a part of the student."""
    batch = make_batch(turn=turn)
    batch.c.embeds.requires_grad_()
    losses = method()(make_roles(method()).networks(), batch, {})
    for loss in losses.further.values():
        loss.backward(retain_graph=True)
    assert batch.c.embeds.grad is None


@EVERY
def test_methods_are_frozen(method: Any) -> None:
    with pytest.raises(AttributeError):
        method().times = TimeLaw("uniform")


def test_methods_neither_step_nor_place_nor_log() -> None:
    forbidden = {"backward", "cuda", "optim", "manual_seed", "step", "print", "logging", "add_scalar", "requires_grad_"}
    for path in (Path(apexflow.__file__).parent / "objectives").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        named = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        named |= {node.id for node in nodes if isinstance(node, ast.Name)}
        assert not named & forbidden, path.name


# -- Flow matching -----------------------------------------------------------------------------------------------------


@EVERY_TRANSPORT
def test_flow_matching_is_the_mean_squared_error_against_the_target(transport: Transport) -> None:
    roles, batch = make_roles(), make_batch()
    law = TimeLaw("logit_normal", spread=0.5)
    loss = FlowMatching(law)(roles.networks(transport=transport), batch, {}).total
    call = roles.calls("student")[0]
    # The noise is found again from the point, which linear and trigonometric paths and VP allow away from t = 0.
    alpha, gamma = (schedule(call.t)[:, None, None, None] for schedule in (transport.alpha, transport.gamma))
    z = (call.x_t - gamma * batch.x) / alpha
    expected = (call.F - transport.target(batch.x, z, call.t)).square().mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-3, atol=0)


def test_the_exact_velocity_is_flow_matchings_minimum() -> None:
    def loss(mean: float, std: float) -> Tensor:
        student = GaussianField([mean, mean], std)
        x = 1.0 + 0.5 * torch.randn(2000, 2, generator=torch.Generator().manual_seed(5))
        total = FlowMatching()(Networks(student, student, student), make_batch(x=x), {}).total
        return total.detach()

    exact = loss(1.0, 0.5)
    assert exact < min(loss(1.3, 0.5), loss(0.7, 0.5), loss(1.0, 0.7), loss(1.0, 0.35)) - 1e-3
    x_t, t = torch.randn(3, 2), torch.tensor([0.2, 0.5, 1.0])
    field = GaussianField([1.0, 1.0], 0.5)
    torch.testing.assert_close(field(x_t, t, make_batch(3).c).detach(), gaussian_velocity(1.0, 0.5)(x_t, t))


# -- Rows, shares, times -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "share", "rows"), [(8, 0.5, 4), (8, 0, 0), (8, 1, 8), (8, 0.01, 1), (10, 0.33, 3)])
def test_a_share_is_rounded_but_never_to_nothing(total: int, share: float, rows: int) -> None:
    assert share_of(total, share) == rows


def numbered(rows: range, total: int) -> Batch:
    whole = make_batch(total)
    piece = slice(rows.start, rows.stop)
    return Batch(whole.x[piece], whole.c[piece], RowRandom(0, 0, rows), whole.rows[piece], total)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("total", [1, 2, 7, 12, 33])
def test_the_chosen_rows_are_exactly_the_share_and_spread_evenly(total: int, share: float) -> None:
    chosen = make_batch(total).chosen(share)
    count = share_of(total, share)
    assert chosen.dtype == torch.bool and int(chosen.sum()) == count
    window = max(total // 3, 1)
    inside = chosen.int().unfold(0, window, 1).sum(1)
    assert inside.max() - inside.min() <= 1


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_row_is_chosen_by_its_number_alone(size: int) -> None:
    pieces = [numbered(range(first, min(first + size, 12)), 12).chosen(0.4) for first in range(0, 12, size)]
    assert torch.equal(torch.cat(pieces), make_batch(12).chosen(0.4))


def test_times_are_not_rounded_unless_a_backbone_asks() -> None:
    student = GaussianField([0.0], 1.0)
    t = torch.tensor([0.123456789])
    networks = Networks(student, student, student)
    assert networks.round_time(t) is t and networks.transport is LINEAR and networks.null is None


@pytest.mark.parametrize("law", [TimeLaw("uniform"), TimeLaw(), TimeLaw(mean=50.0), TimeLaw(mean=-50.0)], ids=str)
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.3])
def test_times_stay_inside_the_open_interval(law: TimeLaw, shift: float) -> None:
    t = TimeLaw(law.kind, law.mean, law.spread, shift).draw(RowRandom(0, 0, range(200)))
    assert t.dtype == torch.float32 and t.shape == (200,)
    assert t.min() > 0 and t.max() < 1


def test_time_laws_have_their_medians() -> None:
    def median(law: TimeLaw) -> float:
        return law.draw(RowRandom(0, 0, range(2000))).median().item()

    assert median(TimeLaw("uniform")) == pytest.approx(0.5, abs=0.04)
    assert median(TimeLaw()) == pytest.approx(0.5, abs=0.04)
    assert median(TimeLaw(mean=1.0)) == pytest.approx(0.731, abs=0.04)  # sigmoid(1)
    assert median(TimeLaw(shift=3.0)) == pytest.approx(0.75, abs=0.04)  # 3 t / (1 + 2 t) at one half


def test_times_are_drawn_for_marked_rows_alone() -> None:
    marks = torch.tensor([True, False, True])
    some, every = (TimeLaw().draw(RowRandom(0, 0, range(3)), where) for where in (marks, None))
    assert torch.equal(some, every[marks])


@pytest.mark.parametrize(
    ("options", "named"),
    [({"kind": "cosine"}, "time law"), ({"spread": 0.0}, "spread"), ({"shift": -1.0}, "shift")],
    ids=str,
)
def test_unknown_time_laws_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TimeLaw(**options)


def test_the_table_holds_methods_by_the_name_of_their_recipe() -> None:
    assert {"apex", "flow_matching"} <= set(objectives())
    assert all(issubclass(method, Objective) for method in objectives().values())
