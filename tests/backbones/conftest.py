"""Each tiny pipeline is built and saved once a session, and loaded once through our own loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch

from apexflow.backbones import Backbone, load_backbone
from apexflow.backbones.parts import quiet


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are so small that threads spend their time waiting for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's stock pipeline."""
    home, made = tmp_path_factory.mktemp("tiny"), set()
    quiet()

    def folder(name: str) -> Path:
        if name not in made:
            tiny.build(name).save_pretrained(home / name)
            made.add(name)
        return home / name

    return folder


@pytest.fixture(scope="session")
def backbone_of(folder_of: Callable[[str], Path]) -> Callable[[str], Backbone]:
    """A family's backbone. Shared: tests that change one load their own."""
    loaded: dict[str, Backbone] = {}

    def backbone(name: str) -> Backbone:
        if name not in loaded:
            loaded[name] = load_backbone(str(folder_of(name)))
        return loaded[name]

    return backbone
