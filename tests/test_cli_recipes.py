"""Recipes and overrides that cannot be: one line, exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Run, refused, write

from apexflow.training.config import Recipe, Tuning, load_recipe
from apexflow.training.run import changed

# Which stand for 10**30 values.
LAUGHS = "output: x\nobjective: {a0: &a0 [1],\n" + ",".join(
    f" a{n}: &a{n} [{f'*a{n - 1},' * 10}]" for n in range(1, 30)
)


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
        ("output: x\noptimizer: 1\n", ("optimizer", "a section of keys", "got 1")),
        ("output: x\nobjective: {times: 1}\n", ("times", "a section of keys", "got 1")),
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
        ("output: x\nobjective: &a {x: *a}\n", ("line 2", "alias *a within an anchor")),
        (LAUGHS, ("line 3", "alias *a0 within an anchor")),
        ("output: x\nobjective: " + "[" * 5000, ("YAML", "nested too deeply")),
        (f"output: x\nsteps: {'9' * 5000}\n", ("line 2", "digits")),
        ("output: x\nsteps: !!int seven\n", ("YAML", "seven")),
        ("output: x\nsteps: !!bool seven\n", ("YAML", "seven")),
        ("output: x\nsteps: true\n", ("steps: Input should be a number",)),
        ("output: x\nminutes: no\n", ("minutes: Input should be a valid number",)),
        ("output: x\noptimizer: {betas: [true, false]}\n", ("optimizer.betas",)),
        ("output: x\nobjective: {path_weight: true}\n", ("objective: path_weight: Input should be a number",)),
        ("output: x\nminutes: 1:30\n", ("minutes", "'1:30'")),
        ("output: x\nsteps: 0x10\n", ("steps", "'0x10'")),
        ("output: x\npreview: {prompts: a red cube}\n", ("preview.prompts: Input should be a list, got 'a red cube'",)),
        ("output: x\nbatch: 1000000000000\n", ("batch", "less than or equal to 65536")),
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


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    text = "output: x\nsteps: 010\nbatch: 1_000\noptimizer: {learning_rate: 1e-4, weight_decay: .5}\nema_decay: 0.98\n"
    overrides = [
        "seed=010",
        "minutes=1e1",
        "preview.steps=+3",
        "preview.guidance=-1.5e-1",
        "model=1:30",
        "data.cache=a: b: c",
    ]
    recipe = load_recipe(write(tmp_path / "r.yaml", text), overrides)
    assert (recipe.steps, recipe.batch, recipe.seed, recipe.minutes, recipe.preview.steps) == (10, 1000, 10, 10.0, 3)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.weight_decay, recipe.ema_decay) == (1e-4, 0.5, 0.98)
    assert (recipe.preview.guidance, recipe.model, recipe.data.cache) == (-0.15, "1:30", "a: b: c")


@pytest.mark.parametrize(
    ("text", "name"),
    [("my set #2", "my set #2"), ("#2", "#2"), ("ä#1 #2", "ä#1 #2"), ("'a #1'", "a #1"), ('"a" #1', "a"), (" a ", "a")],
)
def test_an_override_has_no_comment_that_a_path_would_lose(tmp_path: Path, text: str, name: str) -> None:
    assert load_recipe(write(tmp_path / "r.yaml", "output: x\n"), [f"data.source={text}"]).data.source == name


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps=true", ("steps", "number")),
        ("minutes=1:30", ("minutes", "'1:30'")),
        (f"steps={'9' * 5000}", ("override", "digits")),
        (f"objective={'[' * 5000}", ("override", "nested")),
        ("objective={share: 1, share: 2}", ("override", "'share' is given twice")),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_override_is_read_as_the_recipe_is(
    run: Run, recipe_file: Path, override: str, words: tuple[str, ...]
) -> None:
    refused(run("train", recipe_file, override), *words)


def test_what_a_resumed_run_does_otherwise_is_told() -> None:
    first = Recipe("run", steps=3).to_dict()
    before = json.loads(json.dumps(first))  # as a checkpoint keeps it
    now = Recipe("run", steps=5, tuning=Tuning(alpha=2), objective={"share": 1.0}).to_dict()
    assert changed(before, first) == []
    del before["tuning"]["storage"]  # a checkpoint of an earlier version
    said = ["objective {'share': 1.0} instead of {}", "tuning.alpha 2 instead of None", "steps 5 instead of 3"]
    assert changed(before | {"gone": 1}, now) == said
