"""Prompts alone: a text file with one a line, or JSON lines (a string, or an object with the caption under a usual name)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from apexflow.data.captioned import Loaded, Sample
from apexflow.data.readers import lines_of, text_of


def claim(path: Path) -> list[Path]:
    """A text or JSON lines file that is named itself; in a folder it would be anything."""
    return [path] if path.is_file() and path.suffix.lower() in (".txt", ".jsonl") else []


def samples(home: Path, files: list[Path], broken: dict[str, str]) -> Iterator[Sample]:
    """One record a line; blank lines are none."""
    for path in files:
        as_json = path.suffix.lower() == ".jsonl"
        for number, line in lines_of(path):
            yield Sample(f"{path.name}:{number}", partial(_load, line, as_json), pictured=False)


def _load(line: bytes, as_json: bool) -> Loaded:
    text = text_of(line)
    content = json.loads(text) if as_json else text
    if isinstance(content, str):
        return None, {"txt": content}
    if not isinstance(content, dict):
        raise ValueError("neither text nor a JSON object")
    return None, content
