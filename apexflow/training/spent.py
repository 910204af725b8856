"""What a run has cost: rows, time, hours of its devices, memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from typing import Any

import torch

from apexflow.reporting.markup import duration
from apexflow.training.distributed import world
from apexflow.training.run import Run

GIB = 2**30


def forget_peak(device: torch.device) -> None:
    """Let `peak_gib` begin anew, where it can: what prepared the run, such as a text encoder, is no part of training."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """The most that this process has held, in GiB: of tensors on a GPU, of everything on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def spend(run: Run, seconds: float, peak: float) -> None:
    """Note that a run has gone on until `seconds` by its clock, and the most GiB that a process of now has held."""
    run.device_seconds += (seconds - run.seconds) * world()
    run.seconds, run.peak_gib = seconds, max(run.peak_gib, peak)


def spent(state: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """What a run has cost when it had this `state` (see `run.state_of`), added up over all times that it was resumed.

    rows: pictures or prompts, each counted as often as it was seen; seconds: by the clock, previews and checkpoints included;
    device_hours: of all processes together; peak_gib: the most that one process held; processes: those of the end.
    """
    return {
        "steps": state["step"],
        "rows": state["step"] * batch,
        "seconds": round(state["seconds"]),
        "device_hours": round(state["device_seconds"] / 3600, 4),
        "peak_gib": round(state["peak_gib"], 3),
        "processes": state["world"],
    }


def spent_line(told: Mapping[str, Any]) -> str:
    """The same in words, with the device."""
    return (
        f"{told['steps']:,} steps, {told['rows']:,} rows, {duration(told['seconds'])} on {told['processes']} x {told['device']}, "
        f"{told['peak_gib']:.1f} GiB at most"
    )
