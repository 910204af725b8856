"""Files of a cache or a drawn set: written whole or not at all, by processes that may work side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from apexflow.errors import UserError


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write safetensors whole or not at all; UserError when the disk is full."""
    _write(path, lambda partial: save_file({name: t.contiguous() for name, t in tensors.items()}, partial))


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write JSON whole or not at all; UserError when the disk is full."""
    _write(path, lambda partial: partial.write_text(json.dumps(content)))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except Exception as error:  # safetensors wraps a full disk in an error of its own
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}): free some space; the same command then goes on") from error
