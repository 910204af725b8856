"""DMD2 and Sana-Sprint: whose turn it is, where pictures move, and what their critic and judge learn."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from closed_forms import gaussian_velocity, held, make_batch, make_condition, make_roles, micro_batches
from torch import Tensor, nn

from apexflow.conditioning import Condition
from apexflow.objectives import Networks
from apexflow.objectives.dmd2 import DMD2
from apexflow.objectives.sana_sprint import SanaSprint
from apexflow.objectives.scm import SCM
from apexflow.transport import LINEAR

MEAN, STD = 1.0, 0.5


class OnePicture(nn.Module):
    """A student that makes N(mean, std^2) of noise in one step."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([mean]))

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        return x_t * (1 - STD) - self.mean


class Judge(nn.Module):
    """Logits that rise with the point."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        return self.scale * x_t


def field(mean: float) -> Any:
    return lambda x_t, t, c: gaussian_velocity(mean, STD)(x_t, t)


def networks(student: nn.Module, critic: float, judge: nn.Module) -> Networks:
    further: Any = {"critic": field(critic), "judge": judge}
    frozen: Any = {"judge": held(judge, judge.parameters)}
    return Networks(student, student, field(MEAN), make_condition(1), further=further, frozen=frozen)


@pytest.mark.parametrize(("start", "sign"), [(-1.0, 1.0), (3.0, -1.0)])
def test_dmd2_moves_pictures_from_the_critics_distribution_to_the_teachers(start: float, sign: float) -> None:
    student = OnePicture(start)
    batch = make_batch(x=torch.zeros(32, 1))
    DMD2(guidance=1, gan=0)(networks(student, start, Judge()), batch, {}).total.backward()
    assert student.mean.grad is not None and sign * -student.mean.grad.item() > 0


def test_dmd2_scales_its_gradient_by_the_distance_from_the_teachers_estimate() -> None:
    """Of one-element rows, 0.5 (x - target)^2 has the gradient (fake - real) / |x - real|."""
    roles, batch = networks(OnePicture(3.0), 3.0, Judge()), make_batch(x=torch.zeros(8, 1))
    x = torch.full((8, 1), 3.0, requires_grad=True)
    DMD2(guidance=1, gan=0)._student(roles, batch, x)[0].backward()
    x_t, t, _ = DMD2()._noised(roles, make_batch(x=torch.zeros(8, 1)), x.detach())
    real, fake = (LINEAR.endpoint(field(mean)(x_t, t, batch.c), x_t, t) for mean in (MEAN, 3.0))
    torch.testing.assert_close(x.grad, (fake - real) / (x.detach() - real).abs())


def test_dmd2_has_nothing_to_learn_where_the_distributions_agree() -> None:
    student = OnePicture(MEAN)
    DMD2(guidance=1, gan=0)(networks(student, MEAN, Judge()), make_batch(x=torch.zeros(32, 1)), {}).total.backward()
    assert student.mean.grad is not None and student.mean.grad.abs() < 1e-6


def test_dmd2_compares_pictures_at_times_spread_over_the_whole_of_their_range() -> None:
    """No heap of rows at either end."""
    x = torch.zeros(500, 1)
    _, t, _ = DMD2()._noised(networks(OnePicture(MEAN), MEAN, Judge()), make_batch(x=x), x)
    assert 0.02 <= t.min() < 0.04 and 0.96 < t.max() <= 0.98 and len(t.unique()) == 500


def test_dmd2s_gan_moves_pictures_to_where_the_judge_says_real() -> None:
    student, judge = OnePicture(MEAN), Judge()
    objective = DMD2(guidance=1, gan=1.0)
    losses = objective(networks(student, MEAN, judge), make_batch(x=torch.zeros(32, 1)), {})
    losses.total.backward()
    assert student.mean.grad is not None and student.mean.grad.item() < 0 and judge.scale.grad is None


def test_dmd2s_critic_learns_the_velocity_of_the_students_pictures() -> None:
    """Its loss is least for the exact velocity of what the student makes."""

    def loss(critic: float) -> float:
        batch = make_batch(x=torch.zeros(512, 1))
        return DMD2(gan=0)(networks(OnePicture(-1.0), critic, Judge()), batch, {}).further["critic"].item()

    assert loss(-1.0) < min(loss(-0.6), loss(-1.4), loss(MEAN)) - 1e-3


def test_dmd2s_student_takes_every_fifth_step() -> None:
    taken = []
    for turn in range(11):
        roles = make_roles(DMD2())
        losses = DMD2()(roles.networks(), make_batch(turn=turn), {})
        assert set(losses.further) == {"critic", "judge"}
        taken.append(losses.total.requires_grad)
    assert [turn for turn, student in enumerate(taken) if student] == [0, 5, 10]


@pytest.mark.parametrize("gan", [0.0, 5e-3])
def test_only_the_judge_looks_at_pictures(gan: float) -> None:
    def loss(fill: float) -> float:
        objective = DMD2(gan=gan)
        batch = make_batch(x=torch.full((4, 1, 4, 4), fill))
        return objective(make_roles(objective).networks(), batch, {}).everything.item()

    assert (loss(0.0) != loss(1.0)) == DMD2(gan=gan).needs_pictures


def test_without_gan_there_is_no_judge() -> None:
    assert [declared.name for declared in DMD2(gan=0).further] == ["critic"]
    assert [declared.name for declared in DMD2().further] == ["critic", "judge"]


@pytest.mark.parametrize("steps", [1, 4])
def test_dmd2_asks_where_the_students_own_sampler_leads(steps: int) -> None:
    roles = make_roles(DMD2())
    DMD2(steps=steps)(roles.networks(), make_batch(32), {})
    last = roles.calls("student")[-1]
    assert last.graph and not any(call.graph for call in roles.calls("student")[:-1])
    assert len(roles.calls("student")) == steps
    assert set(last.t.tolist()) == {1 - step / steps for step in range(steps)}


def test_sana_sprint_takes_turns() -> None:
    for turn, student in enumerate([True, False, True]):
        losses = SanaSprint()(make_roles(SanaSprint()).networks(), make_batch(turn=turn), {})
        assert losses.total.requires_grad == student and bool(losses.further) == (not student)


def test_sana_sprint_without_its_judge_is_scm() -> None:
    scm = SCM(guidance=1, times=SanaSprint().scm.times)
    sprint = SanaSprint(scm=scm, weight=0)
    ours, theirs = make_roles(sprint), make_roles(sprint)
    one = sprint(ours.networks(), make_batch(), {}).total
    other = scm(theirs.networks(), make_batch(), {}).total
    one.backward(), other.backward()
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(ours.gradients("student"), theirs.gradients("student"))


@pytest.mark.parametrize("turn", [0, 1])
def test_half_of_the_pictures_that_sana_sprints_judge_sees_are_made_of_noise(turn: int) -> None:
    """And none of sCM's own rows stands there."""
    roles = make_roles(SanaSprint())
    SanaSprint()(roles.networks(), batch := make_batch(16, turn=turn), {})
    *scm, pictures = roles.calls("student")
    assert torch.equal(pictures.t == 1, batch.chosen(0.5)) and pictures.graph == (turn == 0)
    assert len(scm) == (3 if turn == 0 else 0) and all(bool((call.t < 1).all()) for call in scm)


