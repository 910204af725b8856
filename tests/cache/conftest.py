"""A finished cache of six shards."""

from __future__ import annotations

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
