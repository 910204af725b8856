"""What the headers of a network's files say of its weights: names, shapes, types. No weights are read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from safetensors import safe_open

from apexflow.backbones.folder import is_there, weight_paths
from apexflow.errors import UserError, first_line, no_path

READERS = "diffusers or transformers"
T = TypeVar("T")


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a part, from the headers of its files, each of which has the size that it names.

    UserError for a damaged file, one that an index names and is missing, or where there is none.
    """
    files = weight_paths(path)
    if not files:
        others = [file.name for file in sorted(path.glob("*.safetensors"))]
        but = f": {others[0]} is named differently" if others else ""
        raise UserError(
            f"{path.parent} is incomplete: {path.name}/ holds no safetensors file that {READERS} would load{but}"
        )
    for file in files:
        if not is_there(file):
            raise UserError(f"{path.parent} is incomplete: {path.name}/{file.name} is missing")
    return {name: shape for file in files for name, shape in guarded(file, partial(_header, file)).items()}


def stored_dtypes(path: Path) -> set[str]:
    """In which types the weights of a part are stored, in the names of safetensors ("F32", "BF16")."""
    return {kind for file in weight_paths(path) for kind in guarded(file, partial(_types, file))}


def weight_files(path: Path) -> dict[str, Path]:
    """Which file holds each tensor of a network."""
    found = {}
    for file in weight_paths(path):
        with safe_open(file, "pt") as opened:
            found.update(dict.fromkeys(opened.keys(), file))
    return found


def _types(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 no mapping


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    # Opened here first: safetensors says of a file that we may not read that it is not there.
    with file.open("rb"), safe_open(file, "pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 no mapping


def guarded(path: Path, read: Callable[[], T]) -> T:
    """What `read` answers; UserError that names `path` for whatever it raises."""
    try:
        return read()
    except Exception as error:  # libraries raise many kinds for a damaged file; all mean the same to the user
        reason = first_line(error)[:160]
        mend = "apexflow runs none" if "custom code" in reason else "restore it from the original checkpoint"
        raise UserError(no_path(error) or f"cannot read {path}: {reason}; {mend}") from error
