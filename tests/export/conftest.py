"""The tiny pipelines of tests/backbones, each built and saved once a session."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from apexflow.backbones.parts import quiet

sys.path.insert(0, str(Path(__file__).parent.parent / "backbones"))


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
    import tiny

    home, made = tmp_path_factory.mktemp("tiny"), set()
    quiet()

    def folder(name: str) -> Path:
        if name not in made:
            tiny.build(name).save_pretrained(home / name)
            made.add(name)
        return home / name

    return folder
