"""What a training method is: a frozen dataclass that turns networks and a batch into losses. One file a method.

Objectives are pure: no optimizer, no logging, no device handling. What they may use is spelled out here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from apexflow.conditioning import Condition, guide
from apexflow.randomness import RowRandom
from apexflow.transport import LINEAR, Transport

# A network with its weights: it answers `F(x_t, t, c)`. For a method that needs a second time also `F(x_t, t, c, s)`, the mean
# direction from t to s: `transport.move` by it from t to s is the jump. s = t asks for the velocity, s = 0 (or none) for the
# jump to data.
Field = Callable[..., Tensor]


def exact_time(t: Tensor) -> Tensor:
    """`round_time` of a backbone that keeps time in float32: t as it is."""
    return t


@dataclass(frozen=True)
class Networks:
    """The roles that an objective may call as `F(x_t, t, c)`, with a second time as `F(x_t, t, c, s)`, and what goes with them.

    student: the network that is trained; it builds a graph. reference (theta-minus, an average) and teacher (frozen,
        pretrained): asked without gradients.
    further: the networks that the method declares, by name; they are trained too.
    frozen: all of these by name with their weights held. Gradients pass through to the input, and reach no weight.
    null: the one-row null condition of guidance. guide: makes one answer of those with and without caption, by a scale.
    guided_at_once: whether a guided teacher is asked for both in one pass.
    round_time: rounds times to what the backbone sees, so that secants divide by the step that the network saw.
    time_shift: that of the grid on which the model is sampled.
    """

    student: Field
    reference: Field
    teacher: Field
    null: Condition | None = None
    guide: Callable[[Tensor, Tensor, float], Tensor] = guide
    transport: Transport = LINEAR
    round_time: Callable[[Tensor], Tensor] = exact_time
    time_shift: float = 1.0
    guided_at_once: bool = False
    further: Mapping[str, Field] = field(default_factory=dict)
    frozen: Mapping[str, Field] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch: data `x` (B, ...) and conditions `c`.

    rows (B,): their numbers within the global batch of `total` rows. What a row is used for, its random numbers and its
        following row depend on its number alone, so micro-batches, accumulation and several processes change nothing.
    progress: how far the run has come, in [0, 1]. turn: how many steps it has taken.
    following: when called, each row's condition of the next row of the global batch (of the last row, the first's), without a
        graph: prompts of other pictures. None where there is no other row.
    """

    x: Tensor
    c: Condition
    random: RowRandom
    rows: Tensor
    total: int
    progress: float = 0.0
    turn: int = 0
    following: Callable[[], Condition] | None = None

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
    """`total` is the student's loss, `further` those of the further networks, and `terms` are detached scalars to show.

    All are this micro-batch's part of the global batch's loss: a mean over rows divides by `batch.total`, not by the rows at
    hand. Added up over micro-batches they are the losses of the step. A role without a graph in its loss is not stepped: so a
    method says whose turn it is.
    """

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    further: dict[str, Tensor] = field(default_factory=dict)

    @property
    def everything(self) -> Tensor:
        """What to differentiate: every role's loss reaches the weights of that role alone.

        Conditions may have a graph, where the student's text encoder is trained: further losses take them detached.
        """
        return sum(self.further.values(), self.total)


@dataclass(frozen=True)
class Further:
    """A network that a method trains beside the student, as data: what it is, and how its optimizer differs.

    kind: a "field" starts as the pretrained model and answers like it. A "judge" is small heads on features of another role; it
        answers logits (B, N), one for each head and token.
    on: the role whose features a judge reads, "teacher" or a further field, which then learns from the judge's loss as well.
    depths: which of that role's blocks, as shares of their number. rate: its learning rate over the student's. betas: of
        its optimizer.
    """

    name: str
    kind: Literal["field", "judge"] = "field"
    on: str = "teacher"
    depths: tuple[float, ...] = (0.5,)
    rate: float = 1.0
    betas: tuple[float, float] | None = None