def test_sana_sprints_judge_has_a_hinge() -> None:
    """Logits beyond 1 on the right side cost nothing."""

    class Sure(Judge):
        def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
            return self.scale * torch.full_like(x_t, 5.0) * (1 if self.real else -1)

        real = False

    student = OnePicture(MEAN)
    judge = Sure()
    given = networks(student, MEAN, judge)
    batch = make_batch(x=torch.zeros(8, 1), turn=1)
    loss = SanaSprint()(given, batch, {}).further["judge"].item()
    assert loss == pytest.approx(6.0)  # data taken for fakes: 1 + 5; fakes seen through: 0
    judge.real = True
    assert SanaSprint()(given, batch, {}).further["judge"].item() == pytest.approx(6.0)
    even = SanaSprint(scm=SCM(guidance=1))(given, replace(batch, turn=0), {})
    assert even.terms["fooling"].item() == pytest.approx(-5.0)


class Reader(Judge):
    """Sure that a picture is right, but for one with the prompt of another row."""

    def __init__(self, c: Condition) -> None:
        super().__init__()
        self.right, self.seen = c, list[Condition]()

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        self.seen.append(c)
        right = (c.embeds == self.right.embeds).flatten(1).all(1, keepdim=True)
        return self.scale * torch.full_like(x_t, 5.0) * torch.where(right, 1.0, -1.0)


def test_sana_sprints_judge_sees_data_with_the_prompt_of_the_following_row() -> None:
    batch = make_batch(x=torch.zeros(8, 1), turn=1)
    judge = Reader(batch.c)
    given = networks(OnePicture(MEAN), MEAN, judge)
    assert SanaSprint()(given, batch, {}).further["judge"].item() == pytest.approx(
        3.0
    )  # 6 for the student's half of the fakes
    real, fake, wrong = judge.seen
    assert torch.equal(wrong.embeds, batch.c.embeds[[1, 2, 3, 4, 5, 6, 7, 0]])
    assert torch.equal(real.embeds, batch.c.embeds) and torch.equal(fake.embeds, batch.c.embeds)
    # Without it, and in a batch of one row, there is no wrong prompt.
    assert SanaSprint(mismatched=False)(given, batch, {}).further["judge"].item() == pytest.approx(6.0)
    alone = make_batch(x=torch.zeros(1, 1), turn=1)
    judge.right = alone.c
    assert SanaSprint()(given, alone, {}).further["judge"].item() == pytest.approx(6.0) and len(judge.seen) == 7


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_change_nothing_at_the_judges_turn(size: int) -> None:
    objective = SanaSprint()
    whole, pieces = make_roles(objective), make_roles(objective)
    batch = partial(make_batch, turn=1)
    expected = objective(whole.networks(), batch(), {}).further["judge"]
    parts = [objective(pieces.networks(), piece, {}).further["judge"] for piece in micro_batches(batch, size)]
    torch.testing.assert_close(sum(parts), expected)
