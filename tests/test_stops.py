"""Ctrl-C in the long commands: one line says what is kept and how to go on, and so it goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, write

from apexflow.data import caching, files, shards, synthesize
from apexflow.errors import Stopped
from apexflow.generator import load


def stopped(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 130 and one line that holds every word."""
    code, _, errors = result
    line = errors.strip().splitlines()[-1]
    assert code == 130 and "Traceback" not in errors
    assert line.startswith("apexflow: error: stopped: ") and all(word in line for word in words), line


def ctrl_c_at(name: str, write_one: Callable[..., Any]) -> Callable[..., Any]:
    """Like `write_one`, with a Ctrl-C as it is asked to write that file."""

    def interrupted(*arguments: Any, **named: Any) -> Any:
        if any(name in str(argument) for argument in arguments):
            signal.raise_signal(signal.SIGINT)
        return write_one(*arguments, **named)

    return interrupted


def test_a_cache(
    run: Run, recipe_file: Path, scene_folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "WINDOW", 8)
    alone = ("cache", scene_folder, "-o", tmp_path / "cache", "--model", tiny_model)
    within = ("train", recipe_file, "steps=1")
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", ctrl_c_at("shard-000002", files.save_file))
        kept = f"finished shards of 8 records kept in {tmp_path / 'cache'}: 2; run the same command to resume"
        stopped(run(*alone), kept)
        stopped(run(*within), f"kept in {tmp_path / 'run'}: resume with the same command and --resume")
    assert run(*alone)[0] == run(*within, "--resume")[0] == 0


def test_a_synthesis(run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesize, "SHARD", 1)
    prompts = write(tmp_path / "prompts.txt", "a red star\na blue ring\n")
    command = ("synthesize", prompts, "-o", tmp_path / "set", "--model", tiny_model, "--steps", 1)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_add", ctrl_c_at("0000001.txt", shards._add))
        stopped(
            run(*command),
            f"finished shards of 1 pictures kept in {tmp_path / 'set'}: 1; run the same command to resume",
        )
    assert run(*command)[0] == 0


def test_scenes_that_are_not_all_drawn_are_not_taken_for_the_set(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_add", ctrl_c_at("0000001.txt", shards._add))
        stopped(
            run("data", "scenes", tmp_path / "set", "--count", 3),
            str(tmp_path / "set"),
            "delete it",
            "run the same command again",
        )


def test_a_comparison_between_two_trainings(
    run: Run, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apexflow.comparison.results.costs", ctrl_c_at("", print))
    stopped(
        run("compare", "-o", tmp_path / "c", "--recipe", recipe_file),
        f"{tmp_path / 'c'}: run the same command to resume",
    )


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Stopped("resume with the same command and --resume")])
def test_a_demo_which_has_no_resume(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    def train(*_: Any) -> Path:
        raise stop

    monkeypatch.setattr("apexflow.demo.train", train)
    result = run("demo", "-o", tmp_path / "demo")
    stopped(result, "the same command with --force to start over")
    assert "--resume" not in result[2]


def test_a_stop_before_anything_is_kept_is_told(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apexflow.generator.load", ctrl_c_at("", load))
    assert run("generate", "a star", "-o", tmp_path / "o.png") == (130, "", "apexflow: error: stopped\n")
