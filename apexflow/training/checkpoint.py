"""Checkpoints: folders of safetensors that appear whole or not at all, and are checked before they are trusted.

torch.distributed.checkpoint writes and reads them: every process writes a share, sharded tensors as they lie, and a run of
another number of processes reads just what it needs. Its safetensors format needs none of the pickled metadata of its own.
What processes tell each other goes over gloo: over NCCL, who is done early would be given up after ten minutes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from apexflow.data.files import Fields, read_record
from apexflow.errors import UserError, first_line, no_path
from apexflow.training.distributed import control_group, leads, together, world

NAME = "step-{:07d}"
# The numbers of a run that count on from where they were, with their types.
COUNTERS: Fields = {"step": int, "bad": int, **dict.fromkeys(("seconds", "device_seconds", "peak_gib"), (int, float))}
STATE: Fields = {"sizes": dict, "world": int, "recipe": dict, **COUNTERS}
FAILURES = (OSError, ValueError, KeyError, SafetensorError, CheckpointException)


@dataclass
class Checkpoint:
    """Tensors by part ("trained", "average", "optimizer", "memory") and name, and `state` (step, counters) as plain JSON."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int | None) -> Path:
    """Write `folder/step-N`, then delete all up to it but the last `keep` (None: none). On a full disk the older ones survive.

    All processes take part, each with its own tensors.
    """
    final = folder / NAME.format(checkpoint.state["step"])
    partial = folder / f".partial-{final.name}"
    with _saving(final, partial):
        if leads():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with _saving(final, partial):
        tensors = {f"{part}/{name}": t for part, named in checkpoint.tensors.items() for name, t in named.items()}
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        shares = {name: t.detach() for name, t in tensors.items()}
        dcp.save(shares, storage_writer=writer, process_group=control_group(), no_dist=world() == 1)
    with _saving(final, partial):
        if leads():
            sizes = {p.name: p.stat().st_size for p in partial.iterdir()}
            (partial / "state.json").write_text(json.dumps(checkpoint.state | {"sizes": sizes}))
            shutil.rmtree(final, ignore_errors=True)  # what a deletion left that was cut off: no step is saved twice
            os.replace(partial, final)
            found = checkpoints(folder)
            for old in found[: found.index(final) + 1][:-keep] if keep else []:
                shutil.rmtree(old)
    return final


@contextmanager
def _saving(final: Path, partial: Path) -> Iterator[None]:
    with together(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch notes that one process saves alone
        try:
            yield
        except FAILURES as error:
            if leads():
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"cannot save {final} ({_reason(error)}): free some space; earlier checkpoints are untouched, "
                "resume from them"
            ) from error


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first. What has another name than a run gives, such as a user's copy, is none."""
    named = [(int(p.name[5:]), p) for p in folder.glob("step-*") if re.fullmatch(r"step-[0-9]+", p.name)]
    return [p for step, p in sorted(named) if p.name == NAME.format(step) and (p / "state.json").is_file()]


def read_state(path: Path, name: str | None = None) -> dict[str, Any]:
    """A checkpoint's `state`; UserError if it says what no run does, it is not that of the folder's `name` (None: a copy, which
    may have any), or a file is missing or truncated.
    """
    with _reading(path):
        state = read_record(path / "state.json", STATE)
        _check_state(state, name)
        for file, size in state.pop("sizes").items():
            # Opened here first: safetensors says of a file that we may not read that it is not there.
            with (path / file).open("rb") as opened:
                if os.fstat(opened.fileno()).st_size != size:
                    raise OSError(f"{file} has a different size than when it was saved")
        return state


def _check_state(state: Mapping[str, Any], name: str | None) -> None:
    """ValueError for numbers that no run writes, or those of a checkpoint that had another `name`, where one is given."""
    for key, least in {"world": 1, **dict.fromkeys(COUNTERS, 0)}.items():
        # JSON may hold true, which Python counts as 1, and NaN and Infinity.
        if isinstance(state[key], bool) or not least <= state[key] < 2**63:
            raise ValueError(f"{key} is {state[key]}")
    if name not in (None, NAME.format(state["step"])):
        raise ValueError(f"it was saved at step {state['step']}")
    if not state["sizes"]:
        raise ValueError("sizes is empty")


def read_shapes(path: Path) -> dict[str, Tensor]:
    """What a checkpoint holds by "part/name": tensors of the right shape and dtype on the meta device."""
    with _reading(path):
        found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        return {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")  # type: ignore[union-attr]
            for name, entry in found.items()
        }


def read_into(path: Path, targets: Mapping[str, Tensor], alone: bool = False) -> None:
    """Fill tensors by "part/name" in place, sharded ones with their shard. All processes take part, unless `alone`."""
    with _reading(path):
        wanted = {name: t.detach() for name, t in targets.items()}
        reader, single = HuggingFaceStorageReader(str(path)), alone or world() == 1
        dcp.load(wanted, storage_reader=reader, process_group=control_group(), no_dist=single)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a whole checkpoint onto the CPU; UserError if a file is missing, truncated or foreign."""
    state = read_state(path, path.name)
    tensors = {name: torch.empty_like(t, device="cpu") for name, t in read_shapes(path).items()}
    read_into(path, tensors, alone=True)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in ("trained", "average", "optimizer", "memory")}
    for full, tensor in tensors.items():
        part, name = full.split("/", 1)
        parts[part][name] = tensor
    return Checkpoint(parts, state)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except FAILURES as error:
            raise UserError(
                no_path(error)
                or f"checkpoint {path} is damaged ({_reason(error)}): delete it to resume from the one before"
            ) from error


def _reason(error: BaseException) -> str:
    """The first line of what went wrong; of a process's own error, where torch wraps it."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return first_line(error)


def check_fit(targets: Mapping[str, Tensor], found: Mapping[str, Tensor], part: str, what: str) -> None:
    """UserError unless a part's names and shapes agree exactly with `targets`."""
    here = {f"{part}/{name}": t for name, t in targets.items()}
    saved = {name: t for name, t in found.items() if name.startswith(f"{part}/")}
    if missing := sorted(set(here) ^ set(saved)):
        raise UserError(f"{what} belongs to another model: only one has {missing[0]} ({len(missing)} such tensors)")
    for name, tensor in saved.items():
        if here[name].shape != tensor.shape:
            raise UserError(
                f"{what}: {name} has shape {tuple(tensor.shape)}, this model needs {tuple(here[name].shape)}"
            )
