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
    refused(run("train", recipe_file, "steps"), "steps", "key=value")
    refused(run("train", recipe_file, "steps.more=1"), "steps")
