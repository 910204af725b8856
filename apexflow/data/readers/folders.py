"""Folders of pictures: captions in same-name .txt files, or in one metadata.jsonl as imagefolder has it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from apexflow.data.captioned import Loaded, Sample
from apexflow.data.pictures import PICTURES
from apexflow.data.readers import lines_of, named, read_within, text_of

METADATA = "metadata.jsonl"


def claim_pairs(path: Path) -> list[Path]:
    """The pictures of a folder, and what only has a name like theirs, where any has a caption beside it: else something else
    describes them, or nothing does."""
    pictures = named(path, *PICTURES) if path.is_dir() else []
    return pictures if any(_caption_of(picture) for picture in pictures) else []


def pairs(home: Path, files: list[Path], broken: dict[str, str]) -> Iterator[Sample]:
    """One record a picture."""
    for path in files:
        yield Sample(str(path), partial(_pair, path))


def _pair(picture: Path) -> Loaded:
    text = _caption_of(picture)
    fields = {"txt": text_of(text.read_bytes())} if text else {}
    return picture.read_bytes() if picture.is_file() else None, fields


def _caption_of(picture: Path) -> Path | None:
    """The text file beside a picture, whose suffix some cameras and systems write in capitals."""
    return next((text for suffix in (".txt", ".TXT") if (text := picture.with_suffix(suffix)).is_file()), None)


def claim_metadata(path: Path) -> list[Path]:
    """The metadata.jsonl files of a folder, at its top or in the folders of its splits."""
    found = [*path.glob(METADATA), *path.glob(f"*/{METADATA}")]
    return sorted(file for file in found if file.is_file())


def rows(home: Path, files: list[Path], broken: dict[str, str]) -> Iterator[Sample]:
    """One JSON object a line: `file_name` beside the file, and the caption under any of the usual names."""
    for path in files:
        for number, line in lines_of(path):
            yield Sample(f"{path}:{number}", partial(_row, home, path, line))


def _row(home: Path, path: Path, line: bytes) -> Loaded:
    row = json.loads(text_of(line))
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ValueError("not a JSON object with file_name")
    return read_within(home, path.parent / row["file_name"]), row
