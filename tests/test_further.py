"""Further networks: made from what a method declares, stepped by their own optimizers, resumed exactly, with LoRA too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interrupted import train_in_parts
from torch import nn

from apexflow.conditioning import Condition
from apexflow.errors import UserError
from apexflow.training.checkpoint import checkpoints, load_checkpoint
from apexflow.training.config import load_recipe
from apexflow.training.further import blocks_at, tokens
from apexflow.training.loop import start, train
from apexflow.training.run import Run
from apexflow.training.step import make_batch, training_step

KINDS = pytest.mark.parametrize("kind", ["full", "lora"])
# The student's turn comes every second step, so that three steps show both.
METHODS = {"dmd2": ["objective.student_every=2", "objective.guidance=2"], "sana_sprint": []}
EVERY = pytest.mark.parametrize("method", METHODS)


def overrides(method: str, kind: str) -> list[str]:
    return [f"method={method}", *METHODS[method], f"tuning.kind={kind}", "tuning.rank=4", "preview.every=100"]


def weights(run: Run) -> dict[str, dict[str, torch.Tensor]]:
    return {role: {n: p.detach().clone() for n, p in one.parameters.items()} for role, one in run.trainees.items()}


def changed(before: dict[str, dict[str, torch.Tensor]], run: Run) -> set[str]:
    now = weights(run)
    return {role for role in now if any(not torch.equal(now[role][name], before[role][name]) for name in now[role])}


@pytest.mark.parametrize("options", ["tuning.kind=full", "tuning.kind=lora", "tuning.text_encoder=true"])
@EVERY
def test_each_role_is_stepped_at_its_turn_alone(recipe_file: Path, method: str, options: str) -> None:
    run = start(load_recipe(recipe_file, [*overrides(method, "full"), options]), resume=False)
    others = set(run.trainees) - {"student"}
    start_of_average = {name: tensor.clone() for name, tensor in run.roles.average.items()}
    first = weights(run)
    numbers = training_step(run)
    assert changed(first, run) == ({"student", *others} if method == "dmd2" else {"student"})
    assert "grad_norm" in numbers and all(f"grad_norm_{role}" in numbers for role in others) == (method == "dmd2")
    second, average = weights(run), {name: tensor.clone() for name, tensor in run.roles.average.items()}
    assert any(not torch.equal(average[name], start_of_average[name]) for name in average)
    numbers = training_step(run)
    assert changed(second, run) == others and "grad_norm" not in numbers
    assert all(torch.equal(average[name], tensor) for name, tensor in run.roles.average.items())


@KINDS
def test_a_critic_starts_as_the_pretrained_model_and_leaves_it_be(recipe_file: Path, kind: str) -> None:
    run = start(load_recipe(recipe_file, overrides("dmd2", kind)), resume=False)
    x, t, c = run.data.latents([0, 1]), torch.tensor([0.3, 1.0]), run.data.condition([0, 1])
    networks = run.engine.networks
    with torch.no_grad():
        base = networks.teacher(x, t, c)
        assert torch.equal(networks.further["critic"](x, t, c), base)
    for _ in range(3):
        training_step(run)
    with torch.no_grad():
        answers = [networks.student(x, t, c), networks.further["critic"](x, t, c), networks.reference(x, t, c)]
        assert torch.equal(networks.teacher(x, t, c), base)
    for one, answer in enumerate(answers):
        assert not torch.equal(answer, base) and all(not torch.equal(answer, other) for other in answers[:one])


@pytest.mark.parametrize(("method", "kind"), [("dmd2", "full"), ("dmd2", "lora"), ("sana_sprint", "full")])
def test_runs_with_further_networks_resume_exactly(recipe_file: Path, tmp_path: Path, method: str, kind: str) -> None:
    common = [*overrides(method, kind), "steps=4", "checkpoint_every=100"]
    model = train(load_recipe(recipe_file, [*common, f"output={tmp_path / 'whole'}"]))
    parts = load_recipe(recipe_file, [*common, f"output={tmp_path / 'parts'}"])
    train_in_parts(parts)
    one, other = (load_checkpoint(checkpoints(tmp_path / n / "checkpoints")[-1]).tensors for n in ("whole", "parts"))
    assert any(name.startswith("judge.") for name in one["trained"])
    for part in ("trained", "average", "optimizer"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])
    names = {path.name for path in model.iterdir()}
    assert "transformer" in names and not any("judge" in name or "critic" in name for name in names)


@KINDS
def test_networks_asked_with_their_weights_held_pass_gradients_to_the_point_alone(recipe_file: Path, kind: str) -> None:
    """Those of a judge with the critic's that it looks at; afterwards all learn as before."""
    run = start(load_recipe(recipe_file, overrides("dmd2", kind)), resume=False)
    t, c = torch.tensor([0.3, 1.0]), run.data.condition([0, 1])
    learning = [name for name, parameter in run.trained.items() if parameter.requires_grad]
    assert learning == list(run.trained)
    for name, field in run.networks.frozen.items():
        x = run.data.latents([0, 1]).requires_grad_()
        field(x, t, c).square().sum().backward()
        assert x.grad is not None and x.grad.abs().max() > 0, name
        assert all(p.grad is None and p.requires_grad for p in run.trained.values()), name


