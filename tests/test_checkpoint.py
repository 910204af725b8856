"""Checkpoints: which are kept, which are trusted, and what of the optimizer they hold."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from full_disk import file_size_limit
from little_runs import assert_same
from safetensors.torch import load_file, save_file

from apexflow.errors import UserError
from apexflow.training import loop
from apexflow.training.checkpoint import checkpoints, load_checkpoint
from apexflow.training.config import load_recipe
from apexflow.training.journal import read_metrics
from apexflow.training.loop import start, train
from apexflow.training.run import Trainee, _optimizer_targets, save
from apexflow.training.step import training_step


def test_a_full_disk_leaves_the_last_good_checkpoint(recipe_file: Path, tmp_path: Path) -> None:
    run = start(load_recipe(recipe_file), resume=False)
    training_step(run)
    good = save(run)
    training_step(run)

    with file_size_limit(1000), pytest.raises(UserError, match=r"cannot save .*free some space"):
        save(run)
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial-*"))
    assert checkpoints(tmp_path / "run" / "checkpoints") == [good]
    assert load_checkpoint(good).state["step"] == 1


def test_old_checkpoints_are_dropped(recipe_file: Path, tmp_path: Path) -> None:
    train(load_recipe(recipe_file, ["keep=2"]))
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-0000004", "step-0000006"]


def test_a_copy_among_the_checkpoints_is_neither_resumed_nor_deleted(recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    train(load_recipe(recipe_file, ["steps=2"]))
    copies = ["step-2", "step-best", "step-0000002-backup", "step-00000002"]
    for name in copies:
        shutil.copytree(folder / "step-0000002", folder / name)
    train(load_recipe(recipe_file, ["keep=1"]), resume=True)
    assert sorted(p.name for p in folder.iterdir()) == sorted(["step-0000006", *copies])
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    # A name that a run might give: the state tells, and what was saved after it is no older for it.
    ahead = shutil.copytree(folder / "step-0000006", folder / "step-0000009")
    with pytest.raises(UserError, match=r"step-0000009 is damaged \(it was saved at step 6\): delete it"):
        train(load_recipe(recipe_file, ["steps=8"]), resume=True)
    run = start(load_recipe(recipe_file, [f"output={tmp_path / 'other'}"]), resume=False)
    (tmp_path / "other" / "checkpoints").mkdir()
    ahead.rename(tmp_path / "other" / "checkpoints" / ahead.name)
    for _ in range(3):
        training_step(run)
        save(run)
    assert [p.name for p in checkpoints(tmp_path / "other" / "checkpoints")][-2:] == ["step-0000003", ahead.name]


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    names = ["step-0000002", "step-9999999", "step-10000000"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    assert [p.name for p in checkpoints(tmp_path)] == names


STATES = {"list": [], "sizes": {"sizes": []}, "world": {"world": None}, "recipe": {"recipe": None}}
STATES |= {"no sizes": {"sizes": {}}, "no world": {"world": 0}, "less than no world": {"world": -1}, "bad": {"bad": -1}}
STATES |= {"before": {"step": -5}, "true": {"step": True}, "other step": {"step": 3}, "back in time": {"seconds": -1e9}}
STATES |= {"no time": {"seconds": float("nan")}, "without end": {"seconds": float("inf")}}


@pytest.mark.parametrize("damage", ["truncate", "remove", "foreign", "garbage", *STATES])
def test_a_damaged_checkpoint_is_named(recipe_file: Path, tmp_path: Path, damage: str) -> None:
    train(load_recipe(recipe_file, ["steps=2"]))
    last = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    file = next(last.glob("*.safetensors"))
    if damage == "truncate":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "remove":
        file.unlink()
    elif damage == "garbage":
        file.write_bytes(b"x" * file.stat().st_size)
    elif damage in STATES:
        state = json.loads((last / "state.json").read_text())
        damaged = STATES[damage]
        (last / "state.json").write_text(json.dumps(state | damaged if isinstance(damaged, dict) else damaged))
    else:
        state = json.loads((last / "state.json").read_text())
        save_file({"trained/other": torch.zeros(2)}, file)
        state["sizes"][file.name] = file.stat().st_size
        (last / "state.json").write_text(json.dumps(state))
    kept = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="step-0000002"):
        train(load_recipe(recipe_file, ["steps=4"]), resume=True)
    assert all(path.read_bytes() == content for path, content in kept.items())


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("/step", "lacks step of transformer"),
        ("/exp_avg", r"lacks exp_avg of transformer\S+, which optimizer.kind=adamw needs: delete it"),
        ("", "lacks the optimizer's state: delete it"),
    ],
)
def test_a_checkpoint_without_a_part_of_the_optimizer_is_not_resumed(
    recipe_file: Path, tmp_path: Path, lost: str, words: str
) -> None:
    train(load_recipe(recipe_file, ["steps=2"]))
    (last,) = checkpoints(tmp_path / "run" / "checkpoints")
    (file,) = last.glob("*.safetensors")
    tensors, state = load_file(file), json.loads((last / "state.json").read_text())
    gone = [name for name in tensors if name.startswith("optimizer/") and name.endswith(lost)]
    for name in gone[:1] if lost else gone:
        del tensors[name]
    save_file(tensors, file)
    state["sizes"][file.name] = file.stat().st_size
    (last / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=words):
        start(load_recipe(recipe_file, ["steps=4"]), resume=True)


def test_a_run_without_a_finite_step_has_no_moments_and_is_resumed(recipe_file: Path) -> None:
    run = start(load_recipe(recipe_file), resume=False)
    run.step = run.bad = 1
    save(run)
    assert start(load_recipe(recipe_file), resume=True).bad == 1


class CountingAdam(torch.optim.Optimizer):
    """Keeps state as the optimizer in eight bits does: a plain number of steps, moments as bytes, and a table."""

    def __init__(self, parameters: list, lr: float, **_: object) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state |= {"step": 0, "qmap1": torch.zeros(5)}
                state |= {key: torch.zeros_like(parameter, dtype=torch.uint8) for key in ("state1", "state2")}
            assert isinstance(state["step"], int)
            state["step"] += 1
            state["state1"] += 1
            state["qmap1"] += parameter.grad.abs().max()
            parameter.data -= self.param_groups[0]["lr"] * state["qmap1"].sum() * parameter.grad


@pytest.mark.parametrize("fused", [True, None])
def test_a_fused_optimizer_counts_its_steps_beside_the_weights(fused: bool | None) -> None:
    parameter = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.defaults["fused"] = fused  # which refuses to begin on this device
    found = {f"optimizer/w/{key}": torch.empty(shape) for key, shape in (("step", ()), ("exp_avg", (3,)))}
    run: Any = SimpleNamespace(trainees={"student": Trainee({"w": parameter}, optimizer)})
    targets = _optimizer_targets(run, found, "a checkpoint")
    assert targets["optimizer/w/step"].device.type == ("meta" if fused else "cpu")
    assert targets["optimizer/w/exp_avg"].device.type == "meta"


def test_moments_in_eight_bits_are_resumed(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "adam_in_eight_bits", lambda: CountingAdam)
    recipe = load_recipe(recipe_file, ["optimizer.kind=adamw8bit", "steps=4"])
    run = start(recipe, resume=False)
    for _ in range(2):
        training_step(run)
    save(run)
    again = start(recipe, resume=True)
    for one in (run, again):
        training_step(one)
    assert_same(run.roles.trained, again.roles.trained)
    states = [list(one.trainees["student"].optimizer.state.values()) for one in (run, again)]
    assert [s["step"] for s in states[0]] == [s["step"] for s in states[1]] and states[0][0]["step"] == 3
    # Deleting the checkpoint, as one that is damaged, would lose its steps and help nothing.
    with pytest.raises(
        UserError, match=r"with optimizer.kind adamw instead of adamw8bit: restore the setting"
    ) as refusal:
        start(load_recipe(recipe_file, ["steps=4"]), resume=True)
    assert "delete" not in str(refusal.value)
