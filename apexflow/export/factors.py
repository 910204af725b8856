"""A LoRA out of a model that was tuned whole: the difference to its base at the targets, by its largest singular values."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from apexflow.backbones.weights import guarded, weight_files, weight_shapes
from apexflow.errors import UserError
from apexflow.lora.merge import Pair
from apexflow.progress import Progress

# Of the power iteration. Pure noise, the worst case, then keeps within 0.2% of what it could at rank 64, and 1.2% at 16
# (1,536 x 3,072), in a fifth of the time of an exact decomposition.
STEPS = 12


@dataclass(frozen=True)
class Factors:
    """kept: the share of the squared norm of the difference at the targets that the pairs have; outside: the share of that of the
    whole difference that lies elsewhere."""

    pairs: dict[str, Pair]
    kept: float
    outside: float

    @property
    def told(self) -> str:
        """What the LoRA has and what it lacks, for people."""
        return (
            f"The LoRA keeps {self.kept:.2%} of the squared norm of the difference at its weights. What was tuned elsewhere "
            f"(biases, norms, ...; {self.outside:.2%} of the squared norm of the whole difference) is not in it."
        )


@torch.no_grad()
def factor(student: Path, base: Path, targets: Collection[str], rank: int, mend: str) -> Factors:
    """The pairs of `rank` nearest to the difference between two networks' folders at the modules `targets`; one weight at a time.

    UserError, with the mend, where the two are not of one shape, or do not differ there.
    """
    if weight_shapes(student) != weight_shapes(base):
        raise UserError(
            f"{student.parent} and {base.parent} have weights of other names or shapes, so no LoRA leads from one to the other: "
            f"{mend}"
        )
    ours, theirs = weight_files(student), weight_files(base)
    pairs: dict[str, Pair] = {}
    inside = outside = kept = 0.0
    with Progress("extracting a LoRA", len(ours)) as progress, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in sorted(ours):
            difference = _tensor(ours[name], name).float() - _tensor(theirs[name], name).float()
            squared = float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
            if not math.isfinite(squared):
                raise UserError(
                    f"{student.parent} or {base.parent} holds weights that are not finite: {name}; restore both"
                )
            module = name.removesuffix(".weight")
            if module != name and module in targets:
                pairs[module], found = nearest(difference, rank)
                inside, kept = inside + squared, kept + found
            else:
                outside += squared
            progress.advance()
    if not inside:
        raise UserError(
            f"{student.parent} equals {base.parent} where a LoRA would apply, so there is none to extract: tune it further, or "
            f"{mend}"
        )
    return Factors(pairs, min(kept / inside, 1.0), outside / (inside + outside))


def nearest(difference: Tensor, rank: int) -> tuple[Pair, float]:
    """The pair of `rank`, or the weight's own if that is less, whose product is nearest to a difference, and its squared norm."""
    matrix = difference.flatten(1)
    most = min(matrix.shape)
    U, S, V = torch.svd_lowrank(matrix, min(2 * rank + 8, most), STEPS)
    rank = min(rank, most)
    U, S, V = U[:, :rank], S[:rank], V[:, :rank]
    ones = [1] * (difference.ndim - 2)  # of a convolution
    down = (V * S.sqrt()).T.reshape(rank, *difference.shape[1:])
    up = (U * S.sqrt()).reshape(len(U), rank, *ones)
    return Pair(down, up, 1.0), float(S.double().square().sum())


def _tensor(file: Path, name: str) -> Tensor:
    def read() -> Tensor:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name)

    return guarded(file, read)
