"""Which passes through which role an objective makes in a step: rows with a graph, and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apexflow.conditioning import Condition
from apexflow.objectives import Batch, Losses, Networks, Objective
from apexflow.randomness import RowRandom


@dataclass(frozen=True)
class Pass:
    """One call of a role on some rows.

    graph: whether activations are kept for backward. held: whether the role's weights are out of it.
    """

    role: str
    rows: int
    graph: bool
    held: bool = False


def count_passes(objective: Objective, rows: int) -> list[Pass]:
    """The passes of a batch of `rows`, in order."""
    return trace_passes(objective, rows, rows)[0]


def trace_passes(
    objective: Objective, rows: int, total: int, shape: Sequence[int] = (2, 4, 4)
) -> tuple[list[Pass], Losses]:
    """The passes of the first micro-batch of `rows` out of a global batch of `total`, and the losses with their graph.

    The networks are stand-ins of one parameter that keep nothing for backward, so this costs nothing at any model size,
    and what autograd saves within is the losses' own, for latents of `shape` (C, h, w).
    """
    made: list[Pass] = []
    weight = torch.ones(1, requires_grad=True)

    def role(name: str, trained: bool = False, held: bool = False) -> Callable[..., Tensor]:
        def answer(x_t: Tensor, *_: Any) -> Tensor:
            made.append(Pass(name, len(x_t), torch.is_grad_enabled() and (trained or x_t.requires_grad), held))
            return x_t + (weight if trained else weight.detach())

        return answer

    null = Condition(torch.zeros(1, 1, 2))
    student, reference, teacher = role("student", trained=True), role("reference"), role("teacher")
    further = {network.name: role(network.name, trained=True) for network in objective.further}
    frozen = {name: role(name, held=True) for name in ("student", "reference", "teacher", *further)}
    networks = Networks(student, reference, teacher, null, further=further, frozen=frozen)
    numbers = torch.arange(rows)
    random = RowRandom(0, 0, numbers.tolist())
    c = Condition(torch.ones(rows, 1, 2))
    losses = objective(networks, Batch(random.normal(shape), c, random, numbers, total, 0.5), {})
    return made, losses


def cost(passes: list[Pass], checkpointing: bool = False, frozen: bool = False) -> float:
    """Work of the passes in forward passes of one row.

    With a graph, backward adds two, or one where the weights are `frozen` under a LoRA, and checkpointing another.
    """
    kept = sum(made.rows for made in passes if made.graph)
    return kept * (1 + (1 if frozen else 2) + checkpointing) + sum(made.rows for made in passes if not made.graph)
