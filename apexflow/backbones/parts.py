"""Reading the parts of a diffusers folder, with errors that name the part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from apexflow.errors import UserError


def load_part(folder: Path, part: str, kind: Any, dtype: torch.dtype | None = None) -> Any:
    """`kind.from_pretrained` on one sub-folder, local files and safetensors only; UserError when it cannot be read."""
    path = folder / part
    if not path.is_dir():
        raise UserError(f"{folder} is incomplete: the folder {part}/ is missing")
    if dtype is None:
        return _guarded(path, lambda: kind.from_pretrained(path, local_files_only=True))
    model = _guarded(path, lambda: kind.from_pretrained(path, local_files_only=True, use_safetensors=True))
    return model.to(dtype).eval().requires_grad_(False)


def load_scheduler(folder: Path) -> Any:
    """The scheduler that the folder names, for its time shift and for saving it back."""
    import diffusers

    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise UserError(f"{folder} is incomplete: scheduler/scheduler_config.json is missing")
    name = json.loads(path.read_text()).get("_class_name", "")
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise UserError(f"{path} names the scheduler {name!r}, which diffusers does not have")
    return _guarded(path, lambda: kind.from_pretrained(path.parent, local_files_only=True))


def _guarded(path: Path, read: Any) -> Any:
    try:
        return read()
    except Exception as error:  # libraries raise many kinds for a damaged file; all mean the same to the user
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot read {path}: {reason}; restore it from the original checkpoint") from error