@dataclass(frozen=True)
class Objective(ABC):
    """A training method: a frozen dataclass whose fields are its settings. A method overrides below what is otherwise for it.

    sampler: how the method's paper samples: kappa, rho and order of `sampler.sample`. longer: the same by the number of steps
        from which on it samples otherwise.
    keeps_sampling: whether its model takes as many steps as before; most methods make one for few.
    """

    citation: ClassVar[str]
    sampler: ClassVar[dict[str, float]]
    longer: ClassVar[dict[int, dict[str, float]]] = {}
    keeps_sampling: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """ValueError for a field of type `Literal` that has none of its values."""
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                names = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {names}, got {getattr(self, name)!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The roles called beside the student, "reference" (EMA) and "teacher"; "second_time" where one is asked with it."""
        return ()

    @property
    def further(self) -> tuple[Further, ...]:
        """The networks trained beside the student."""
        return ()

    @property
    def needs_pictures(self) -> bool:
        """Whether `batch.x` is read; else prompts alone train it."""
        return True

    @property
    def scheduled(self) -> bool:
        """Whether the loss depends on `batch.progress`: then a short run is not the beginning of a longer one."""
        return False

    @property
    def condition_shift(self) -> tuple[float, float] | None:
        """The (a, b) by which conditions are shifted (Eq. 16), where they are."""
        return None

    def check_rows(self, total: int) -> None:
        """ValueError where a global batch of `total` rows leaves none for a part of the loss, which would then never be taken."""
        return

    def for_model(self, shift: tuple[float, float], scale: float, lora: bool, given: Mapping[str, Any]) -> Objective:
        """The same with the fields that a recipe has not `given` set to what suits the model, tuned whole or as a `lora`.

        shift: (a, b) of its family. scale: the guidance at which its teacher is drawn. Where that is 1, guidance is in the
        teacher's weights already (FLUX.1, FLUX.2 [klein] distilled, SANA-Sprint, Z-Image-Turbo, LCM-SDXL), and none is added.
        """
        if scale != 1:
            return self
        none = guided(self, 1.0)
        said = {one for one in none if "guidance" in (given if one == "guidance" else given.get(one, ()))}
        return replace(self, **{one: value for one, value in none.items() if one not in said})

    @classmethod
    def sampling(cls, steps: int) -> dict[str, Any]:
        """How the method's paper samples in so many steps; a saved student says it of those that it is drawn in."""
        reached = [least for least in cls.longer if least <= steps]
        return cls.longer[max(reached)] if reached else cls.sampler

    @abstractmethod
    def __call__(self, networks: Networks, batch: Batch, memory: MutableMapping[str, Tensor]) -> Losses:
        """Losses of one micro-batch. `memory` keeps tensors between steps and is saved with the checkpoint."""


def guided(objective: Objective, scale: float) -> dict[str, Any]:
    """The fields of a method, with their values, that train guidance of `scale` into it: its `guidance`, and settings that have
    a `guidance` of their own. {} where it knows none."""
    found: dict[str, Any] = {}
    for one in fields(objective):
        value = getattr(objective, one.name)
        if one.name == "guidance":
            found["guidance"] = scale
        elif is_dataclass(value) and not isinstance(value, type) and any(f.name == "guidance" for f in fields(value)):
            found[one.name] = replace(value, guidance=scale)
    return found


def objectives() -> dict[str, type[Objective]]:
    """The table of methods by the name that a recipe gives: one line each."""
    from apexflow.objectives.apex import APEX
    from apexflow.objectives.cm import CM
    from apexflow.objectives.ctm import CTM
    from apexflow.objectives.dmd2 import DMD2
    from apexflow.objectives.flow_matching import FlowMatching
    from apexflow.objectives.lcm import LCM
    from apexflow.objectives.meanflow import MeanFlow
    from apexflow.objectives.pcm import PCM
    from apexflow.objectives.rcgm import RCGM
    from apexflow.objectives.sana_sprint import SanaSprint
    from apexflow.objectives.scm import SCM
    from apexflow.objectives.twinflow import TwinFlow
    from apexflow.objectives.ucgm import UCGM

    return {
        "apex": APEX,
        "flow_matching": FlowMatching,
        "cm": CM,
        "scm": SCM,
        "ucgm": UCGM,
        "lcm": LCM,
        "pcm": PCM,
        "ctm": CTM,
        "meanflow": MeanFlow,
        "rcgm": RCGM,
        "twinflow": TwinFlow,
        "dmd2": DMD2,
        "sana_sprint": SanaSprint,
    }
