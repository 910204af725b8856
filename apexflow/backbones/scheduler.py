"""The scheduler of a diffusers folder: read, and the time shift that it asks for."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apexflow.backbones.folder import read_object
from apexflow.backbones.weights import guarded
from apexflow.errors import UserError

SCHEDULER = "scheduler"  # its folder
MOST_SHIFT = 1e6  # beyond, the times of a grid are the same number
OUR_SCHEDULER = ("apexflow.export.scheduler", "AnyStepScheduler")


def load_scheduler(folder: Path) -> Any:
    """The scheduler that the folder names, for its time shift and for saving it back."""
    import diffusers

    path = folder / SCHEDULER / "scheduler_config.json"
    if not path.is_file():
        raise UserError(f"{folder} is incomplete: scheduler/scheduler_config.json is missing")
    name = read_object(path).get("_class_name", "")
    # Exported models may name our own scheduler, which lies in a layer above this one.
    home = importlib.import_module(OUR_SCHEDULER[0]) if name == OUR_SCHEDULER[1] else diffusers
    kind = getattr(home, str(name), None)
    # Another class of diffusers would be read from this folder too, its weights from a pickle if it found one.
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise UserError(f"{path} names the scheduler {name!r}, which diffusers does not have: restore the original")
    return guarded(path, lambda: kind.from_pretrained(path.parent, local_files_only=True))


def scheduler_shift(config: Mapping[str, Any], tokens: int) -> float:
    """s of `t' = s t / (1 + (s - 1) t)` that a flow scheduler's config asks for, with `tokens` a picture.

    UserError for one that no grid can be shifted by.
    """
    told, mend = f"{SCHEDULER}/scheduler_config.json of the model asks for a time shift", "restore the original file"
    try:
        shift = _asked_shift(config, tokens)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{told} that cannot be computed ({error}): {mend}") from error
    if not 1 / MOST_SHIFT <= shift <= MOST_SHIFT:
        raise UserError(f"{told} of {shift:g} for a picture of {tokens} tokens: {mend}, or use a size nearer its own")
    return shift


def _asked_shift(config: Mapping[str, Any], tokens: int) -> float:
    if not config.get("use_dynamic_shifting"):
        given = (config.get(name) for name in ("flow_shift", "shift"))
        return float(next((value for value in given if value is not None), 1.0))
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - few) / (many - few)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else float(mu)
