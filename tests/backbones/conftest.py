"""Each tiny pipeline is loaded once a session through our own loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from apexflow.backbones import Backbone, load_backbone


@pytest.fixture(scope="session")
def backbone_of(folder_of: Callable[[str], Path]) -> Callable[[str], Backbone]:
    """A family's backbone. Shared: tests that change one load their own."""
    loaded: dict[str, Backbone] = {}

    def backbone(name: str) -> Backbone:
        if name not in loaded:
            loaded[name] = load_backbone(str(folder_of(name)))
        return loaded[name]

    return backbone
