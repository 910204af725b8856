"""What is in a picture of a scene: finds the shapes by colour and outline, and never sees the prompt.

Foreground is what differs from the ground; each connected patch of it is one thing, whose outline is compared with every
shape. The confidence of a detection is the soft overlap (intersection over union) with the best shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from apexflow.data.scenes import COLORS, GROUND, SHAPES, SIZE, Thing, render

Array = NDArray[np.floating]
SMALLEST = 24  # pixels: fewer are a speck
TEMPLATE = 24  # side of the outlines that are compared
PALETTE = np.array(list(COLORS.values()), dtype=np.float64)
FOREGROUND = 60.0  # distance in RGB from the ground at which a pixel is surely part of a thing


@dataclass(frozen=True)
class Detection:
    """A thing found: its `box` is [left, top, right, bottom] in pixels, right and bottom exclusive."""

    shape: str
    color: str
    box: tuple[float, float, float, float]
    score: float


def detect(image: Image.Image) -> list[Detection]:
    """Every thing in a picture of any size (it is looked at in 64 x 64), the surest first."""
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    distance = np.linalg.norm(pixels - GROUND, axis=-1)
    patches, count = ndimage.label(distance > FOREGROUND)
    found = []
    for index in range(1, count + 1):
        for patch in _split(patches == index, pixels):
            if patch.sum() >= SMALLEST:
                found.append(_describe(patch, pixels))
    return sorted(found, key=lambda d: -d.score)


def _split(patch: NDArray[np.bool_], pixels: Array) -> list[NDArray[np.bool_]]:
    """A patch that holds two colours in earnest is two things that touch."""
    core = _core(patch)
    names = _nearest(pixels[core], PALETTE)
    shares = np.bincount(names, minlength=len(COLORS)) / max(len(names), 1)
    strong = [color for color in range(len(COLORS)) if shares[color] > 0.25]
    if len(strong) < 2:
        return [patch]
    labels = np.full(patch.shape, -1)
    labels[patch] = _nearest(pixels[patch], PALETTE[strong])
    return [labels == index for index in range(len(strong))]


def _core(patch: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The inside of a patch: antialiased edges blend with the ground and would vote for paler colours."""
    inside = ndimage.binary_erosion(patch)
    return inside if inside.sum() >= 4 else patch


def _nearest(pixels: Array, palette: Array) -> NDArray[np.intp]:
    """The number of the nearest colour of a palette (C, 3) for each of some pixels (N, 3)."""
    return np.argmin(((pixels[:, None] - palette) ** 2).sum(-1), axis=1)


def _cover(pixels: Array, color: str) -> Array:
    """How far each pixel (H, W, 3) is on the way from ground to colour: 1 inside, a fraction on the edge."""
    way = np.array(COLORS[color], dtype=np.float64) - GROUND
    return np.clip((pixels - GROUND) @ way / (way @ way), 0, 1)


def _describe(patch: NDArray[np.bool_], pixels: Array) -> Detection:
    """Colour by vote of the inside, shape by the best overlap of soft masks."""
    color = list(COLORS)[int(np.bincount(_nearest(pixels[_core(patch)], PALETTE), minlength=len(COLORS)).argmax())]
    cover = _cover(pixels, color) * ndimage.binary_dilation(patch)
    rows, columns = np.nonzero(cover > 0.5)
    if len(rows) == 0:
        rows, columns = np.nonzero(patch)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    mask = resample(cover[top:bottom, left:right])
    aspect = (right - left) / (bottom - top)
    scores = [overlap(mask, template) * _aspect_match(aspect, other) for template, other in map(template_of, SHAPES)]
    best = int(np.argmax(scores))
    return Detection(SHAPES[best], color, (float(left), float(top), float(right), float(bottom)), float(scores[best]))


def overlap(a: Array, b: Array) -> float:
    """Soft intersection over union of two masks with values in [0, 1]."""
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def _aspect_match(a: float, b: float) -> float:
    """1 for equal aspect ratios; a stretched shape is not the shape. A pixel either way is forgiven."""
    return min(1.0, 1.1 * min(a / b, b / a))


def resample(mask: Array) -> Array:
    """A mask stretched to the template's size."""
    picture = Image.fromarray((mask * 255).astype(np.uint8))
    return np.asarray(picture.resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR), dtype=np.float64) / 255


@cache
def template_of(shape: str) -> tuple[Array, float]:
    """The outline of a shape as a soft mask in its own bounding box, and the box's aspect ratio."""
    picture = np.asarray(render((Thing(shape, "black", 32, 32, 24),)), dtype=np.float64)
    cover = _cover(picture, "black")
    rows, columns = np.nonzero(cover > 0.5)
    cut = cover[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return resample(cut), cut.shape[1] / cut.shape[0]
