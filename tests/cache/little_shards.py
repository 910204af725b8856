"""Caches of few records a shard."""

from __future__ import annotations

from pathlib import Path

from apexflow.backbones import load_backbone
from apexflow.data.cache import CachedSet
from apexflow.data.caching import CacheSettings, make_cache

WINDOW = 8  # records a shard in these tests: 48 scenes make six


def cached(source: Path, model: Path, folder: Path, **settings: object) -> CachedSet:
    assert make_cache(source, load_backbone(str(model)), model, folder, CacheSettings(**settings))  # type: ignore[arg-type]
    return CachedSet(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
