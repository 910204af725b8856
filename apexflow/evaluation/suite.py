"""What a benchmark is to the runner: its prompts, where their pictures lie, the score of a picture, and the sums."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from apexflow.data.pictures import PICTURES
from apexflow.errors import UserError
from apexflow.evaluation.judge import Ask

Row = dict[str, Any]


@dataclass(frozen=True)
class EvaluationSettings:
    """What moves a score beside the model and the scorers: all of it goes into the report. How it is drawn, from `steps` to
    `order`, is the model's own where it is None, and the report has what that was."""

    suite: str = "mini-geneval"
    steps: int | None = None
    guidance: float | None = None
    kappa: float | None = None
    rho: float | None = None
    order: int | None = None
    per_prompt: int | None = None  # None: what the suite asks for
    seed: int = 0
    limit: int | None = None  # only this many prompts: a quick look, marked incomplete
    size: int | None = None  # side of a picture in pixels; None: the model's own


@dataclass(frozen=True)
class Tools:
    """The user's files and servers that scoring needs. docs/evaluation.md says which suite needs which."""

    data: Path | None = None  # the benchmark's own prompts, questions or pictures
    detector: Path | None = None
    clip: Path | None = None
    inception: Path | None = None
    reference: Path | None = None
    judge: str | Ask | None = None  # an OpenAI-compatible address, a folder, or a callable
    judge_model: str | None = None
    protocol: str | None = None
    fid_size: int | None = None  # side in pixels at which FID looks at pictures; None: theirs
    device: str = "cpu"

    @cached_property
    def known(self) -> dict[Any, Any]:
        """What suites have read and computed with these tools, for the next number of steps or seed: their files must stay."""
        return {}


@dataclass(frozen=True)
class Prompt:
    """`index` is its place in the whole suite: with the seed it decides the noise, whatever else is drawn."""

    index: int
    text: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Drawing:
    """One picture file: its place below the pictures folder, and the noise index of each sample in it (1, or 4 for a grid)."""

    path: str
    text: str
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Picture:
    """A picture to score: its name below the pictures folder, and the metadata of its prompt."""

    name: str
    path: Path
    metadata: Mapping[str, Any]


@dataclass
class Found:
    """What a folder holds of a suite: pictures to score, names of those that lack, and of those that do not belong."""

    pictures: list[Picture] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)


class Suite(ABC):
    """A benchmark: which prompts, where their pictures lie, how a picture is scored, and the sums. One file each in `suites/`."""

    pictures_a_prompt: ClassVar[int] = 4  # officially
    allowed: ClassVar[tuple[int, ...]] = ()  # other numbers do not fit the layout; empty: any does
    spread_limit: ClassVar[bool] = True  # a limited run takes prompts from everywhere, or the first ones
    measures_diversity: ClassVar[bool] = False
    takes: ClassVar[tuple[str, ...]] = ()  # the names of the tools that it uses; any other is refused

    def __init__(self, tools: Tools, per_prompt: int | None = None) -> None:
        self.tools = tools
        self.per_prompt = self.pictures_a_prompt if per_prompt is None else per_prompt
        if self.allowed and self.per_prompt not in self.allowed:
            numbers = " or ".join(map(str, self.allowed))
            raise UserError(f"{self.per_prompt} pictures per prompt do not fit this suite: use {numbers}")

    @abstractmethod
    def prompts(self) -> list[dict[str, Any]]:
        """The metadata of every prompt, each with its text under "prompt"."""

    @abstractmethod
    def drawings(self, prompts: Sequence[Prompt]) -> list[Drawing]:
        """The picture files of the official folder layout."""

    @abstractmethod
    def find(self, folder: Path, prompts: Sequence[Prompt]) -> Found:
        """What of the prompts' pictures lies in a folder, whoever drew them."""

    @abstractmethod
    def score(self, pictures: Sequence[Picture], work: Path) -> Iterator[Row]:
        """One row a picture, with its name under "filename"; one that cannot be scored has only that and "error"."""

    @abstractmethod
    def aggregate(self, rows: Sequence[Mapping[str, Any]], work: Path) -> dict[str, Any]:
        """The sums of at least one row: "tasks" {name: value}, "overall" (None where there is none), its standard error
        "overall_se" where that is known, and what else the suite reports. Over seeds every number is averaged."""

    def check(self) -> None:
        """UserError for a scorer that is not named or not there, before anything is drawn."""
        return

    def notes(self, prompts: Sequence[Prompt]) -> dict[str, str]:
        """Text files that belong into the pictures folder, by path."""
        return {}

    def settings(self) -> dict[str, Any]:
        """What of the scorers moves the score."""
        return {}

    def choose(self, limit: int | None) -> tuple[list[Prompt], bool]:
        """The prompts to use, and whether these are all."""
        prompts = [Prompt(index, data["prompt"], data) for index, data in enumerate(self.prompts())]
        if limit is None or limit >= len(prompts):
            return prompts, True
        if self.spread_limit:
            return [prompts[index * len(prompts) // limit] for index in range(limit)], False
        return prompts[:limit], False


def prompts_sha256(prompts: Sequence[Mapping[str, Any]]) -> str:
    """Of the prompts as JSON lines: for GenEval's own that is the sha256 of its evaluation_metadata.jsonl."""
    return hashlib.sha256("".join(f"{json.dumps(dict(data))}\n" for data in prompts).encode()).hexdigest()


def needs(value: Path | None, option: str, what: str, is_there: Callable[[Path], bool] = Path.exists) -> Path:
    """The path that the user gave for a scorer; UserError when there is none or nothing lies there."""
    if value is None:
        raise UserError(f"{option} is missing: give {what}; docs/evaluation.md says where to get it")
    if not is_there(value):
        raise UserError(f"{option} {value} does not exist: give {what}; docs/evaluation.md says where to get it")
    return value


class OneFileEach(Suite):
    """A suite of one file a prompt, named after it, which holds all of the prompt's samples, unless `files` says otherwise."""

    @abstractmethod
    def name_of(self, prompt: Prompt) -> str:
        """The name of a prompt's file."""

    def files(self, prompt: Prompt) -> list[Drawing]:
        """The files of a prompt."""
        first = prompt.index * self.per_prompt
        return [Drawing(self.name_of(prompt), prompt.text, tuple(range(first, first + self.per_prompt)))]

    def drawings(self, prompts: Sequence[Prompt]) -> list[Drawing]:
        return [drawing for prompt in prompts for drawing in self.files(prompt)]

    def find(self, folder: Path, prompts: Sequence[Prompt]) -> Found:
        """Pictures of any format. A second one of the same stem is extra."""
        there: dict[str, Path] = {}
        found = Found()
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in PICTURES and not path.name.startswith("."):
                stem = path.name.split(".")[0]
                if stem in there:
                    found.extra.append(path.name)
                there.setdefault(stem, path)
        wanted = [(drawing.path, prompt) for prompt in prompts for drawing in self.files(prompt)]
        for name, prompt in wanted:
            path_of = there.pop(name.split(".")[0], None)
            if path_of is None:
                found.missing.append(name)
            else:
                found.pictures.append(Picture(path_of.name, path_of, prompt.metadata))
        found.extra += [path.name for path in there.values()]
        return found
