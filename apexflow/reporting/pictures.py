"""Pictures as base64 data URIs, so that a page holds them itself."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageDraw

from apexflow.reporting.markup import tag, text

WIDEST = 1200  # pixels; wider pictures are scaled down
MOST_PREVIEWS = 12
GAP = 2  # pixels between the pictures of a sheet
TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what pillow raises on damaged files
Item = TypeVar("Item")


def picture_tag(path: Path, description: str) -> str:
    """A picture file as an <img> with its data inside; raises one of UNREADABLE where it is damaged or missing."""
    raw = path.read_bytes()
    with Image.open(io.BytesIO(raw)) as opened:
        opened.load()
        picture: Image.Image = opened
        kind = TYPES.get(opened.format or "")
        if kind is None or picture.width > WIDEST:
            picture, raw, kind = _as_png(picture)
    data = base64.b64encode(raw).decode("ascii")
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img src="data:{kind};base64,{data}" alt="{text(description)}" {size}>'


def _as_png(picture: Image.Image) -> tuple[Image.Image, bytes, str]:
    width = min(picture.width, WIDEST)
    height = max(1, round(picture.height * width / picture.width))
    small = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return small, buffer.getvalue(), TYPES["PNG"]


def labelled_sheet(rows: Mapping[str, Sequence[Image.Image]], heads: Sequence[str]) -> Image.Image:
    """Pictures of one size, a named row each, under the names of their columns."""
    width, height = next(iter(rows.values()))[0].size
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left, top = 8 + max(int(measure.textlength(name)) for name in rows), 16
    sheet = Image.new("RGB", (left + len(heads) * (width + GAP), top + len(rows) * (height + GAP)), "white")
    drawing = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        drawing.text((left + column * (width + GAP), 2), head, fill="black")
    for row, (name, pictures) in enumerate(rows.items()):
        y = top + row * (height + GAP)
        drawing.text((2, y + height // 2 - 6), name, fill="black")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (left + column * (width + GAP), y))
    return sheet


def figure(picture: str, caption: str, kind: str = "grid") -> str:
    """An <img> with its caption below."""
    return tag("figure", picture + tag("figcaption", text(caption)), class_=kind)


def previews(folder: Path) -> list[tuple[int, str]]:
    """(step, <img>) of a run's `previews/step-N.png` in order, at most MOST_PREVIEWS, evenly spaced from first to last.

    A damaged file (a crash while it was written) is left out.
    """
    shown = ((step, _preview(step, path)) for step, path in spaced(_of_steps(folder, "png"), MOST_PREVIEWS))
    return [(step, picture) for step, picture in shown if picture]


def beside_previews(folder: Path) -> list[dict[str, Any]]:
    """The numbers in a run's `previews/step-N.json` with their step, in order. What is damaged is left out."""
    found = []
    for step, path in _of_steps(folder, "json"):
        with suppress(OSError, ValueError, TypeError):
            found.append(json.loads(path.read_text("utf-8")) | {"step": step})
    return found


def _of_steps(folder: Path, kind: str) -> list[tuple[int, Path]]:
    named = ((re.fullmatch(rf"step-(\d+)\.{kind}", path.name), path) for path in folder.glob(f"step-*.{kind}"))
    return sorted((int(match[1]), path) for match, path in named if match)


def _preview(step: int, path: Path) -> str:
    try:
        return picture_tag(path, f"Samples at step {step}")
    except UNREADABLE:
        return ""


def spaced(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` (2 or more) of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
