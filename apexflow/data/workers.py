"""Which share of a job is this process's under torchrun. The shares need no communication: each writes files of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from apexflow.locking import alone_in
from apexflow.progress import Progress, console
from apexflow.torchrun import rank_and_world

Thing = TypeVar("Thing")
WAIT = 1.0  # seconds between looks at what the other processes have made


@dataclass(frozen=True)
class Share:
    """Which share of a job this process takes. The processes share a disk and need not speak to each other.

    together: torchrun started them all and stops all when one fails, so the first may wait for the others.
    """

    rank: int = 0
    world: int = 1
    together: bool = False

    @classmethod
    def from_environment(cls) -> Share:
        """What torchrun says (RANK, WORLD_SIZE), or everything."""
        return cls(*rank_and_world(), "TORCHELASTIC_RUN_ID" in os.environ)

    @property
    def leads(self) -> bool:
        """Whether this process sums up and speaks to the user. Processes started one by one each speak for themselves."""
        return self.rank == 0 or not self.together

    def alone_in(self, folder: Path) -> AbstractContextManager[None]:
        """Within, no other command does this share of the work in `folder`; UserError where one does."""
        return alone_in(folder, f"{self.rank or ''}")

    def wait_for(self, title: str, things: Sequence[Thing], is_there: Callable[[Thing], bool]) -> None:
        """Until everything is there, made by the processes beside this one; only the first of torchrun's waits."""
        if not (self.together and self.leads):
            return
        left = [thing for thing in things if not is_there(thing)]
        with Progress(title, len(things), len(things) - len(left)) as progress:
            while left:
                time.sleep(WAIT)
                before, left = len(left), [thing for thing in left if not is_there(thing)]
                progress.advance(before - len(left))


def own_share() -> Share:
    """This process's share under torchrun; its progress is shown where it speaks to the user."""
    share = Share.from_environment()
    console.quiet = not share.leads
    return share