def test_a_judge_learns_at_the_rate_and_with_the_betas_that_its_method_says(recipe_file: Path) -> None:
    run = start(load_recipe(recipe_file, ["method=pcm"]), resume=False)
    (judge,) = run.objective.further
    assert judge.betas is not None and judge.betas != run.recipe.optimizer.betas and judge.rate != 1
    assert run.trainees["judge"].rate == judge.rate
    assert run.trainees["judge"].optimizer.param_groups[0]["betas"] == judge.betas


def test_a_further_network_has_its_own_rate(recipe_file: Path) -> None:
    run = start(load_recipe(recipe_file, overrides("dmd2", "full")), resume=False)
    run.trainees["critic"].rate = 3.0
    rate = training_step(run)["learning_rate"]
    used = {role: one.optimizer.param_groups[0]["lr"] for role, one in run.trainees.items()}
    assert used["critic"] == pytest.approx(3 * rate) and used["student"] == pytest.approx(rate)


def test_micro_batches_change_nothing_for_critics_and_judges(recipe_file: Path, tmp_path: Path) -> None:
    norms = []
    for size in (4, 1):
        recipe = load_recipe(
            recipe_file, [*overrides("dmd2", "full"), f"micro_batch={size}", f"output={tmp_path / str(size)}"]
        )
        norms.append(training_step(start(recipe, resume=False)))
    for key in ("loss", "grad_norm", "grad_norm_critic", "grad_norm_judge"):
        assert norms[1][key] == pytest.approx(norms[0][key], rel=2e-3)


def test_a_network_without_blocks_cannot_be_judged() -> None:
    with pytest.raises(UserError, match="no list of blocks"):
        blocks_at(nn.Linear(2, 2), (0.5,))


def test_blocks_are_taken_at_shares_of_the_depth() -> None:
    network = nn.Module()
    network.short, network.blocks = nn.ModuleList([nn.Identity()]), nn.ModuleList(nn.Identity() for _ in range(20))
    found = blocks_at(network, (0.1, 0.4, 0.7, 0.95, 1.0))
    assert [list(network.blocks).index(block) for block in found] == [2, 8, 14, 19, 19]


def test_tokens_are_a_pictures_own() -> None:
    text, picture, map_ = torch.zeros(1, 3, 5), torch.ones(1, 4, 5), torch.ones(1, 7, 2, 2)
    assert torch.equal(tokens((text, picture)), picture) and torch.equal(tokens(picture), picture)
    assert tokens((map_, (map_, map_))).shape == (1, 4, 7)


def test_the_following_row_is_the_next_of_the_global_batch(recipe_file: Path) -> None:
    """Whatever part of the batch asks, and after the last row comes the first; a batch of one has none."""
    run = start(load_recipe(recipe_file, ["method=sana_sprint", "caption_dropout=0"]), resume=False)

    def text(c: Condition) -> torch.Tensor:
        return c.embeds.sum(1) if c.mask is None else (c.embeds * c.mask[..., None]).sum(1)

    whole = text(make_batch(run, torch.arange(4)).c)
    assert len(whole.unique(dim=0)) > 1
    for rows in ([0, 1, 2, 3], [2, 3], [3]):
        following = make_batch(run, torch.tensor(rows)).following
        assert following is not None
        torch.testing.assert_close(text(following()), whole[[(row + 1) % 4 for row in rows]])
    alone = replace(run, recipe=replace(run.recipe, batch=1))
    assert make_batch(alone, torch.arange(1)).following is None
