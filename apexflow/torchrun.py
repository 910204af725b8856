"""What torchrun tells a process in its environment, and which of its processes talks to the user."""

from __future__ import annotations

import os
from datetime import timedelta

from apexflow.errors import UserError


def rank_and_world() -> tuple[int, int]:
    """Which of how many processes this is; the only one where nothing is said. UserError for what torchrun never sets."""
    rank, world = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if not 0 <= rank < world:
        raise UserError(f"RANK {rank} does not lie below WORLD_SIZE {world}")
    return rank, world


def local_rank() -> int:
    """The number of this process among those on its machine."""
    return _number("LOCAL_RANK", 0)


def _number(variable: str, otherwise: int) -> int:
    try:
        return int(os.environ.get(variable, otherwise))
    except ValueError as error:
        raise UserError(f"{variable} must be a whole number, as torchrun sets it ({error})") from error


def speaks() -> bool:
    """Whether this is the process that talks to the user: of those that torchrun started, the first."""
    return _trusted()[0] == 0


def tells() -> bool:
    """Whether this process tells of its mistake: of those that torchrun started, the first that asks, whatever its rank.

    torchrun's own store counts them. It stops all processes once one has left, so none waits for another.
    """
    place = os.environ
    if _trusted()[1] == 1 or place.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import DistError, TCPStore

    try:
        store = TCPStore(place["MASTER_ADDR"], int(place["MASTER_PORT"]), timeout=timedelta(seconds=10))
        return store.add(f"apexflow/mistakes/{place.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except (DistError, KeyError, ValueError):
        return True  # told twice is better than never


def _trusted() -> tuple[int, int]:
    """`rank_and_world`, the only process where that is a mistake: so it is told."""
    try:
        return rank_and_world()
    except UserError:
        return 0, 1
