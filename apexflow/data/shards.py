"""Writing webdataset shards, each of which appears whole or not at all. What is written here, `readers/tars.py` reads."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from apexflow.data.scenes import Scene, render
from apexflow.files import make_folder, replacing

Item = TypeVar("Item")
Record = tuple[str, Image.Image, str, Mapping[str, Any]]  # key, picture, caption, what else is known of it


def write_scenes(scenes: Iterable[Scene], folder: Path, per_shard: int = 5000) -> int:
    """Draw scenes into shards; how many there were."""
    make_folder(folder)
    start = 0
    for group in groups(scenes, per_shard):
        records = [(f"{i:07d}", render(s.things), s.caption, s.metadata) for i, s in enumerate(group, start)]
        write_shard(folder / f"scenes-{start:07d}.tar", records)
        start += len(group)
    return start


def groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Runs of `size` consecutive items, the last one shorter."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def write_shard(path: Path, records: Iterable[Record]) -> None:
    """Write one shard (.png, .txt, .json); UserError when the disk is full, and then no shard of that name appears."""
    with (
        replacing(path, "free some space; the shards before it are intact") as partial,
        tarfile.open(partial, "w") as tar,
    ):
        for key, picture, caption, facts in records:
            pixels = io.BytesIO()
            picture.save(pixels, "PNG")
            _add(tar, f"{key}.png", pixels.getvalue())
            _add(tar, f"{key}.txt", caption.encode())
            _add(tar, f"{key}.json", json.dumps(facts).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time or owner: the same pictures give the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
