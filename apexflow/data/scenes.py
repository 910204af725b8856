"""Compositional scenes drawn from a seed: the data set that ships with the package.

A scene holds one to four flat shapes on a light ground. Its caption is written the way GenEval writes prompts, and every
caption carries GenEval metadata (`tag`, `include`, `exclude`), so the same scoring rules serve pictures and prompts.
Eight pairs of shape and colour are held out: they occur in no training caption and in no training picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
SIZE = 64  # pixels a side
SUPERSAMPLING = 4
GROUND = (232, 230, 224)
COLORS: dict[str, RGB] = {
    "red": (214, 40, 40),
    "orange": (245, 130, 32),
    "yellow": (250, 208, 44),
    "green": (46, 160, 67),
    "blue": (38, 92, 214),
    "purple": (128, 56, 172),
    "pink": (246, 140, 186),
    "black": (28, 28, 32),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
# One held-out colour for each shape, and one held-out shape for each colour.
HELD_OUT = frozenset(zip(SHAPES, (*list(COLORS)[3:], *list(COLORS)[:3]), strict=True))
# How often each kind of caption is drawn. Relations and attribute pairs are the hard ones, so they come most.
TASK_WEIGHTS = {
    "single_object": 0.08,
    "colors": 0.12,
    "two_object": 0.12,
    "counting": 0.18,
    "position": 0.28,
    "color_attr": 0.22,
}


@dataclass(frozen=True)
class Thing:
    """One drawn shape: centre `x`, `y` and side `size` of its box, in pixels of a 64-pixel scene."""

    shape: str
    color: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """What is drawn (`things`), what is said of it (`caption`) and GenEval's metadata for the caption."""

    things: tuple[Thing, ...]
    caption: str
    metadata: dict


def outline(shape: str) -> list[tuple[float, float]]:
    """Corner points of `shape` in the box [-1, 1]^2, y pointing down (circle and ring are drawn as ellipses instead)."""
    if shape == "square":
        return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    if shape == "triangle":
        return [(0, -1), (1, 0.9), (-1, 0.9)]
    if shape == "diamond":
        return [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)]
    if shape == "cross":
        w = 0.34
        half = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w)]
        return half + [(-x, -y) for x, y in half]  # the same, turned by 180 degrees
    if shape == "star":
        radii = [1.08 if i % 2 == 0 else 0.45 for i in range(10)]
        return [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5) + 0.05) for i, r in enumerate(radii)]
    if shape == "heart":
        angles = np.linspace(0, 2 * math.pi, 60, endpoint=False)
        return [
            (
                float(math.sin(a) ** 3),
                float(-(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16 - 0.08),
            )
            for a in angles
        ]
    raise ValueError(f"no outline for {shape!r}")


def draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, box: tuple[float, float, float, float], fill: RGB, hole: RGB
) -> None:
    """Draw `shape` into `box` (left, top, right, bottom, in canvas pixels); `hole` fills the inside of a ring."""
    left, top, right, bottom = box
    if shape in ("circle", "ring"):
        canvas.ellipse(box, fill=fill)
        if shape == "ring":
            inset = 0.27 * (right - left)
            canvas.ellipse((left + inset, top + inset, right - inset, bottom - inset), fill=hole)
        return
    cx, cy, rx, ry = (left + right) / 2, (top + bottom) / 2, (right - left) / 2, (bottom - top) / 2
    canvas.polygon([(cx + rx * px, cy + ry * py) for px, py in outline(shape)], fill=fill)


