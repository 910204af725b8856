"""Files of a cache or a drawn set: written whole or not at all, by processes that may work side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from apexflow.files import SUFFIX, make_folder, replacing, write_text

GOES_ON = "free some space and run the same command to resume"
Fields = Mapping[str, type | tuple[type, ...]]


def others_in(folder: Path, claim: Path) -> list[Path]:
    """What a folder, which is made where it is not there, holds beside a claim and what processes at work have half written."""
    make_folder(folder)
    return [path for path in folder.iterdir() if path != claim and path.suffix not in (SUFFIX, ".lock")]


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write safetensors whole or not at all; UserError when the disk is full."""
    with replacing(path, GOES_ON) as partial:
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial)


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write JSON whole or not at all; UserError when the disk is full."""
    write_text(path, json.dumps(content), GOES_ON)


def read_record(path: Path, fields: Fields) -> dict[str, Any]:
    """A JSON object that has these fields of these types; ValueError says what is amiss, OSError that it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    for name, kind in fields.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"lacks {name}")
    return content
