"""Recipes and overrides that cannot be: one line, exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Run, refused, write

from apexflow.training.config import Recipe, Tuning, load_recipe
from apexflow.training.run import changed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("output: x\nstepz: 3\n", ("stepz", "did you mean 'steps'")),
        ("output: x\nmethod: apexx\n", ("apexx", "did you mean 'apex'")),
        ("output: x\noptimizer: {learning_rat: 1}\n", ("learning_rat", "did you mean 'learning_rate'")),
        ("output: x\nobjective: {lambda_maxx: 1}\n", ("lambda_maxx", "did you mean 'lambda_max'")),
        ("output: x\nlambda_max: 1\n", ("lambda_max", "did you mean 'objective.lambda_max'")),
        ("output: x\nlearning_rat: 1\n", ("learning_rat", "did you mean 'optimizer.learning_rate'")),
        ("output: x\nobjective: {clip: -1}\n", ("objective", "clip and c must be above 0")),
        ("output: x\nsteps: -3\n", ("steps", "-3")),
        ("output: x\nbatch: 0\n", ("batch", "0")),
        ("output: x\nbatch: many\n", ("batch", "many")),
        ("output: x\nsteps: 1.5\n", ("steps", "1.5")),
        ("output: x\nseed: -1\n", ("seed", "-1")),
        ("output: x\nseed: 99999999999999999999999\n", ("seed",)),
        ("output: x\nminutes: -1\n", ("minutes", "-1")),
        ("output: x\nema_decay: 1\n", ("ema_decay", "less than 1")),
        ("output: x\ncaption_dropout: 2\n", ("caption_dropout", "2")),
        ("output: x\nsampling_steps: 0\n", ("sampling_steps", "0")),
        ("output: x\nsampling_steps: 10001\n", ("sampling_steps", "10001")),
        ("output: x\npreview: {steps: 10001}\n", ("preview.steps", "10001")),
        ("output: x\nsuite: geneval\n", ("suite", "'mini-geneval'", "got 'geneval'")),
        ("output: x\nmodel: ''\n", ("model", "at least 1 character")),
        ("output: x\noptimizer: {learning_rate: 0}\n", ("optimizer.learning_rate", "greater than 0")),
        ("output: x\noptimizer: {learning_rate: .nan}\n", ("optimizer.learning_rate", "nan")),
        ("output: x\noptimizer: {learning_rate: .inf}\n", ("optimizer.learning_rate", "finite", "inf")),
        ("output: x\noptimizer: {warmup: -1}\n", ("optimizer.warmup", "-1")),
        ("output: x\noptimizer: {clip_norm: 0}\n", ("optimizer.clip_norm", "0")),
        ("output: x\noptimizer: {weight_decay: -1}\n", ("optimizer.weight_decay", "-1")),
        ("output: x\noptimizer: {betas: [2, 3]}\n", ("optimizer.betas.0", "2")),
        ("output: x\npreview: {every: 0}\n", ("preview.every", "0")),
        ("output: x\npreview: {count: 0}\n", ("preview.count", "0")),
        ("output: x\npreview: {guidance: .nan}\n", ("preview.guidance", "nan")),
        ("output: x\ndata: {count: 0}\n", ("data.count", "0")),
        ("output: x\ndata: {size: 0}\n", ("data.size", "0")),
        ("output: x\ndata: {skip_limit: 2}\n", ("data.skip_limit", "2")),
        ("output: x\ntuning: {rank: 0}\n", ("tuning.rank", "0")),
        ("output: x\ntuning: {kind: lora, alpha: 0}\n", ("tuning.alpha", "0")),
        ("output: x\nobjective: {path_weight: .nan}\n", ("path_weight", "nan")),
        ("output: x\nobjective: {times: {shift: .inf}}\n", ("times.shift", "finite")),
        ("output: x\nobjective: {lambda_max: 1.5}\n", ("lambda_max", "1.5")),
        ("output: x\nobjective: {pairing: pears}\n", ("pairing", "pears")),
        ("output: x\nobjective: {times: {kind: sometimes}}\n", ("sometimes",)),
        ("steps: 3\n", ("output",)),
        ("output: [\n", ("YAML",)),
        ("output: x\nsteps: 3\nsteps: 4\n", ("line 3", "'steps' is given twice")),
        ("output: x\ndata: {count: 3, count: 4}\n", ("line 2", "'count' is given twice")),
        ("- a\n- b\n", ("mapping",)),
    ],
)
def test_a_bad_recipe_is_named(run: Run, tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    refused(run("train", write(tmp_path / "r.yaml", text)), *words)


def test_a_missing_recipe_and_a_bad_override(run: Run, tmp_path: Path, recipe_file: Path) -> None:
    refused(run("train", tmp_path / "none.yaml"), "none.yaml")
    refused(run("train", tmp_path), str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes("output: läuft\n".encode("latin-1"))
    refused(run("train", tmp_path / "latin.yaml"), "latin.yaml", "UTF-8")
    refused(run("train", recipe_file, "steps"), "steps", "key=value")
    refused(run("train", recipe_file, "steps.more=1"), "steps")


def test_a_recipe_as_other_editors_write_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = ("output: ~/run", "optimizer: {learning_rate: 1e-4}", "preview: &few {count: 2}", "data: {<<: *few}")
    (tmp_path / "r.yaml").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    recipe = load_recipe(tmp_path / "r.yaml", ["data.cache=~/läuft schon"])
    assert recipe.output == str(tmp_path / "run") and recipe.data.cache == str(tmp_path / "läuft schon")
    assert recipe.optimizer.learning_rate == 1e-4 and recipe.data.count == recipe.preview.count == 2


def test_what_a_resumed_run_does_otherwise_is_told() -> None:
    first = Recipe("run", steps=3).to_dict()
    before = json.loads(json.dumps(first))  # as a checkpoint keeps it
    now = Recipe("run", steps=5, tuning=Tuning(alpha=2), objective={"share": 1.0}).to_dict()
    assert changed(before, first) == []
    del before["tuning"]["storage"]  # a checkpoint of an earlier version
    said = ["objective {'share': 1.0} instead of {}", "tuning.alpha 2 instead of None", "steps 5 instead of 3"]
    assert changed(before | {"gone": 1}, now) == said
