"""Shared fixtures: a miniature small enough to train in a second, and scenes on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
# The tests are the same on every machine; those that need a GPU are asked for by benchmarks/on_gpu.sh.
if "APEXFLOW_TESTS_ON_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Tests share the cores as processes (pytest-xdist), and a process that a test starts must sum in the same order as its own.
os.environ["OMP_NUM_THREADS"] = "1"

from command_line import Run

from apexflow import cli
from apexflow.backbones.miniature import build_miniature
from apexflow.backbones.parts import Later, quiet
from apexflow.data.scenes import scenes, vocabulary
from apexflow.data.shards import write_scenes


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def hears_ctrl_c() -> None:
    """A shell starts what runs in its background deaf to Ctrl-C, and the tests too may be started so."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SANA folder with random weights, 1 layer of width 32."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    folder.mkdir()
    backbone = build_miniature(vocabulary(), seed=0, width=32, depth=1)
    backbone.save(folder, backbone.settings)
    return folder


@pytest.fixture(scope="session")
def any_aspect(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model without its square position embedding, as SANA's large ones are."""
    model = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("aspect") / "model"))
    config = model / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"interpolation_scale": None}))
    return model


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's stock pipeline: those of tests/backbones/tiny.py, each built and saved once a session."""
    import tiny

    home, made = tmp_path_factory.mktemp("tiny"), set()
    quiet()

    def folder(name: str) -> Path:
        if name not in made:
            tiny.build(name).save_pretrained(home / name)
            if name in tiny.MAX_TOKENS:
                (home / name / "apexflow.json").write_text(json.dumps({"max_tokens": tiny.MAX_TOKENS[name]}))
            made.add(name)
        return home / name

    return folder


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 scenes in two webdataset shards."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(scenes(48, seed=3), folder, per_shard=24)
    return folder


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_model: Path, scene_folder: Path) -> Path:
    """A recipe that trains the tiny model for a few steps."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"output: {tmp_path / 'run'}\nmodel: {tiny_model}\ndata: {{source: {scene_folder}}}\n"
        "steps: 6\nbatch: 4\ncheckpoint_every: 2\npreview: {every: 3, count: 2}\noptimizer: {warmup: 2}\n"
    )
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the parts that were read, in order."""
    found: list[str] = []
    read = Later.read

    def note(later: Later) -> object:
        found.append(later.path.name)
        return read(later)

    monkeypatch.setattr(Later, "read", note)
    return found


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`apexflow` with these arguments."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["apexflow", *map(str, arguments)])
        code: int | str | None = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return int(code or 0), captured.out, captured.err

    return call
