"""One step: its learning rate, dropped captions, clipped gradients, and how the average follows."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apexflow.conditioning import Condition
from apexflow.objectives import Batch
from apexflow.training import loop
from apexflow.training.config import Optimizer, Recipe, load_recipe
from apexflow.training.loop import optimizer_of, start
from apexflow.training.roles import update_average
from apexflow.training.run import Run, Trainee
from apexflow.training.step import clip, learning_rate, make_batch, training_step

PEAK = 0.25


def rates(steps: int = 100, **settings: Any) -> list[float]:
    recipe = Recipe("", steps=steps, optimizer=Optimizer(learning_rate=PEAK, **settings))
    return [learning_rate(recipe, step) for step in range(steps + 1)]


# -- Learning rate -----------------------------------------------------------------------------------------------------


def test_the_rate_rises_evenly_to_its_peak_and_stays_there() -> None:
    assert rates(warmup=4)[:4] == pytest.approx([PEAK * share for share in (0.25, 0.5, 0.75, 1)])
    assert set(rates(warmup=4)[4:]) == {PEAK}
    assert set(rates(warmup=0)) == {PEAK}


def test_the_cosine_falls_from_the_peak_to_a_fiftieth() -> None:
    fall = rates(warmup=0, schedule="cosine")
    assert fall[0] == pytest.approx(PEAK) and fall[-1] == pytest.approx(PEAK / 50)
    assert all(later < earlier for earlier, later in pairwise(fall))
    # Symmetric about its middle: what is lost so far and what is still to lose are mirror images.
    assert [a + b for a, b in zip(fall, fall[::-1], strict=True)] == pytest.approx([PEAK + PEAK / 50] * len(fall))
    warmed = rates(warmup=10, schedule="cosine")
    assert warmed[0] == pytest.approx(fall[0] / 10) and warmed[9:] == fall[9:]


# -- Gradients and the optimizer ---------------------------------------------------------------------------------------


def test_gradients_are_shortened_to_the_norm_and_never_stretched() -> None:
    parameters = {name: nn.Parameter(torch.zeros(3)) for name in ("a", "b")}
    trainee = Trainee(parameters, torch.optim.AdamW(parameters.values()))
    given = {"a": torch.tensor([3.0, 0, 0]), "b": torch.tensor([0, 4.0, 0])}  # of norm 5 together
    for most, share in ((1.0, 0.2), (10.0, 1.0)):
        for name, parameter in parameters.items():
            parameter.grad = given[name].clone()
        assert float(clip(trainee, most)) == pytest.approx(5)  # what is recorded is the norm before
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.grad, share * given[name])


@pytest.mark.parametrize("most", [1e-3, 1e3])
def test_the_optimizer_sees_gradients_clipped_as_the_recipe_says(recipe_file: Path, most: float) -> None:
    options = ["method=flow_matching", "optimizer.betas=[0.75, 0.5]", f"optimizer.clip_norm={most}"]
    run = start(load_recipe(recipe_file, options), resume=False)
    norm = training_step(run)["grad_norm"]
    assert 1e-3 < norm < 1e3
    moments = [moment["exp_avg"] for moment in run.trainees["student"].optimizer.state.values()]
    # After one step the first moment is 1 - beta of the gradient.
    assert float(torch.cat([m.flatten() for m in moments]).norm()) == pytest.approx(0.25 * min(norm, most), rel=1e-3)


def test_the_optimizer_is_the_recipes_but_for_a_networks_own_betas() -> None:
    recipe = Recipe("", optimizer=Optimizer(learning_rate=PEAK, betas=(0.5, 0.75), weight_decay=0.125))
    for own, betas in ((None, (0.5, 0.75)), ((0.0, 0.999), (0.0, 0.999))):
        (group,) = optimizer_of(recipe, [nn.Parameter(torch.zeros(1))], own).param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (PEAK, betas, 0.125)


def test_a_finite_step_ends_the_row_of_those_that_were_not(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(load_recipe(recipe_file, ["steps=100", "bad_steps=2"]), resume=False)
    shape = run.data.latents([0]).shape[1:]
    for _ in range(3):
        with monkeypatch.context() as broken:
            broken.setattr(run.data, "latents", lambda rows: torch.full((len(rows), *shape), math.nan))
            assert training_step(run)["skipped"] == 1
        assert training_step(run)["skipped"] == 0


# -- The average -------------------------------------------------------------------------------------------------------


def follow(decay: float, step: int) -> float:
    """What is left of an average of 1 when the weights are 0."""
    roles: Any = SimpleNamespace(average={"w": torch.ones(1)}, trained={"w": nn.Parameter(torch.zeros(1))})
    update_average(roles, decay, step)
    assert roles.trained["w"].item() == 0
    return roles.average["w"].item()


def test_the_average_keeps_its_decay_once_it_is_warm() -> None:
    assert follow(0.0, 0) == follow(0.0, 10**6) == 0  # no average: the weights themselves
    for decay in (0.5, 0.999):
        assert follow(decay, 10**6) == pytest.approx(decay)


def test_early_averages_forget_fast_what_the_model_was_before() -> None:
    kept = [follow(0.999, step) for step in (0, 10, 100, 1000, 100_000)]
    assert kept[0] == pytest.approx(0.1)
    assert all(earlier < later for earlier, later in pairwise(kept))
    assert follow(0.05, 0) == pytest.approx(0.05)  # a short memory is never lengthened


@pytest.mark.parametrize(
    "options", [["tuning.kind=full"], ["tuning.kind=lora"], ["method=meanflow", "tuning.kind=lora"]]
)
def test_the_average_starts_as_the_student(recipe_file: Path, options: list[str]) -> None:
    """To the bit: an adapter that adds nothing yet would hide another start in its other half."""
    roles = start(load_recipe(recipe_file, options), resume=False).roles
    assert roles.average.keys() == roles.trained.keys()
    assert all(torch.equal(roles.average[name], parameter) for name, parameter in roles.trained.items())


@pytest.mark.parametrize("options", [["tuning.kind=lora"], ["method=meanflow"], ["method=sana_sprint"]], ids=str)
def test_what_is_made_anew_depends_on_the_seed_alone(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """Adapters, a second time and a judge: processes have drawn other numbers before, and a cache is made by one of them."""
    prepare = loop.prepare

    def first_weights(drawn: int, seed: int) -> dict[str, Tensor]:
        def drawing(*given: Any, **named: Any) -> Any:
            made = prepare(*given, **named)
            torch.rand(drawn)
            return made

        monkeypatch.setattr(loop, "prepare", drawing)
        output = f"output={tmp_path / f'{drawn}-{seed}'}"
        return start(load_recipe(recipe_file, [*options, f"seed={seed}", output]), resume=False).trained

    one, same, other = (first_weights(*of) for of in ((1, 0), (2, 0), (1, 1)))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


# -- Batches -----------------------------------------------------------------------------------------------------------


def batches(run: Run, steps: int = 16) -> list[Batch]:
    """The global batches of the first steps."""
    made = []
    for step in range(steps):
        run.step = step
        made.append(make_batch(run, torch.arange(run.recipe.batch)))
    return made


def words(c: Condition) -> Tensor:
    """The sum of each row's tokens (B, D), whatever it is padded to."""
    return (c.embeds if c.mask is None else c.embeds * c.mask[..., None]).sum(1).detach()


