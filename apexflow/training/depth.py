"""Networks of many like blocks, counted on shallow ones: every further block adds the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from apexflow.backbones import Backbone

SHALLOW = (2, 4)  # even, for judges that look at the middle block: what lies below it grows by half of a block


def by_depth(count: Callable[..., Sequence[int]], *networks: Backbone | None) -> list[int]:
    """What `count` says of networks on the meta device, of which many like blocks are counted on shallow ones."""
    layers = [None if one is None else layers_of(one) for one in networks]

    def at(deeper: int | None = None) -> Sequence[int]:
        depths = [None if n is None else SHALLOW[index == deeper] for index, n in enumerate(layers)]
        return count(*(one and at_depth(one, depth) for one, depth in zip(networks, depths, strict=True)))

    few = list(at())
    found = few
    for index, n in enumerate(layers):
        if n is not None:
            more = at(index)
            blocks = [one_block(*counts) for counts in zip(few, more, strict=True)]
            found = [one + (n - SHALLOW[0]) * block for one, block in zip(found, blocks, strict=True)]
    return found


def one_block(few: int, more: int) -> int:
    """What a block adds, from the counts of both shallow networks."""
    return (more - few) // (SHALLOW[1] - SHALLOW[0])


def layers_of(backbone: Backbone) -> int | None:
    """How many like blocks the network has, where counting two shallow ones is enough."""
    config: Any = backbone.transformer.config
    layers = config[backbone.depth] if backbone.depth else 0
    return layers if layers > SHALLOW[1] else None


def at_depth(backbone: Backbone, depth: int | None) -> Backbone:
    """The backbone with a transformer of its own, of `depth` blocks (None: as many as it has), on the meta device."""
    other: Any = copy.copy(backbone)
    transformer: Any = backbone.transformer
    config = dict(transformer.config) | ({backbone.depth: depth} if depth is not None else {})
    kind: Any = type(transformer)
    dtype = next(backbone.transformer.parameters()).dtype
    with torch.device("meta"):
        other.transformer = kind.from_config(config).to(dtype).requires_grad_(False)
    return other
