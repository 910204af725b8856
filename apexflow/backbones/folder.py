"""What of a diffusers folder is read: the parts that its index names, and of each the weights that the libraries would take.

Hub repositories hold more beside it: single-file checkpoints, twins in another precision, other programs' copies.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from apexflow.errors import UserError

INDEX = "model_index.json"
OWN = ("apexflow.json", "second_time.safetensors")  # what apexflow itself writes beside the index
PICKLES = (".bin", ".pt", ".ckpt", ".pth")
NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # of diffusers, of transformers


def read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json`: the pipeline class, its parts and its own settings. UserError for one that is damaged."""
    try:
        return dict(json.loads((folder / INDEX).read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / INDEX} is not valid JSON: restore it from the original checkpoint") from error


def components(folder: Path) -> list[str]:
    """The sub-folders that the index names with a class, in its order: all that a pipeline is made of."""
    entries = read_index(folder).items()
    return [name for name, entry in entries if isinstance(entry, list) and len(entry) == 2 and all(entry)]


def weight_paths(part: Path) -> list[Path]:
    """The files of safetensors that are read of a part: the one, or those that its index names. [] where there is none."""
    for name in NAMES:
        index = part / f"{name}.index.json"
        if index.is_file():
            try:
                named = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, LookupError, AttributeError, TypeError) as error:
                raise UserError(f"cannot read {index} ({error}): restore it from the original checkpoint") from error
            return [part / file for file in sorted(named)]
        if (part / name).is_file():
            return [part / name]
    return []


def copy_part(part: Path, to: Path) -> None:
    """Copy a sub-folder with the weights that are read of it, and no others."""
    read = {path.name for path in weight_paths(part)}

    def left_out(_: str, names: list[str]) -> list[str]:
        twins = {name for name in names if name.endswith(".safetensors")} - read
        return [name for name in names if name in twins or name.startswith(".") or Path(name).suffix in PICKLES]

    shutil.copytree(part, to, ignore=left_out)


def refuse_pickles(folder: Path) -> None:
    """UserError if a part of the folder has weights in a pickle format and none in safetensors."""
    for part in (folder / name for name in components(folder)):
        pickles = sorted(p for p in part.glob("*") if p.suffix in PICKLES)
        if pickles and not list(part.glob("*.safetensors")):
            raise UserError(f"{pickles[0]} is a pickle, which can run code: convert it to safetensors first")