def dropped(run: Run, steps: int = 16) -> Tensor:
    """Which rows of the first steps have the null condition."""
    null = run.networks.null
    assert null is not None
    return torch.cat([((words(b.c) - words(null)).abs() < 1e-4).all(1) for b in batches(run, steps)])


@pytest.mark.parametrize("text_encoder", [False, True])
def test_captions_are_dropped_by_their_share(recipe_file: Path, text_encoder: bool) -> None:
    options = [f"tuning.text_encoder={str(text_encoder).lower()}"]
    run = start(load_recipe(recipe_file, options), resume=False)
    for share in (0.0, 0.25, 1.0):
        run.recipe = replace(run.recipe, caption_dropout=share)
        found = dropped(run).float().mean().item()
        assert found == share if share in (0, 1) else 0.05 < found < 0.5


def test_a_row_without_caption_has_its_picture_and_noise_as_before(recipe_file: Path) -> None:
    """And is one of any noise: which captions go is drawn apart from what the objective draws."""
    run = start(load_recipe(recipe_file, ["batch=16"]), resume=False)
    before = batches(run)
    run.recipe = replace(run.recipe, caption_dropout=0.5)
    after, gone = batches(run), dropped(run)
    drawn = [torch.cat([batch.random.uniform() for batch in made]) for made in (before, after)]
    assert torch.equal(*drawn) and all(torch.equal(one.x, two.x) for one, two in zip(before, after, strict=True))
    assert drawn[0][gone].max() > 0.9 and drawn[0][~gone].min() < 0.1


def test_dropped_rows_are_the_same_in_any_micro_batch(recipe_file: Path) -> None:
    run = start(load_recipe(recipe_file, ["batch=16", "caption_dropout=0.5"]), resume=False)
    whole = make_batch(run, torch.arange(16)).c
    parts = [make_batch(run, rows).c for rows in torch.arange(16).split(5)]
    torch.testing.assert_close(torch.cat([words(part) for part in parts]), words(whole))


def test_a_batch_says_how_far_the_run_has_come(recipe_file: Path) -> None:
    run = start(load_recipe(recipe_file, ["steps=8"]), resume=False)
    assert [(batch.progress, batch.turn) for batch in batches(run, 3)] == [(0, 0), (1 / 8, 1), (2 / 8, 2)]
