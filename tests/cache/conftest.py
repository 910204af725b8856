"""A finished cache of six shards, and a model that takes any aspect ratio."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from little_shards import WINDOW, cached

from apexflow.data import caching


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "WINDOW", WINDOW)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, scene_folder: Path, tiny_model: Path) -> Path:
    """48 scenes cached in one go, in six shards."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "WINDOW", WINDOW)
        cached(scene_folder, tiny_model, folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture(scope="session")
def any_aspect(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model without its square position embedding, as SANA's large ones are."""
    model = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("aspect") / "model"))
    config = model / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"interpolation_scale": None}))
    return model
