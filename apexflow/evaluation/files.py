"""Files of an evaluation: written whole or not at all, read without trust."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from apexflow.data.pictures import open_upright
from apexflow.errors import UserError
from apexflow.files import replacing, write_text

Item = TypeVar("Item")
Result = TypeVar("Result")

ENDINGS = {".png": b"IEND\xaeB`\x82", ".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9"}
JPEG_QUALITY = 75  # what Sana's pictures have; FID sees it


class Unreadable(Exception):
    """A picture that cannot be scored, and why."""


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write a JSONL file whole or not at all."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file that is still being appended to: half a line at its end does not count."""
    text = path.read_text("utf-8") if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]  # a row that was cut off may well end in a bracket of its own
    try:
        return [json.loads(line) for line in whole.splitlines() if line.endswith("}")]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and its rows are computed again") from None


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "PNG" if path.suffix == ".png" else "JPEG"
    with replacing(path) as partial:
        picture.save(partial, format=kind, **({} if kind == "PNG" else {"quality": JPEG_QUALITY}))


def is_whole(path: Path) -> bool:
    """Whether a picture is there with its end: a write cut short by a crash of the machine leaves none."""
    ending = ENDINGS[path.suffix]
    try:
        with path.open("rb") as file:
            file.seek(-len(ending), os.SEEK_END)
            return file.read() == ending
    except OSError:
        return False


def open_picture(path: Path) -> Image.Image:
    """The picture in RGB and in its EXIF orientation, fully read. Raises Unreadable."""
    try:
        with open_upright(path) as image:
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # pillow raises many kinds
        raise Unreadable(f"unreadable picture: {error}") from None


def stamp(path: Path) -> str:
    """Changes whenever the file is written again, so that a score is never taken for that of another picture."""
    try:
        status = path.stat()
    except OSError:  # a link to nowhere, or a file that went away: it will be told of as unreadable
        return "none"
    return f"{status.st_size}-{status.st_mtime_ns}"


def read_ahead(
    items: Iterable[Item], read: Callable[[Item], Result], threads: int = 4
) -> Iterator[tuple[Item, Result | Unreadable]]:
    """Each item with what `read` makes of it, in order; files are read while the caller computes.

    At most 2 x threads results wait in memory. An Unreadable comes as the result, other errors are raised.
    """
    waiting: deque[tuple[Item, Future[Result | Unreadable]]] = deque()
    pool = ThreadPoolExecutor(max_workers=threads)

    def attempt(item: Item) -> Result | Unreadable:
        try:
            return read(item)
        except Unreadable as error:
            return error

    try:
        for item in items:
            waiting.append((item, pool.submit(attempt, item)))
            if len(waiting) > 2 * threads:
                yield waiting[0][0], waiting.popleft()[1].result()
        while waiting:
            yield waiting[0][0], waiting.popleft()[1].result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
