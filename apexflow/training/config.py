"""A recipe: dataclasses filled from YAML and command-line overrides, every unknown key refused."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, Field, PlainValidator, TypeAdapter, ValidationError

from apexflow.errors import UserError, check_built_in, quoted, suggest
from apexflow.objectives import Objective, objectives
from apexflow.sampler import MOST_STEPS
from apexflow.training.plain_yaml import NO_YAML, fault, read_yaml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

WARMUP = 20  # steps of a short recipe
NEVER = 10**9
Count = Annotated[int, Field(ge=1)]
SamplingSteps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Rows = Annotated[int, Field(ge=1, le=2**16)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
Text = Annotated[str, Field(min_length=1)]
Weight = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Parsed = TypeVar("Parsed", bound="DataclassInstance")


def _sources(value: Any) -> str | tuple[str, ...] | None:
    """What `data.source` names: one set or several. A list of one is that one."""
    if value is None:
        return None
    names = value if isinstance(value, list | tuple) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"Input should be a path, or a list of paths, got {value!r}")
    expanded = tuple(os.path.expanduser(name) for name in names)
    if twice := [name for place, name in enumerate(expanded) if Path(name) in map(Path, expanded[:place])]:
        raise ValueError(f"{twice[0]} is listed twice: list it once, and set its share with data.shares")
    return expanded[0] if len(expanded) == 1 else expanded


def _needs_no_files(suite: str) -> str:
    """A benchmark that any run can be scored with, by its name in the table: others ask for files that a recipe does not name."""
    from apexflow.evaluation.suites import SUITES

    able = [name for name, one in SUITES.items() if not one.takes and (not one.allowed or 1 in one.allowed)]
    if suite not in able:
        raise ValueError(f"Input should be {' or '.join(map(repr, able))}, which need no files, got {suite!r}")
    return suite


@dataclass(frozen=True)
class Data:
    """Where captioned pictures come from, and how they are cached; see docs/data.md.

    source: "scenes" (drawn, `count` from `seed`), a path to a dataset of any kind, a hub dataset, or a finished cache; or a
        list of these. If not given: the finished cache that `cache` names, else scenes.
    shares: the parts of the rows that come from each of several sources; by default in proportion to their sizes.
    count: how many scenes are drawn. seed: of these scenes.
    cache: the folder that keeps latents and embeddings, those of several sources in folders of their own; by default inside
        the output.
    size: side in pixels (by default the model's own, or that of the finished caches).
    buckets: keep aspect ratios; otherwise pictures are cropped to the center square.
    captions: the fields that hold the captions; by default those that docs/data.md lists.
    skip_limit: the largest share of unusable records or files that is skipped.
    held_out: pictures that are never trained on, at most a quarter of them: the last of each source, and of each bucket in
        proportion.
    """

    source: Annotated[str | tuple[str, ...] | None, PlainValidator(_sources)] = None
    shares: tuple[Weight, ...] = ()
    count: Count = 20000
    seed: Seed = 1
    cache: Name | None = None
    size: Count | None = None
    buckets: bool = False
    captions: tuple[str, ...] = ()
    skip_limit: Share = 0.05
    held_out: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.shares and not isinstance(self.source, tuple):
            raise ValueError("shares need several sources: make source a list of them, or leave shares out")
        if self.shares and len(self.shares) != len(self.parts):
            raise ValueError(f"shares has {len(self.shares)} numbers for {len(self.parts)} sources: give one for each")
        if self.shares and not any(self.shares):
            raise ValueError("shares are all 0: give a number above 0 for a source that is to be used")

    @property
    def parts(self) -> tuple[Data, ...]:
        """The same for each of several sources alone; itself where there is one."""
        several = self.source if isinstance(self.source, tuple) else None
        return (self,) if several is None else tuple(replace(self, source=one, shares=()) for one in several)

    @property
    def drawn(self) -> bool:
        """Of one source: whether the pictures are scenes, where no finished cache is named."""
        return self.source in (None, "scenes")

    @property
    def told(self) -> str:
        """The data as a message names them."""
        return ", ".join(str(one.source or one.cache or "scenes") for one in self.parts)


@dataclass(frozen=True)
class Tuning:
    """What is trained, and what the rest of the network is kept in.

    kind: all of the transformer ("full") or a LoRA.
    rank: that of the LoRA. alpha: the LoRA is scaled by alpha / rank; when not given, by 1.
    start: a LoRA that the student starts as: its file or folder; the teacher stays the base.
    text_encoder: whether the text encoder is trained too; with full tuning only.
    storage: of a LoRA's frozen base: 8 or 4 bits a weight; not with `parallel: fsdp`.
    checkpointing: compute activations again in backward; when not given, from half a billion parameters on.
    """

    kind: Literal["full", "lora"] = "full"
    rank: Count = 32
    alpha: Count | None = None
    start: Name | None = None
    text_encoder: bool = False
    storage: Literal["fp8", "nf4"] | None = None
    checkpointing: bool | None = None


@dataclass(frozen=True)
class Optimizer:
    """AdamW with warm-up and a schedule, and gradient clipping by norm.

    kind: "adamw8bit" keeps the moments in 8 bits; it needs bitsandbytes, and does not work with `parallel: fsdp`.
    learning_rate: of the student, at its peak; those of further networks are in proportion.
    betas: the decay of AdamW's two moments. weight_decay: as AdamW has it, apart from the gradient.
    warmup: steps over which the rate rises linearly to `learning_rate`.
    schedule: of the rate: constant, or a cosine decay to a fiftieth.
    clip_norm: the norm to which the gradient of each trained network is clipped.
    """

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    learning_rate: Positive = 1e-4
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    weight_decay: NotNegative = 0.0
    warmup: Annotated[int, Field(ge=0)] = 50
    schedule: Literal["constant", "cosine"] = "constant"
    clip_norm: Positive = 1.0


@dataclass(frozen=True)
class Preview:
    """Sample grids while training, at the step count that ships.

    every: steps between two grids; the last step has one too.
    steps: network evaluations per picture (twice that with guidance other than 1). guidance: of the pictures; 1: none.
    count: how many pictures of the data's captions are drawn, two of each.
    prompts: your own captions in place of the data's, two pictures of each.
    """

    every: Count = 200
    steps: SamplingSteps = 1
    guidance: float = 1.0
    count: Count = 16
    prompts: tuple[Text, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Everything that makes a run.

    output: the folder of the run: curves, grids, checkpoints, the model and the report.
    method: which objective is trained, by its name in the table of methods.
    objective: the fields of the method's own dataclass; what is not given keeps its default there.
    model: what the student starts as: a diffusers folder, a hub id, a built-in name, the folder of a finished run; or
        "miniature", which builds a small one from scratch.
    teacher: the frozen model to learn from, where it is not `model` itself; with full tuning only.
    data, tuning, optimizer, preview: a section of its own.
    steps: number of training steps. minutes: stop earlier, after a step, once this time is up.
    batch: rows per step over all processes, which share them equally.
    micro_batch: rows that a process computes at once; by default all of its own.
    caption_dropout: the share of the rows that are trained without their caption.
    ema_decay: of the weight average, which previews use and which is saved.
    seed: of all random numbers of the run.
    precision: "bf16" computes under autocast; what is trained stays in float32.
    device: "auto" is a CUDA GPU where there is one, else the CPU; or "cpu", "cuda" or "cuda:1".
    parallel: under torchrun, whole weights in each process (ddp) or shares of them (fsdp); auto shards what would not fit a GPU.
    checkpoint_every: steps between two checkpoints. keep: how many checkpoints are kept.
    bad_steps: non-finite steps in a row before the run stops; half of a shorter run.
    autoencoder_steps: how many steps the autoencoder is trained, where `model` is "miniature".
    text_encoder_steps: how many steps the text encoder is trained, where `model` is "miniature".
    sampling_steps: default steps of the saved model; if not given, as its previews, after flow matching as the original model.
    sampling_guidance: default guidance of the saved model; if not given, likewise.
    suite: a benchmark that needs no files ("mini-geneval"), by which the model is scored at the end for the report, one picture
        per prompt.
    """

    output: Name
    method: str = "apex"
    objective: dict[str, Any] = field(default_factory=dict)
    model: Name = "mini-teacher"
    teacher: Name | None = None
    data: Data = field(default_factory=Data)
    tuning: Tuning = field(default_factory=Tuning)
    optimizer: Optimizer = field(default_factory=Optimizer)
    preview: Preview = field(default_factory=Preview)
    steps: Count = 1000
    minutes: NotNegative | None = None
    batch: Rows = 32
    micro_batch: Rows | None = None
    caption_dropout: Share = 0.0
    ema_decay: BelowOne = 0.999
    seed: Seed = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    checkpoint_every: Count = 500
    keep: Count = 2
    bad_steps: Count = 20
    autoencoder_steps: Count = 2000
    text_encoder_steps: Count = 500
    sampling_steps: SamplingSteps | None = None
    sampling_guidance: float | None = None
    suite: Annotated[str, AfterValidator(_needs_no_files)] | None = None

    def __post_init__(self) -> None:
        if self.optimizer.kind == "adamw8bit" and self.parallel == "fsdp":
            raise ValueError("optimizer.kind=adamw8bit does not work with parallel=fsdp: its moments cannot be sharded")
        if self.tuning.storage and (self.tuning.kind != "lora" or self.parallel == "fsdp"):
            raise ValueError("tuning.storage needs tuning.kind=lora, and does not work with parallel=fsdp")
        if self.tuning.text_encoder and self.tuning.kind == "lora":
            raise ValueError("tuning.text_encoder needs tuning.kind=full")
        if self.tuning.start and self.tuning.kind != "lora":
            raise ValueError(
                "tuning.start needs tuning.kind=lora: to tune all weights merge it first (apexflow export --merge)"
            )
        if self.teacher and self.tuning.kind == "lora":
            raise ValueError("teacher needs tuning.kind=full: a LoRA learns from its own base")
        if self.teacher and self.model == "miniature":
            raise ValueError("teacher does not work with model=miniature, whose encoders are new: use a finished model")

    def build_objective(self) -> Objective:
        """The method's dataclass, filled from `objective`; UserError names a method or key that does not exist."""
        table = objectives()
        if self.method not in table:
            raise UserError(f"unknown method {self.method!r}{suggest(self.method, table)}; methods: {', '.join(table)}")
        return parse(table[self.method], self.objective, "objective")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def short_recipe(output: str, learning_rate: float = 1e-3, **own: Any) -> Recipe:
    """What the demonstration, the comparison and the ablations train: minutes on the miniature, for one step without guidance."""
    shared: dict[str, Any] = {
        "batch": 16,
        "optimizer": Optimizer(learning_rate=learning_rate, warmup=WARMUP),
        "preview": Preview(every=NEVER, count=1),
        "ema_decay": 0.98,
        "checkpoint_every": NEVER,
        "keep": 1,
        "sampling_steps": 1,
        "sampling_guidance": 1.0,
    }
    return Recipe(output, **shared | own)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from YAML, with overrides such as `optimizer.learning_rate=3e-4`; every mistake is a one-line UserError."""
    path = Path(path)
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not valid YAML{fault(error)}") from error
    if not isinstance(raw, dict):
        raise UserError(f"recipe {path} must be a mapping of keys to values")
    for override in overrides:
        _override(raw, override)
    recipe = parse(Recipe, raw, str(path))
    recipe.build_objective()
    if any(part.source == "scenes" for part in recipe.data.parts):
        check_built_in("scenes", "scenes that are drawn")
    if recipe.model == "miniature":
        check_built_in("miniature", "a small model that is built anew")
    return recipe


def _override(raw: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {quoted(override)} must look like key=value, for example steps=100")
    *path, last = key.split(".")
    for part in path:
        raw = raw.setdefault(part, {})
        if not isinstance(raw, dict):
            raise UserError(f"override {quoted(override)}: {part} is a value, not a section")
    raw[last] = _value(value, override)


def _value(text: str, override: str) -> Any:
    """What is given to a key; text where it is no YAML, as a path may be, or would lose what YAML takes for a comment."""
    try:
        read = read_yaml(text)
    except NO_YAML:
        return text
    except yaml.YAMLError as error:
        raise UserError(f"override {quoted(override)} cannot be read{fault(error)}") from error
    beyond = text.strip().removeprefix(read or "") if isinstance(read, str | None) else ""
    return text if beyond.lstrip().startswith("#") else read


def parse(kind: type[Parsed], raw: dict[str, Any], where: str) -> Parsed:
    """A dataclass from a mapping; unknown keys, wrong types and wrong ranges are one-line UserErrors."""
    _refuse_unknown(kind, raw, where)
    try:
        parsed = TypeAdapter(kind).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
        if first["type"] in ("dataclass_type", "dict_type"):  # pydantic speaks of instances of classes
            message = "Input should be a section of keys and their values"
        got = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r}"
        raise UserError(": ".join(filter(None, (where, key, message))) + got) from error
    for key in _truths(raw, asdict(parsed)):
        raise UserError(f"{where}: {key}: Input should be a number, got true or false")
    for key, number in _numbers(asdict(parsed)):
        if not math.isfinite(number):
            raise UserError(f"{where}: {key}: Input should be a finite number, got {number}")
    return parsed


def _numbers(values: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, float]]:
    """The floats of a parsed mapping by dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{section}{key}.")
        elif isinstance(value, float):
            yield f"{section}{key}", value


def _truths(given: Any, read: Any, key: str = "") -> Iterator[str]:
    """The dotted keys at which true or false was read as 1 or 0."""
    if isinstance(given, Mapping) and isinstance(read, Mapping):
        for name in given:
            yield from _truths(given[name], read.get(name), f"{key}.{name}".lstrip("."))
    elif isinstance(given, list | tuple) and isinstance(read, list | tuple):
        for place, (one, other) in enumerate(zip(given, read, strict=False)):
            yield from _truths(one, other, f"{key}.{place}")
    elif isinstance(given, bool) and isinstance(read, int | float) and not isinstance(read, bool):
        yield key


def _refuse_unknown(kind: Any, raw: Any, where: str) -> None:
    if not is_dataclass(kind) or not isinstance(raw, dict):
        return
    known = {f.name: f for f in fields(kind)}
    for key, value in raw.items():
        if key not in known:
            near = suggest(str(key), known) or _suggest_section(str(key), kind, raw)
            raise UserError(f"{where}: unknown key {key!r}{near}; known: {', '.join(known)}")
        factory = known[key].default_factory
        if isinstance(factory, type):
            _refuse_unknown(factory, value, f"{where}: {key}")
        elif callable(factory) and is_dataclass(value_type := type(factory())):
            _refuse_unknown(value_type, value, f"{where}: {key}")


def _suggest_section(word: str, kind: Any, raw: Mapping[str, Any]) -> str:
    """The same for a word that is known within a section of a dataclass, or to a recipe's method."""
    sections: dict[str, Any] = {f.name: f.default_factory for f in fields(kind) if is_dataclass(f.default_factory)}
    if kind is Recipe and (method := objectives().get(str(raw.get("method", Recipe.method)))):
        sections["objective"] = method
    places = {f.name: f"{name}.{f.name}" for name, section in sections.items() for f in fields(section)}
    near = difflib.get_close_matches(word, list(places), 1)
    return f", did you mean {places[near[0]]!r}?" if near else ""
