"""Sets of the hub, by their names. The hub is played by a function: no test reaches for the network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from command_line import Run, refused
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from apexflow.data import hub
from apexflow.errors import UserError

NAME = "hf://datasets/owner/some.set"


@pytest.fixture
def asked(scene_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What is asked of a hub that has one set, the scenes."""
    calls: list[dict[str, Any]] = []

    def serve(name: str, **given: Any) -> str:
        calls.append({"name": name} | given)
        return str(scene_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", serve)
    hub._fetched.cache_clear()
    yield calls
    hub._fetched.cache_clear()


def test_a_run_trains_on_a_set_of_the_hub_that_it_fetches_once(
    run: Run, recipe_file: Path, tmp_path: Path, scene_folder: Path, asked: list[dict[str, Any]]
) -> None:
    def losses(source: object, output: Path) -> list[float]:
        code, _, error = run("train", recipe_file, f"data.source={source}", f"output={output}", "steps=2", "suite=null")
        assert code == 0, error
        return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]

    of_hub = losses(NAME, tmp_path / "hub")
    assert len(of_hub) == 2 and of_hub == losses(scene_folder, tmp_path / "path")
    assert [(call["name"], call["repo_type"], call["revision"]) for call in asked] == [
        ("owner/some.set", "dataset", None)
    ]
    assert json.loads((tmp_path / "hub" / "recipe.json").read_text())["data"]["source"] == NAME


def test_cache_takes_its_name_and_plan_fetches_nothing(
    run: Run, recipe_file: Path, tmp_path: Path, tiny_model: Path, asked: list[dict[str, Any]]
) -> None:
    assert run("plan", recipe_file, f"data.source={NAME}", "--tokens", 8)[0] == 0 and asked == []
    code, out, _ = run("cache", NAME, "-o", tmp_path / "cache", "--model", tiny_model, "--json")
    assert code == 0 and json.loads(out)["rows"] == 48 and len(asked) == 1


def test_only_what_is_read_is_fetched_of_the_revision_and_the_part_that_are_named(asked: list[dict[str, Any]]) -> None:
    there = [
        "data.py",
        "weights.bin",
        "a/b/0001.tar",
        "a/x.JPG",
        "a[1]/0001.tar",
        "a1/0001.tar",
        "README.md",
        "notes.txt",
    ]

    def fetched(name: str) -> set[str]:
        with (
            nullcontext() if name == NAME else pytest.raises(UserError, match="the dataset has no readable")
        ):  # the scenes have no parts
            hub.located(name)
        patterns = asked[-1]["allow_patterns"]
        return set(huggingface_hub.utils.filter_repo_objects(there, allow_patterns=patterns))

    assert fetched(NAME) == set(there) - {"data.py", "weights.bin", "README.md"}
    assert fetched(f"{NAME}@v1.0/a") == {"a/b/0001.tar", "a/x.JPG"} and asked[-1]["revision"] == "v1.0"
    assert fetched(f"{NAME}@main/a[1]/") == {"a[1]/0001.tar"}
    assert fetched(f"{NAME}@main/notes.txt") == {"notes.txt"}


@pytest.mark.parametrize("name", ["hf://owner/name", "hf://datasets/name", f"{NAME}/../other", "hf://datasets/a/b@/c"])
def test_what_names_no_set_of_the_hub_is_told(
    name: str, run: Run, recipe_file: Path, asked: list[dict[str, Any]]
) -> None:
    refused(run("train", recipe_file, f"data.source={name}"), name, "hf://datasets/OWNER/NAME")
    assert asked == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError, "https://huggingface.co/datasets/owner/some.set"),
        (RepositoryNotFoundError, "the hub has no such dataset"),
        (RevisionNotFoundError, "check the name"),
        (TimeoutError, "check the name and the network"),
    ],
)
def test_why_a_set_cannot_be_fetched_is_told(
    error: Callable[..., Exception],
    words: str,
    run: Run,
    tmp_path: Path,
    asked: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> str:
        answer = SimpleNamespace(headers={}, request=None)
        raise error("no", **({} if error is TimeoutError else {"response": answer}))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(run("cache", NAME, "-o", tmp_path / "cache"), NAME, words)
    assert not (tmp_path / "cache").exists()
