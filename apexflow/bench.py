"""What a model costs here: latency and throughput of sampling (the paper's Table 1), and the time of a training step."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from apexflow.data.scenes import scenes
from apexflow.data.shards import write_scenes
from apexflow.devices import device_name
from apexflow.errors import UserError
from apexflow.generator import Generator, load
from apexflow.progress import Progress
from apexflow.training.config import Data, Recipe, Tuning
from apexflow.training.loop import start
from apexflow.training.run import Run
from apexflow.training.step import training_step

PROMPT = "a photo of a red star left of a blue circle"
METHODS = ("flow_matching", "apex")
# A call is repeated at least so often and for so many seconds, but not after so many.
LEAST, ENOUGH, MOST = 3, 2.0, 10.0
STEPS = 5  # training steps that are measured, after two that are not


@dataclass(frozen=True)
class Case:
    """A model and how it is sampled; what is None comes from the model's settings."""

    model: str
    steps: int | None = None
    guidance: float | None = None

    @classmethod
    def read(cls, text: str) -> Case:
        """From MODEL[:STEPS[:GUIDANCE]]; UserError where it does not look so."""
        try:
            match text.split(":"):
                case [model]:
                    return cls(model)
                case [model, steps]:
                    return cls(model, int(steps))
                case [model, steps, guidance]:
                    return cls(model, int(steps), float(guidance))
        except ValueError:
            pass
        raise UserError(f"{text!r} must look like MODEL:STEPS:GUIDANCE, for example mini-teacher:50:2.5")


def bench(
    cases: Sequence[Case], batch: int, size: int | None, device: str, tuning: Literal["full", "lora"] | None = None
) -> dict[str, Any]:
    """Latency and throughput of every case, the gains over the first, and a training step of the first model by `tuning`."""
    models = {case.model: load(case.model, device) for case in cases}
    named = {_name(case, models[case.model]): (models[case.model], case) for case in cases}
    result = {"device": device_name(), "batch": batch, "rows": sampling_speed(named, batch, size)}
    if tuning is not None:
        result["training"] = training_speed(cases[0].model, tuning, batch, size, device)
    return result


def sampling_speed(
    cases: Mapping[str, tuple[Generator, Case]], batch: int, size: int | None = None
) -> dict[str, dict[str, float]]:
    """By name: network evaluations a picture, seconds of one picture alone, pictures a second of `batch` at once, text encoder
    and decoder included, and how many times faster than the first case."""
    rows: dict[str, dict[str, float]] = {}
    with Progress("timing", 2 * len(cases)) as progress:
        for name, (generator, case) in cases.items():
            taken = []
            for count in (1, batch):
                taken.append(_draw_seconds(generator, case, count, size))
                progress.advance(note=name)
            rows[name] = {
                "evaluations": generator.evaluations,
                "latency_s": taken[0],
                "throughput_per_s": batch / taken[1],
            }
    first = next(iter(rows.values()))
    for row in rows.values():
        row["speedup_latency"] = first["latency_s"] / row["latency_s"]
        row["speedup_throughput"] = row["throughput_per_s"] / first["throughput_per_s"]
    return rows


def training_speed(model: str, tuning: str, batch: int, size: int | None, device: str) -> dict[str, Any]:
    """Seconds of a training step by flow matching and by APEX with the same rows, and their ratio."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = {method: begin(method, tuning, model, batch, Path(scratch), size, device) for method in METHODS}
        seconds = step_seconds(runs, STEPS)
    return {"model": model, "tuning": tuning, "seconds": seconds, "ratio": seconds["apex"] / seconds["flow_matching"]}


def begin(
    method: str, tuning: Any, model: str, batch: int, folder: Path, size: int | None = None, device: str = "auto"
) -> Run:
    """A run before its first step, on scenes; all that it writes stays in `folder`."""
    source = folder / "scenes"
    if not source.is_dir():
        write_scenes(scenes(batch, seed=1), source)  # a large model encodes no more than a step reads
    return start(
        Recipe(
            output=str(folder / f"{method}-{tuning}"),
            method=method,
            model=model,
            data=Data(source=str(source), cache=str(folder / "cache"), size=size),
            batch=batch,
            tuning=Tuning(kind=tuning),
            device=device,
        ),
        resume=False,
    )


def step_seconds(runs: Mapping[str, Run], steps: int) -> dict[str, float]:
    """Median seconds a step, the runs taking turns, so that a noisy machine slows all."""
    measured: dict[str, list[float]] = {name: [] for name in runs}
    with Progress("timing training steps", (steps + 2) * len(runs)) as progress:
        for index in range(steps + 2):
            for name, run in runs.items():
                taken = _seconds(partial(training_step, run))
                progress.advance(note=name)
                if index >= 2:
                    measured[name].append(taken)
    return {name: statistics.median(values) for name, values in measured.items()}


def bench_table(result: Mapping[str, Any]) -> str:
    """The result of `bench` as text."""
    width = max(map(len, result["rows"]))
    lines = [f"{result['device']}; throughput at batch {result['batch']}"]
    for name, row in result["rows"].items():
        lines.append(
            f"{name:{width}}  NFE {row['evaluations']:3}  {row['latency_s'] * 1e3:8.1f} ms  "
            f"{row['throughput_per_s']:7.1f} pictures/s  {row['speedup_latency']:.1f} times faster by latency, "
            f"{row['speedup_throughput']:.1f} by throughput"
        )
    if "training" in result:
        step, rows = result["training"], result["batch"]
        plain, apex = (step["seconds"][method] for method in METHODS)
        lines.append(
            f"a training step of {step['model']} ({step['tuning']}, {rows} rows): flow matching {plain:.3f} s, "
            f"APEX {apex:.3f} s, {step['ratio']:.2f} times"
        )
    return "\n".join(lines)


def _name(case: Case, generator: Generator) -> str:
    settings = generator.backbone.settings
    steps = len(generator.times(case.steps)) - 1
    guidance = settings.guidance if case.guidance is None else case.guidance
    return f"{case.model}, {steps} step{'s' * (steps != 1)}" + f", guidance {guidance:g}" * (guidance != 1)


def _draw_seconds(generator: Generator, case: Case, count: int, size: int | None) -> float:
    """Median seconds of one `generate` call, after one of a single step that warms up.

    Each call has prompts of its own: those of the last are not encoded again where text encoder and network take turns.
    """
    generator.generate([PROMPT] * count, 1, 0, size, case.guidance)
    measured: list[float] = []
    while sum(measured) < MOST and (len(measured) < LEAST or sum(measured) < ENOUGH):
        seed = len(measured)
        prompts = [f"{PROMPT} {seed} {index}" for index in range(count)]
        measured.append(_seconds(partial(generator.generate, prompts, case.steps, seed, size, case.guidance)))
    return statistics.median(measured)


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
