"""One command at a time in an output folder: the operating system's lock, which ends with its process, even a killed one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from apexflow.errors import UserError
from apexflow.progress import console

TRIES = 1000  # while other processes take their files and folders away


@contextmanager
def alone_in(folder: Path, part: str = "", wait: bool = False) -> Iterator[None]:
    """Within, no other command works in `folder`, or in one `part` of its work. The folder need not be there.

    Raises UserError at once where another does, or waits for it. The lock is a file beside the folder, which is gone afterwards;
    where none can be made (a place that is read only, a disk without locks), nothing is held.
    """
    whole = folder.resolve()
    path = whole.parent / f".{whole.name}{part and '-' + part}.lock"
    made = [place for place in path.parents if not place.exists()]
    try:
        file = _take(path)
    except BlockingIOError:
        if not wait:
            raise UserError(
                f"another apexflow command is using {folder}: wait until it ends, or choose another folder"
            ) from None
        console.print(f"waiting for another apexflow command that is using {folder}")
        file = _take(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)
            file.close()
        with suppress(OSError):  # what a command that was refused leaves empty
            for place in made:
                place.rmdir()


def made_once(path: Path, is_there: Callable[[], bool], make: Callable[[], object]) -> None:
    """`make` a file unless it is there. Of several processes that come to it one makes it, and the others wait."""
    if not is_there():
        with alone_in(path, wait=True):
            if not is_there():
                make()


def _take(path: Path, how: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> TextIO | None:
    """The lock's file, open and locked, or None where there can be none; BlockingIOError where another process has it."""
    for _ in range(TRIES):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")  # a file or link that others put there is not emptied
        except FileNotFoundError:  # another process has just removed the folder, or nothing can be here (/proc)
            continue
        except OSError:
            return None
        try:
            if os.fstat(file.fileno()).st_size:  # no lock of ours, which are empty
                file.close()
                return None
            fcntl.flock(file, how)
            if _is_still(file, path):
                return file
        except BlockingIOError:
            file.close()
            raise
        except OSError:
            file.close()
            return None
        file.close()
    return None


def _is_still(file: TextIO, path: Path) -> bool:
    """Whether nobody has deleted the file meanwhile, as whoever had the lock does."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
