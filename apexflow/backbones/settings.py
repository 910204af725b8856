"""What a model folder says for apexflow, in `apexflow.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

from apexflow.errors import UserError
from apexflow.sampler import MOST_STEPS, check_times, shift_times, time_grid


def _grid(times: list[float] | None) -> list[float] | None:
    if times is not None:
        check_times(torch.tensor(times, dtype=torch.float64))
    return times


Finite = Annotated[float, Field(allow_inf_nan=False)]
Kappa = Annotated[Finite, Field(ge=0)]
Rho = Annotated[Finite, Field(ge=0, le=1)]
Order = Literal[1, 2]


class Sampler(TypedDict):
    """As of `sampler.sample`."""

    kappa: Kappa
    rho: Rho
    order: Order


@dataclass(frozen=True)
class Settings:
    """What a model folder may say for apexflow in `apexflow.json`; a stock folder without the file gets the defaults.

    steps, guidance, times: how the model is meant to be sampled (`times`: an explicit descending grid, or None).
    kappa, rho, order: its sampler at so many steps, as of `sampler.sample`; drawings in another number of steps take it too,
    unless `samplers` has theirs, by the number of steps from which on it holds.
    instruction: whether the family's instruction text is put before the prompt (SANA).
    max_tokens: prompts longer than this are cut. embedded_guidance: the scale fed to a network that takes one as an
    input (FLUX.1 dev, SANA-Sprint, LCM-SDXL); None is the family's own. card: recipe, seed, hardware, time and scores,
    for people.
    """

    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 20
    guidance: Finite = 1.0
    times: Annotated[list[float] | None, AfterValidator(_grid)] = None
    kappa: Kappa = 0.0
    rho: Rho = 0.0
    order: Order = 1
    samplers: dict[Annotated[int, Field(ge=1)], Sampler] = field(default_factory=dict)
    instruction: bool = True
    max_tokens: Annotated[int, Field(ge=1, le=2**20)] = 300
    size: Annotated[int | None, Field(ge=1, le=2**16)] = None
    embedded_guidance: Finite | None = None
    card: dict = field(default_factory=dict)

    def grid(self, steps: int, time_shift: float) -> torch.Tensor:
        """The times (steps + 1,) that so many steps visit: the model's own if it has as many, else even ones, shifted."""
        if self.times is not None and len(self.times) == steps + 1:
            return torch.tensor(self.times, dtype=torch.float64)
        return shift_times(time_grid(steps), time_shift)

    def sampler(self, steps: int) -> Sampler:
        """How it is drawn in so many steps; in its own number as `export` says it, too."""
        reached = [least for least in self.samplers if least <= steps and steps != self.steps]
        own = Sampler(kappa=self.kappa, rho=self.rho, order=self.order)
        return self.samplers[max(reached)] if reached else own


def without_second_time(settings: Settings) -> Settings:
    """How a student with a second time is drawn by those who know none: a stock pipeline, or what holds its LoRA alone.

    They ask at s = 0, for data. That is what our sampler asks for where noise follows (rho above 0), and in one step; in several
    along the path (rho = 0) it is not, so of those one is left, and no other sampler for more.
    """
    return replace(settings, steps=settings.steps if settings.rho > 0 else 1, samplers={})


def read_settings(folder: Path, defaults: Settings | None = None) -> Settings:
    """`apexflow.json` of a model folder over the family's `defaults`; UserError for a file that does not fit."""
    defaults, path = defaults or Settings(), folder / "apexflow.json"
    if not path.is_file():
        return defaults
    try:
        settings = replace(defaults, **json.loads(path.read_text()))
        return TypeAdapter(Settings).validate_python(asdict(settings))
    except (TypeError, ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise UserError(f"{path} does not fit this version of apexflow ({reason}): restore or delete it") from error


def write_settings(folder: Path, settings: Settings) -> None:
    """`apexflow.json` of a model folder."""
    (folder / "apexflow.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
