"""What a training method is: a frozen dataclass that turns networks and a batch into losses. One file a method.

Objectives are pure: no optimizer, no logging, no device handling. What they may use is spelled out here.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from apexflow.conditioning import Condition
from apexflow.randomness import RowRandom
from apexflow.transport import LINEAR, Transport

Field = Callable[[Tensor, Tensor, Condition], Tensor]


def exact_time(t: Tensor) -> Tensor:
    """What a backbone that keeps time in float32 does to it: nothing."""
    return t


@dataclass(frozen=True)
class Networks:
    """The roles that an objective may call as `F(x_t, t, c)`.

    Only `student` builds a graph; `reference` (theta-minus) and `teacher` (frozen, pretrained) run without gradients.
    `null` is the one-row null condition of guidance. `round_time` rounds times to what the backbone really sees, so that
    secants divide by the step that the network saw. `time_shift` is that of the grid on which the model is sampled.
    """

    student: Field
    reference: Field
    teacher: Field
    null: Condition | None = None
    transport: Transport = LINEAR
    round_time: Callable[[Tensor], Tensor] = exact_time
    time_shift: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch: data `x` (B, ...), condition `c`, their numbers `rows` (B,) within the global batch of `total`.

    `progress` in [0, 1] is how far the run has come. What a row is used for and its random numbers depend on its number
    alone, so micro-batches, accumulation and several processes change nothing.
    """

    x: Tensor
    c: Condition
    random: RowRandom
    rows: Tensor
    total: int
    progress: float = 0.0

    def chosen(self, share: float) -> Tensor:
        """Boolean (B,): the rows that belong to a `share` of the global batch, spread evenly and at least one of `total`."""
        return _marks(self.rows + 1, share, self.total) > _marks(self.rows, share, self.total)


def _marks(rows: Tensor, share: float, total: int) -> Tensor:
    count = share_of(total, share)
    return torch.div(rows * count, total, rounding_mode="floor")


def share_of(total: int, share: float) -> int:
    """How many rows of `total` a `share` is: rounded, at least one if the share is above 0."""
    return max(round(share * total), 1) if share > 0 else 0


@dataclass(frozen=True)
class Losses:
    """`total` is what to differentiate; `terms` are detached scalars to show. Both are this micro-batch's part of a sum over
    the global batch, so adding them up over micro-batches gives the losses of the step."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A training method. `needs` names the roles it calls beside the student: "reference" (EMA) and "teacher"."""

    @property
    def needs(self) -> tuple[str, ...]: ...

    @property
    def citation(self) -> str: ...

    def __call__(self, networks: Networks, batch: Batch, memory: MutableMapping[str, Tensor]) -> Losses:
        """Losses of one micro-batch. `memory` keeps tensors between steps and is saved with the checkpoint."""
        ...


def objectives() -> dict[str, Any]:
    """The table of methods by the name that a recipe gives: one line each."""
    from apexflow.objectives.apex import APEX
    from apexflow.objectives.cm import CM
    from apexflow.objectives.flow_matching import FlowMatching
    from apexflow.objectives.lcm import LCM
    from apexflow.objectives.pcm import PCM
    from apexflow.objectives.scm import SCM
    from apexflow.objectives.ucgm import UCGM

    return {
        "apex": APEX,
        "flow_matching": FlowMatching,
        "cm": CM,
        "scm": SCM,
        "ucgm": UCGM,
        "lcm": LCM,
        "pcm": PCM,
    }
