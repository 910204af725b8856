"""Recipes and overrides that cannot be: one line, exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Run, refused, write


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("output: x\nstepz: 3\n", ("stepz", "did you mean 'steps'")),
        ("output: x\nmethod: apexx\n", ("apexx", "did you mean 'apex'")),
        ("output: x\noptimizer: {learning_rat: 1}\n", ("learning_rat", "did you mean 'learning_rate'")),
        ("output: x\nobjective: {lambda_maxx: 1}\n", ("lambda_maxx", "did you mean 'lambda_max'")),
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
