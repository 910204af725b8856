"""The exceptions that a user is meant to read, how their messages are worded, and which errors of others become one."""

from __future__ import annotations

import difflib
import errno
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

MOST_QUOTED = 80
CHECK_ROOM = "check the folder and the free space"
# What is no character to read: control codes, which may steer a terminal, half characters, and turns of the direction of writing.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """A mistake in the input, told in one line that names the thing and the mend; the command line exits with 2."""


class ToldElsewhere(UserError):
    """The same mistake in a process whose neighbour tells it: exits with 2 and says nothing."""


class Diverged(UserError):
    """A training whose loss stays non-finite."""


class Stopped(Exception):
    """The user asked for a stop and everything is saved; says how to go on. The command line exits with 130."""


def quoted(text: str) -> str:
    """A text of the user's as a message shows it: in quotes, and no more than its first MOST_QUOTED characters."""
    return repr(text if len(text) <= MOST_QUOTED else f"{text[:MOST_QUOTED]}…")


def in_a_shell(name: object) -> str:
    """A path or name as it stands in a command that a message gives, to be pasted: most have nothing that a shell would read."""
    return shlex.quote(str(name))


def suggest(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` where a known word is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f", did you mean {near[0]!r}?" if near else ""


def printable(text: str) -> str:
    """A text in one line as a terminal may show it: names in strangers' files may hold anything."""
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def first_line(error: BaseException) -> str:
    """What a library's error says in its first line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def going_on(told: Callable[[], str]) -> Iterator[None]:
    """Within, Ctrl-C is a Stopped with what is told then: what is kept, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(told()) from None


def check_built_in(name: str, meant: str) -> None:
    """UserError where a built-in name, which stands for `meant`, is also that of a path: nobody would see which was taken."""
    if Path(name).exists():
        raise UserError(
            f"{name!r} stands for {meant}, and a path here has that name too: give ./{name} for the path, or rename it"
        )


def is_full_disk(error: BaseException) -> bool:
    """Whether a disk, or the user's share of it, had no room left."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def no_path(error: BaseException) -> str | None:
    """What to do about a path whose name is too long, as a text given in its place is, or that we may not read; None for any
    other error."""
    if not isinstance(error, OSError) or error.filename is None:
        return None
    if error.errno not in (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP):
        return None
    path = str(error.filename)  # in full, unless it is a text: a path is told apart by its end
    told = quoted(path) if error.errno == errno.ENAMETOOLONG else repr(path)
    return f"cannot use {told} ({error.strerror}): check the path and its permissions"


def is_taken(folder: Path) -> bool:
    """Whether an output folder holds something already; UserError when it is no folder."""
    with writing(folder):
        return folder.exists() and any(folder.iterdir())


@contextmanager
def writing(path: Path, mend: str = CHECK_ROOM) -> Iterator[None]:
    """Within, a file that cannot be written is a UserError that names it, and says the `mend`."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        there = error.filename2 or error.filename  # of two, the one that was to be
        raise UserError(
            f"cannot write {path}: a file is in the way of a folder ({there}); move it or choose another path"
        ) from error
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in an error of its own
        raise UserError(f"cannot write {path} ({_reason(error)}): {mend}") from error


def _reason(error: Exception) -> str:
    """What went wrong; the first of what did in copying a folder, which holds all of them."""
    failed = error.args[0] if isinstance(error, shutil.Error) and error.args else None
    return str(failed[0][-1] if isinstance(failed, list) and failed else error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, a GPU's allocator or the CPU's, which raises a plain RuntimeError, had no memory left."""
    named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or named or "DefaultCPUAllocator" in str(error)
