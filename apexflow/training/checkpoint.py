"""Checkpoints: folders of safetensors that appear whole or not at all, and are checked before they are trusted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from apexflow.errors import UserError

PARTS = ("trained", "average", "optimizer", "memory")


@dataclass
class Checkpoint:
    """Tensors by part and name, and `state` (step, recipe, counters) as plain JSON."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/step-N`, then delete all but the last `keep`. On a full disk the older checkpoints survive."""
    final = folder / f"step-{checkpoint.state['step']:07d}"
    partial = folder / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        sizes = {}
        for part in PARTS:
            tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.get(part, {}).items()}
            save_file(tensors, partial / f"{part}.safetensors")
            sizes[part] = (partial / f"{part}.safetensors").stat().st_size
        (partial / "state.json").write_text(json.dumps(checkpoint.state | {"sizes": sizes}))
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"cannot save {final} ({error}): free some space; earlier checkpoints are untouched, resume from them"
        ) from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; UserError if a file is missing, truncated or foreign."""
    try:
        state = json.loads((path / "state.json").read_text())
        sizes = state.pop("sizes")
        tensors = {}
        for part in PARTS:
            file = path / f"{part}.safetensors"
            if file.stat().st_size != sizes[part]:
                raise OSError(f"{file.name} is truncated")
            tensors[part] = load_file(file)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"checkpoint {path} is damaged ({error}): delete it to resume from the one before") from error
    return Checkpoint(tensors, state)


def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors by name; UserError unless names and shapes agree exactly."""
    if missing := sorted(set(target) ^ set(source)):
        raise UserError(f"{what} belongs to another model: {missing[0]} is not in both ({len(missing)} such tensors)")
    for name, tensor in source.items():
        if target[name].shape != tensor.shape:
            raise UserError(
                f"{what}: {name} has shape {tuple(tensor.shape)}, this model needs {tuple(target[name].shape)}"
            )
        target[name].data.copy_(tensor)


def optimizer_tensors(optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Optimizer state under `parameter name/state name`."""
    found = {}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = value
    return found


def restore_optimizer(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`."""
    for full, value in tensors.items():
        name, key = full.rsplit("/", 1)
        if name not in trained:
            raise UserError(f"optimizer state belongs to another model: {name} is not trained here")
        parameter = trained[name]
        optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
