"""What can be told wrong before any data are drawn or cached is told then, and leaves nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run, refused, write
from safetensors.torch import save_file

from apexflow.training import prepare


@pytest.fixture
def scenes_recipe(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe on scenes that nobody may draw yet."""

    def too_early(*_: Any) -> int:
        raise AssertionError("scenes are drawn before the mistake is told")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "write_scenes", too_early)
    text = recipe_file.read_text()
    return write(recipe_file, "\n".join(line for line in text.splitlines() if not line.startswith("data:")))


def cut(model: Path, part: str) -> None:
    file = next((model / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])


def other(model: Path, part: str) -> None:
    save_file({"other": torch.zeros(10**6)}, next((model / part).glob("*.safetensors")), {"format": "pt"})


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (shutil.rmtree, "not found"),
    "no checkpoint": (lambda model: (model / "model_index.json").unlink(), "model_index.json is missing"),
    "unknown family": (lambda model: write(model / "model_index.json", '{"_class_name": "Other"}'), "is a Other"),
    "cut transformer": (lambda model: cut(model, "transformer"), "transformer"),
    "cut autoencoder": (lambda model: cut(model, "vae"), "vae"),
    "other autoencoder": (lambda model: other(model, "vae"), "of another network"),
    "other text encoder": (lambda model: other(model, "text_encoder"), "of another network"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_model_is_told_before_scenes_are_drawn(
    run: Run, scenes_recipe: Path, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    spoil, said = MODELS[name]
    model = Path(shutil.copytree(tiny_model, tmp_path / "spoilt"))
    spoil(model)
    refused(run("train", scenes_recipe, f"model={model}"), said)
    assert not (tmp_path / "run").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.size=50"], ("50", "multiples")),
        (["data.buckets=true"], ("square pictures", "buckets")),
        (["batch=1"], ("batch 1 is too small", "path objective", "path_rows=all")),
        (["objective.share=0.9"], ("batch 4 is too small", "0.9", "path objective")),
        (["data.count=3"], ("batch 4 is more than the 3 records of scenes", "set batch to 3")),
        (["teacher=nosuch"], ("'nosuch' not found",)),
        (["tuning.kind=lora", "tuning.text_encoder=true"], ("needs tuning.kind=full",)),
    ],
    ids=lambda value: value[-1],
)
def test_a_recipe_that_cannot_be_is_told_before_scenes_are_drawn(
    run: Run, scenes_recipe: Path, tmp_path: Path, overrides: list[str], words: tuple[str, ...]
) -> None:
    refused(run("train", scenes_recipe, *overrides), *words)
    assert not (tmp_path / "run").exists() and not (tmp_path / "runs").exists()


def test_a_batch_that_the_data_do_not_fill_is_refused(
    run: Run, recipe_file: Path, scene_folder: Path, tmp_path: Path
) -> None:
    said = ("batch 49 is more than the 48 records", str(scene_folder), "set batch to 48 or less")
    refused(run("train", recipe_file, "batch=49"), *said)
    assert not (tmp_path / "run").exists()
    assert run("train", recipe_file, "batch=48", "micro_batch=8", "steps=1")[0] == 0
    cache = tmp_path / "run" / "cache"
    again = (f"data.source={cache}", f"output={tmp_path / 'again'}")
    refused(run("train", recipe_file, "batch=49", *again), "batch 49 is more than the 48 records", str(cache))


def test_records_that_are_skipped_fill_no_batch(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", '"a star"\n"a ring"\n"a heart"\n{"tag": 1}\n')
    options = (f"data.source={prompts}", "data.skip_limit=0.5", "objective.path_weight=0")
    refused(run("train", recipe_file, *options), "batch 4 is more than the 3 records", "prompts.jsonl")