def render(things: tuple[Thing, ...]) -> Image.Image:
    """Draw the things, antialiased, as an RGB image of SIZE x SIZE pixels."""
    image = Image.new("RGB", (SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING), GROUND)
    canvas = ImageDraw.Draw(image)
    for thing in things:
        half = thing.size / 2
        left, top = SUPERSAMPLING * (thing.x - half), SUPERSAMPLING * (thing.y - half)
        box = (left, top, left + SUPERSAMPLING * thing.size, top + SUPERSAMPLING * thing.size)
        draw_shape(canvas, thing.shape, box, COLORS[thing.color], GROUND)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def article(words: str) -> str:
    """ "a red star", "an orange ring"."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(words: str) -> str:
    """ "red stars", "orange crosses"."""
    return f"{words}es" if words.endswith("s") else f"{words}s"


def place(count: int, relation: str | None, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centres and sizes of `count` things that do not touch, in random order.

    With a `relation`, thing 1 stands in that relation to thing 0 (GenEval lists the target first).
    """
    if count == 1:
        size = rng.uniform(18, 26)
        return [(*rng.uniform(size / 2 + 2, SIZE - size / 2 - 2, 2), size)]
    columns = rng.permutation(4)[:count]
    if relation is not None:
        columns = np.array(rng.permutation(_cells_in_relation(relation))[0])
    placed = []
    for cell in columns:
        size = rng.uniform(17, 24)
        room = 15.5 - size / 2
        x, y = (16 + 32 * (cell % 2), 16 + 32 * (cell // 2))
        placed.append((x + rng.uniform(-room, room), y + rng.uniform(-room, room), size))
    return placed


def _cells_in_relation(relation: str) -> list[tuple[int, int]]:
    """Pairs (target cell, subject cell) of the 2 x 2 lattice, cells in reading order, side by side only."""
    return {
        "left of": [(1, 0), (3, 2)],
        "right of": [(0, 1), (2, 3)],
        "above": [(2, 0), (3, 1)],
        "below": [(0, 2), (1, 3)],
    }[relation]


def _pair(rng: np.random.Generator) -> tuple[str, str]:
    """A shape and a colour that are not held out together."""
    while True:
        pair = (str(rng.choice(SHAPES)), str(rng.choice(list(COLORS))))
        if pair not in HELD_OUT:
            return pair


def prompt_text(metadata: dict) -> str:
    """The caption of GenEval `metadata`: "a photo of a red star left of a blue ring"."""
    clauses = metadata["include"]
    names = [f"{c['color']} {c['class']}" if "color" in c else c["class"] for c in clauses]
    if metadata["tag"] == "counting":
        return f"a photo of {NUMBERS[clauses[0]['count']]} {plural(names[0])}"
    if len(clauses) == 1:
        return f"a photo of {article(names[0])}"
    if "position" in clauses[1]:
        return f"a photo of {article(names[1])} {clauses[1]['position'][0]} {article(names[0])}"
    return f"a photo of {article(names[0])} and {article(names[1])}"


def metadata_of(
    tag: str, pairs: Sequence[tuple[str, str]], named: bool, count: int = 1, relation: str | None = None
) -> dict[str, Any]:
    """GenEval metadata, caption and all, that ask for `count` of each pair of shape and, where `named`, colour; the second pair
    stands in `relation` to the first."""
    clauses: list[dict[str, Any]] = [
        {"class": shape, "count": count} | ({"color": color} if named else {}) for shape, color in pairs
    ]
    if relation is not None:
        clauses[1]["position"] = [relation, 0]
    metadata: dict[str, Any] = {"tag": tag, "include": clauses}
    if tag == "counting":
        metadata["exclude"] = [{"class": pairs[0][0], "count": count + 1}]
    return metadata | {"prompt": prompt_text(metadata)}


def draw_scene(rng: np.random.Generator, task: str | None = None) -> Scene:
    """One random scene with its caption; `task` is one of GenEval's six tags, drawn by `TASK_WEIGHTS` when None."""
    task = task or str(rng.choice(list(TASK_WEIGHTS), p=list(TASK_WEIGHTS.values())))
    count = {"single_object": 1, "colors": 1, "counting": int(rng.integers(2, 5))}.get(task, 2)
    relation = str(rng.choice(RELATIONS)) if task == "position" else None
    pairs = [_pair(rng)] * count
    if task in ("two_object", "position", "color_attr"):
        while pairs[0][0] == pairs[1][0]:
            pairs = [_pair(rng), _pair(rng)]
    # Half of the relations and counts also name colours, so that the words combine freely.
    named = task in ("colors", "color_attr") or (task in ("position", "counting") and rng.random() < 0.5)
    asked, each = (pairs[:1], count) if task == "counting" else (pairs, 1)
    metadata = metadata_of(task, asked, named, each, relation)
    things = tuple(
        Thing(shape, color, *spot) for (shape, color), spot in zip(pairs, place(count, relation, rng), strict=True)
    )
    return Scene(things, metadata["prompt"], metadata)


def scenes(count: int, seed: int = 0, start: int = 0) -> Iterator[Scene]:
    """Scenes `start` to `start + count - 1` of the endless set that `seed` names; scene i never depends on the others."""
    for index in range(start, start + count):
        yield draw_scene(np.random.default_rng([seed, index]))


def vocabulary() -> list[str]:
    """Every word that a caption can hold."""
    words = {*SHAPES, *COLORS, *NUMBERS.values(), "a", "an", "and", "photo", *(w for r in RELATIONS for w in r.split())}
    return sorted(words | {plural(shape) for shape in SHAPES})
