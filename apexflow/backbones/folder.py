"""What of a diffusers folder is read: the parts that its index names, and of each the weights that the libraries would take.

Hub repositories hold more beside it: single-file checkpoints, twins in another precision, other programs' copies.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from apexflow.errors import UserError, in_a_shell, no_path

INDEX = "model_index.json"
RECIPE, CHECKPOINTS = "recipe.json", "checkpoints"  # in the folder of a run
OWN = ("apexflow.json", "second_time.safetensors")  # what apexflow itself writes beside the index
PICKLES = (".bin", ".pt", ".ckpt", ".pth")
PLAIN = re.compile(r"\w[\w.-]*")  # a name in a folder: neither a path that leads out of it nor a pattern for the hub
NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # of diffusers, of transformers


def is_run(folder: Path) -> bool:
    """Whether a folder is what `apexflow train` wrote. A model is none, whatever else its folder holds."""
    return (folder / RECIPE).is_file() and not (folder / INDEX).is_file()


def model_of(folder: Path) -> Path:
    """The model that a folder stands for: of a finished run the one in it, else the folder itself."""
    made = folder / "model"
    return made if is_run(folder) and (made / INDEX).is_file() else folder


def read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json`: the pipeline class, its parts and its own settings.

    UserError for one that is damaged, or names a part by what is no plain name of a sub-folder.
    """
    index = read_object(folder / INDEX)
    for name in index:
        if not PLAIN.fullmatch(name):
            raise UserError(f"{folder / INDEX} names a part {name!r}, which is not a plain name: restore the original")
    return index


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """`model_index.json`."""
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def with_lora(file: Path | str) -> str:
    """What can be done with a LoRA's file that was given as a model."""
    name = in_a_shell(file)
    return (
        f"generate and evaluate use it with `--model MODEL --lora {name}`, and `apexflow export {name} --base MODEL --merge "
        "-o FOLDER` merges it into its base model"
    )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint; UserError for what is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        damaged = f"cannot read {path}: it is not valid JSON; restore it from the original checkpoint"
        raise UserError(no_path(error) or damaged) from error
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: it is not a JSON object; restore it from the original checkpoint")
    return content


def components(folder: Path) -> list[str]:
    """The sub-folders that the index names with a class, in its order: all that a pipeline is made of."""
    entries = read_index(folder).items()
    return [name for name, entry in entries if isinstance(entry, list) and len(entry) == 2 and all(entry)]


def weight_paths(part: Path) -> list[Path]:
    """The files of safetensors that are read of a part: the one, or those that its index names. [] where there is none."""
    for name in NAMES:
        index = part / f"{name}.index.json"
        if is_there(index):
            return [part / file for file in _shards(index)]
        if is_there(part / name):
            return [part / name]
    return []


def _shards(index: Path) -> list[str]:
    """The files that an index of weights names, sorted; UserError for what is no plain name of a file of safetensors."""
    named = read_object(index).get("weight_map")
    files: list[Any] = list(named.values()) if isinstance(named, dict) else [named]
    for file in files:
        if not (isinstance(file, str) and PLAIN.fullmatch(file) and file.endswith(".safetensors")):
            raise UserError(f"{index} names the file {file!r}, not a plain safetensors name: restore the original")
    return sorted(set(files))


def is_there(file: Path) -> bool:
    """Whether a file is there; UserError where a folder has its name, or a link that leads nowhere."""
    if file.is_dir():
        raise UserError(f"{file} is a folder, where a file should be: restore it from the original checkpoint")
    if file.is_symlink() and not file.exists():
        raise UserError(f"{file} is a broken link: restore its target, or copy the file there")
    return file.is_file()


def copy_part(part: Path, to: Path, copy: Callable[[str, str], object] = shutil.copy2) -> None:
    """Copy a sub-folder with the weights that are read of it, and no others, file by file with `copy`."""
    read = {path.name for path in weight_paths(part)}

    def left_out(_: str, names: list[str]) -> list[str]:
        twins = {name for name in names if name.endswith(".safetensors")} - read
        return [name for name in names if name in twins or name.startswith(".") or Path(name).suffix in PICKLES]

    shutil.copytree(part, to, ignore=left_out, copy_function=copy)


def refuse_pickles(folder: Path, read: Iterable[str]) -> None:
    """UserError if a part that is `read`, or that the index names, has weights in a pickle format and none in safetensors."""
    for part in (folder / name for name in dict.fromkeys([*read, *components(folder)])):
        pickles = sorted(p for p in part.glob("*") if p.suffix in PICKLES)
        if pickles and not list(part.glob("*.safetensors")):
            raise UserError(f"{pickles[0]} is a pickle, which can run code: convert it to safetensors first")
