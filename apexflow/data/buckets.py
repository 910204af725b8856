"""Aspect-ratio buckets: sizes of about one area, so that pictures lose little to cropping."""

from __future__ import annotations

import math
from collections.abc import Sequence

from apexflow.backbones import Backbone
from apexflow.errors import UserError

Size = tuple[int, int]  # height, width
WIDEST = 2.0  # the longer side over the shorter


def bucket_sizes(backbone: Backbone, size: int) -> list[Size]:
    """The square of `size` and what else the model takes of at most that area, between 1:2 and 2:1; UserError if nothing else."""
    backbone.latent_shape((size, size))
    step = max(16, 2 ** round(math.log2(size / 16)))
    sizes = {(size, size)}
    for width in range(step, 2 * size + 1, step):
        height = size * size // width // step * step
        if height and max(width / height, height / width) <= WIDEST and _takes(backbone, (height, width)):
            sizes.add((height, width))
    if len(sizes) == 1:
        raise UserError(f"at {size} pixels this model takes square pictures only: leave the aspect-ratio buckets out")
    return sorted(sizes)


def _takes(backbone: Backbone, size: Size) -> bool:
    try:
        backbone.latent_shape(size)
    except UserError:
        return False
    return True


def nearest(sizes: Sequence[Size], height: int, width: int) -> Size:
    """The bucket whose aspect is nearest; of two that are equally near, the larger."""
    return min(sizes, key=lambda s: (round(abs(math.log(s[0] / s[1]) - math.log(height / width)), 6), -s[0] * s[1]))
