"""Files and folders that appear whole or not at all, and JSON in them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from apexflow.errors import CHECK_ROOM, UserError, writing

WEIGHTS = ".safetensors"
SUFFIX = ".partial"  # of what is being written; hidden too, so that no reader takes it for a whole file


@contextmanager
def replacing(path: Path, mend: str = CHECK_ROOM) -> Iterator[Path]:
    """Within, a file is written under the name that is given; at the end it becomes `path`: whole or not at all.

    Processes that write the same file do not meet. UserError names one that cannot be written, and says the `mend`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{SUFFIX}")
    try:
        with writing(path, mend):
            yield partial
            if path.suffix == WEIGHTS:
                share(partial)
            os.replace(partial, path)
    finally:
        with suppress(OSError):  # a file may lie where the folder should
            partial.unlink()


@contextmanager
def new_folder(path: Path, mend: str = CHECK_ROOM) -> Iterator[Path]:
    """Within, the folder that is given is filled; at the end it becomes `path`: whole or not at all.

    Its name is always the same, so that what a killed process left is not left for good: one process makes `path` at a time.
    UserError where it cannot be written, or another `path` is there at the end.
    """
    partial = path.with_name(f"{SUFFIX}-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(path, mend):
            partial.mkdir(parents=True)
            yield partial
            share_weights(partial)
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def share_weights(folder: Path) -> None:
    """`share` the weights in a folder that was just written; a file with a second name elsewhere is not its own."""
    for file in folder.rglob(f"*{WEIGHTS}"):
        if file.stat().st_nlink == 1:
            share(file)


def share(file: Path) -> None:
    """Let those who can read its folder read a file, too: the writer of safetensors makes it readable to its owner alone."""
    with suppress(OSError):  # some network disks have no rights to change
        file.chmod(file.parent.stat().st_mode & 0o644)


def link_or_copy(source: str, target: str) -> None:
    """A second name of a file of weights, which takes no room on the disk; a copy where the disk allows none, and of any other
    file, since those are edited."""
    with suppress(OSError):
        if source.endswith(WEIGHTS):
            os.link(os.path.realpath(source), target)
            return
    shutil.copy2(source, target)


def make_folder(path: Path) -> None:
    """Make a folder that may be there already; UserError where it cannot be."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def drop_partial(folder: Path) -> None:
    """Delete the files that killed processes left half written in a folder where no other writes."""
    for left_over in folder.glob(f"*{SUFFIX}"):
        left_over.unlink(missing_ok=True)


def write_text(path: Path, text: str, mend: str = CHECK_ROOM) -> None:
    """Write a text file whole or not at all."""
    with replacing(path, mend) as partial:
        partial.write_text(text, "utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path, what: str, kind: type = dict) -> Any:
    """What a JSON file holds, of that `kind`; UserError says which file of the user's it is (`what`)."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {what} at {path}: {error}") from None
    if not isinstance(content, kind):
        raise UserError(f"cannot read {what} at {path}: its content is unexpected; restore or delete it")
    return content
