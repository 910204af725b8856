"""Which share of a job is this process's under torchrun. The shares need no communication: each writes files of its own."""

from __future__ import annotations

import os

import torch

from apexflow.errors import UserError
from apexflow.generator import pick_device


def worker() -> tuple[int, int]:
    """(rank, how many) as torchrun sets them; (0, 1) without it."""
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise UserError(f"RANK and WORLD_SIZE must be whole numbers, as torchrun sets them ({error})") from error
    if not 0 <= rank < world:
        raise UserError(f"RANK {rank} does not lie below WORLD_SIZE {world}")
    return rank, world


def worker_device(name: str) -> torch.device:
    """The device that a name means for this process: its own GPU of several."""
    kind = pick_device(name)
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)
