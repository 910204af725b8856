"""Files of a cache or a drawn set: written whole or not at all, by processes that may work side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from apexflow.errors import UserError

Fields = Mapping[str, type | tuple[type, ...]]


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write safetensors whole or not at all; UserError when the disk is full."""
    _write(path, lambda partial: save_file({name: t.contiguous() for name, t in tensors.items()}, partial))


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write JSON whole or not at all; UserError when the disk is full."""
    _write(path, lambda partial: partial.write_text(json.dumps(content)))


def read_record(path: Path, fields: Fields) -> dict[str, Any]:
    """A JSON object that has these fields of these types; ValueError says what is amiss, OSError that it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    for name, kind in fields.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"lacks {name}")
    return content


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except Exception as error:  # safetensors wraps a full disk in an error of its own
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}): free some space; the same command then goes on") from error
