"""Runs that end before their last step and go on: exactly as if they had not, and with the settings that made them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from interrupted import train_in_parts
from little_runs import KINDS, METHODS, assert_same, method_overrides, weights
from processes import command, launch, until, wait

from apexflow.errors import UserError
from apexflow.training.checkpoint import checkpoints
from apexflow.training.config import load_recipe
from apexflow.training.journal import last_step, read_metrics
from apexflow.training.loop import train


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_resume_after_a_stop_is_exact(recipe_file: Path, tmp_path: Path, method: str, kind: str) -> None:
    common = [*method_overrides(method), f"tuning.kind={kind}", "tuning.rank=4"]
    whole = load_recipe(recipe_file, [*common, f"output={tmp_path / 'whole'}"])
    train(whole)
    parts = load_recipe(recipe_file, [*common, f"output={tmp_path / 'parts'}"])
    train_in_parts(parts)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    losses = [[m["loss"] for m in read_metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0][2:] == losses[1]


def test_kill_and_resume_equals_an_uninterrupted_run(recipe_file: Path, tmp_path: Path) -> None:
    overrides = ["train", str(recipe_file), "steps=40", "checkpoint_every=3", "preview.every=100"]
    assert wait(launch(command, 1, *overrides, f"output={tmp_path / 'whole'}")) == [0]
    killed = launch(command, 1, *overrides, f"output={tmp_path / 'killed'}")
    until(lambda: checkpoints(tmp_path / "killed" / "checkpoints"), killed)
    os.kill(killed[0].pid, signal.SIGKILL)
    assert wait(killed) == [-signal.SIGKILL]
    assert wait(launch(command, 1, *overrides, f"output={tmp_path / 'killed'}", "--resume")) == [0]
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    steps = [m["step"] for m in read_metrics(tmp_path / "killed")]
    assert steps == list(range(1, 41))


def test_sigterm_saves_and_says_how_to_go_on(recipe_file: Path, tmp_path: Path) -> None:
    arguments = ["train", str(recipe_file), "steps=100000", "checkpoint_every=100000"]
    process = launch(command, 1, *arguments, errors=tmp_path / "errors")
    until(lambda: read_metrics(tmp_path / "run"), process)
    os.kill(process[0].pid, signal.SIGTERM)
    assert wait(process) == [130]
    errors = (tmp_path / "errors-0").read_text()
    assert "--resume" in errors and "Traceback" not in errors
    assert checkpoints(tmp_path / "run" / "checkpoints")


def test_a_run_whose_time_is_up_is_saved_once(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["minutes=1e-6"])  # a step, then the time is up
    train(recipe)
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    before = (saved / "state.json").stat().st_ino
    train(recipe, resume=True)
    assert checkpoints(saved.parent) == [saved] and (saved / "state.json").stat().st_ino == before
    assert [p.name for p in (tmp_path / "run" / "previews").glob("*.png")] == ["step-0000001.png"]


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(recipe_file: Path, tmp_path: Path) -> None:
    recipe, folder = load_recipe(recipe_file), tmp_path / "run"
    train(recipe)
    shutil.rmtree(folder / "checkpoints")
    metrics = folder / "metrics.jsonl"
    before = metrics.read_text()
    with pytest.raises(UserError, match=r"trained 6 steps and has no intact checkpoint: put .*checkpoints back, or "):
        train(recipe, resume=True)
    assert metrics.read_text() == before
    metrics.write_text(before.splitlines()[0] + "\n[]\n")  # as a run that was killed before its first checkpoint
    train(recipe, resume=True)
    assert [m["step"] for m in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("odd", ["no text", "a folder", "a file for the curves"])
def test_what_lies_in_the_place_of_the_curves_is_named(recipe_file: Path, tmp_path: Path, odd: str) -> None:
    train(load_recipe(recipe_file, ["steps=2"]))
    metrics, board = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "tensorboard"
    if odd == "no text":
        metrics.write_bytes(b"\xff\xfe{}")
    elif odd == "a folder":
        metrics.unlink()
        metrics.mkdir()
    else:
        shutil.rmtree(board)
        board.write_text("mine")
    with pytest.raises(
        UserError, match="tensorboard: a file is in the way" if "curves" in odd else "cannot read .*metrics"
    ):
        train(load_recipe(recipe_file, ["steps=4"]), resume=True)
    assert len(checkpoints(tmp_path / "run" / "checkpoints")) == 1


def test_lines_that_tell_no_step_count_for_none(tmp_path: Path) -> None:
    lines = ['{"step": 3}', '{"step": 1e999}', '{"step": -Infinity}', f'{{"step": {10**400}}}', "[" * 10**5]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert last_step(tmp_path) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [("steps=5", "already made 6 steps"), ("optimizer.learning_rate=0.5", "learning_rate 0.5 instead of")],
)
def test_a_run_with_no_step_left_keeps_the_settings_that_made_it(
    recipe_file: Path, tmp_path: Path, change: str, words: str
) -> None:
    train(load_recipe(recipe_file))
    kept = (tmp_path / "run" / "recipe.json").read_text()
    with pytest.raises(UserError, match=words):
        train(load_recipe(recipe_file, [change]), resume=True)
    assert (tmp_path / "run" / "recipe.json").read_text() == kept
    train(load_recipe(recipe_file, ["keep=1"]), resume=True)  # changes no step: what is left of the run is made


def test_a_run_whose_time_is_up_keeps_the_settings_that_made_it(recipe_file: Path, tmp_path: Path) -> None:
    train(load_recipe(recipe_file, ["minutes=1e-6"]))
    with pytest.raises(UserError, match="no steps left after 1"):
        train(load_recipe(recipe_file, ["minutes=1e-6", "ema_decay=0.5"]), resume=True)
    train(load_recipe(recipe_file, ["minutes=1", "ema_decay=0.5"]), resume=True)
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["ema_decay"] == 0.5


@pytest.mark.parametrize("told", [True, False])
def test_a_resumed_run_tells_what_its_model_says_otherwise(
    recipe_file: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], told: bool
) -> None:
    """No recipe says the scale at which its teacher is drawn; a checkpoint does, and one of before then compares recipes."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    settings = json.loads((model / "apexflow.json").read_text())
    ways = [f"model={model}", "checkpoint_every=1", f"output={tmp_path / 'scaled'}"]
    (model / "apexflow.json").write_text(json.dumps(settings | {"guidance": 4.0}))
    train(load_recipe(recipe_file, [*ways, "steps=1"]))
    assert json.loads((tmp_path / "scaled" / "recipe.json").read_text())["objective"] == {}
    train(load_recipe(recipe_file, [*ways, "steps=1"]), resume=True)  # ended, and nothing is otherwise
    (state,) = (tmp_path / "scaled" / "checkpoints").glob("*/state.json")
    if not told:
        kept = json.loads(state.read_text())
        assert kept.pop("objective")["guidance"] == 4.0
        state.write_text(json.dumps(kept))
    (model / "apexflow.json").write_text(json.dumps(settings | {"guidance": 3.0}))
    capsys.readouterr()
    train(load_recipe(recipe_file, [*ways, "steps=2"]), resume=True)
    seen = "".join(capsys.readouterr())
    assert ("objective.guidance 3.0 instead of 4.0" in " ".join(seen.split())) == told


def test_a_checkpoint_of_other_weights_is_refused_by_the_setting_that_was_changed(
    recipe_file: Path, tmp_path: Path
) -> None:
    ways = ["tuning.kind=lora", "tuning.rank=4", f"output={tmp_path / 'adapter'}", "steps=2"]
    train(load_recipe(recipe_file, ways))
    for change, words in (
        ("tuning.rank=8", "tuning.rank 8 instead of 4"),
        ("tuning.kind=full", "tuning.kind full instead"),
    ):
        with pytest.raises(UserError, match=rf"step-0000002 cannot be resumed with .*{words}.*another output"):
            train(load_recipe(recipe_file, [*ways, "steps=3", change]), resume=True)
