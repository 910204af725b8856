"""Prompts -> pictures -> scores -> one report, the same way for every suite. Both stages resume.

The folder of an evaluation holds `generation.json` (what drew the pictures), `pictures/` (in the suite's official
layout), `scoring.json` (what scored them), `results.jsonl` (a row a picture) and `report.json`.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from apexflow.backbones.parts import quiet
from apexflow.backbones.precision import compute_dtype
from apexflow.backbones.storage import stored_kind
from apexflow.data.fingerprint import fingerprint
from apexflow.data.workers import Share
from apexflow.errors import UserError
from apexflow.evaluation.drawing import EVALUATIONS, diversity, draw, pending
from apexflow.evaluation.files import is_whole
from apexflow.evaluation.scoring import Scored, score
from apexflow.evaluation.suite import EvaluationSettings, Found, Prompt, Suite, Tools, prompts_sha256
from apexflow.evaluation.suites import make_suite
from apexflow.files import make_folder, read_json, write_json
from apexflow.generator import Generator
from apexflow.locking import alone_in

VERSIONS = ("apexflow", "torch", "transformers", "diffusers", "numpy", "pillow")


def evaluate(
    generator: Generator,
    settings: EvaluationSettings,
    folder: Path | None = None,
    name: str = "model",
    tools: Tools | None = None,
    share: Share | None = None,
    with_scores: bool = True,
) -> dict[str, Any]:
    """Draw and score a suite; its report.

    With a folder, pictures and rows are kept there and an interrupted run goes on. With a `share`, this process draws
    its share, and the process that finds all pictures drawn scores them (under torchrun the first, which waits for the
    others): the others' reports say how many are "pending". Without scores, the pictures are drawn for a later `score_folder`.
    """
    if folder is None:
        if not with_scores or (share and share.world > 1):
            raise UserError(
                "pictures to be kept, or shared by several processes, need a folder: name one with --output"
            )
        with tempfile.TemporaryDirectory() as scratch:
            return evaluate(generator, settings, Path(scratch) / "evaluation", name, tools)
    share = share or Share()
    with_scores = with_scores and share.leads
    suite = _suite(settings, tools)
    if with_scores:
        suite.check()
    prompts, all_prompts = suite.choose(settings.limit)
    generation = _generation(generator, replace(settings, per_prompt=suite.per_prompt), prompts)
    _claim(folder, "generation.json", generation)
    draw(generator, settings, suite, prompts, folder, name, share)
    pictures = [folder / "pictures" / drawing.path for drawing in suite.drawings(prompts)]
    share.wait_for("drawn by all processes", pictures, is_whole)
    left = pending(suite, prompts, folder)
    if left or not with_scores:
        return {"suite": settings.suite, "name": name, "folder": str(folder), "pending": left}
    # Of processes that finish drawing together, the later finds everything scored.
    with alone_in(folder, "scoring", wait=True):
        drawn = {"name": name, "evaluations": read_json(folder / EVALUATIONS, "the evaluation", int)} | generation
        if suite.measures_diversity:
            drawn["diversity"] = diversity(generator, folder, suite.drawings(prompts), suite.per_prompt)
        return _score(suite, settings, prompts, all_prompts, folder / "pictures", folder, drawn)


def score_folder(
    images: Path,
    settings: EvaluationSettings,
    folder: Path | None = None,
    name: str = "pictures",
    tools: Tools | None = None,
) -> dict[str, Any]:
    """Score pictures that any program wrote in the suite's official layout; the report. `images` is never written to."""
    if not images.is_dir():
        raise UserError(f"no pictures folder at {images}: name one in the suite's official layout")
    if folder is None:
        with tempfile.TemporaryDirectory() as scratch:
            return score_folder(images, settings, Path(scratch) / "scores", name, tools)
    suite = _suite(settings, tools)
    suite.check()
    prompts, all_prompts = suite.choose(settings.limit)
    drawn: dict[str, Any] = {}
    record = images.parent / "generation.json"
    if record.is_file() and images.name == "pictures":  # drawn by `evaluate`
        drawn = read_json(record, "the evaluation")
        drawn["evaluations"] = read_json(images.parent / EVALUATIONS, "the evaluation", int)
    return _score(suite, settings, prompts, all_prompts, images, folder, {"name": name} | drawn)


def _suite(settings: EvaluationSettings, tools: Tools | None) -> Suite:
    if any(number is not None and number < 1 for number in (settings.per_prompt, settings.limit)):
        raise UserError("per_prompt and limit must be at least 1")
    return make_suite(settings.suite, tools or Tools(), settings.per_prompt)


def _score(
    suite: Suite,
    settings: EvaluationSettings,
    prompts: Sequence[Prompt],
    all_prompts: bool,
    images: Path,
    folder: Path,
    drawn: dict[str, Any],
) -> dict[str, Any]:
    quiet()
    found = suite.find(images, prompts)
    if not found.pictures:
        raise UserError(
            f"{images} holds no picture of the suite {settings.suite}: docs/evaluation.md shows the layout it needs"
        )
    scoring = {"suite": settings.suite, "limit": settings.limit, "per_prompt": suite.per_prompt} | suite.settings()
    own = images.resolve() == (folder / "pictures").resolve()
    _claim(folder, "scoring.json", scoring | ({} if own else {"pictures": str(images.resolve())}))
    scored = score(suite, found, folder, drawn["name"])
    report = suite.aggregate(scored.rows, folder) | drawn | _completeness(all_prompts, found, scored)
    unique = {str(picture.metadata): picture.metadata for picture in found.pictures}
    seen = [prompt.metadata for prompt in prompts] if _same(prompts, unique) else list(unique.values())
    report |= {"prompts_sha256": prompts_sha256(seen), "scoring": scoring, "versions": versions()}
    report |= {"suite": settings.suite, "per_prompt": suite.per_prompt}
    write_json(folder / "report.json", report)
    return report


def _same(prompts: Sequence[Prompt], found: Mapping[str, Any]) -> bool:
    return {str(prompt.metadata) for prompt in prompts} >= found.keys()


def _completeness(all_prompts: bool, found: Found, scored: Scored) -> dict[str, Any]:
    """What lacks is named and marks the report; no mean counts it as right or wrong."""
    trouble = found.missing or found.extra or scored.failed
    return {
        "complete": all_prompts and not trouble,
        "pictures": len(scored.rows),
        "missing": found.missing,
        "extra": found.extra,
        "failed": scored.failed,
    }


def _generation(generator: Generator, settings: EvaluationSettings, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Everything of the drawing that moves a score."""
    backbone = generator.backbone
    size = settings.size or backbone.default_size
    times = generator.times(settings.steps, (size, size))
    backbone.latent_shape((size, size))  # tells of a size that the model cannot draw before the folder is taken
    sampler = generator.sampler(settings.guidance, settings.kappa, settings.rho, settings.order)
    drawn = {
        "steps": len(times) - 1,
        "times": times.tolist(),
        "size": size,
        "weights": fingerprint(backbone.transformer, backbone.vae, backbone.text_encoder),
        "lora": [lora.told() for lora in generator.loras] or None,
        "storage": stored_kind(backbone.transformer),
        "dtype": str(compute_dtype(backbone.transformer)).removeprefix("torch."),
        "prompts_drawn_sha256": prompts_sha256([prompt.metadata for prompt in prompts]),
    }
    return asdict(settings) | sampler | drawn


def versions() -> dict[str, str]:
    """Of the libraries that a score may depend on."""
    return {name: importlib.metadata.version(name) for name in VERSIONS}


def _claim(folder: Path, marker: str, settings: dict[str, Any]) -> None:
    """Take a new folder, or go on in one with the same settings; UserError if it holds anything else."""
    make_folder(folder)
    # Listed before the marker is looked for: a process beside this one writes the marker first.
    foreign = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    path = folder / marker
    if path.is_file():
        before = read_json(path, "the evaluation")
        differs = [key for key in before | settings if before.get(key) != settings.get(key)]
        if differs:
            raise UserError(f"{folder} holds an evaluation with other {' and '.join(differs)}: choose another folder")
        return
    if foreign and not (folder / "generation.json").is_file():
        raise UserError(f"output {folder} exists and holds no evaluation: choose another folder")
    write_json(path, settings)


def over_seeds(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of several that differ by seed: means of every number that differs, and the standard error over seeds.

    A number that one seed lacks, its pictures being incomplete, the seeds together lack too; of what is not a number and
    differs the first seed's stands.
    """
    first = reports[0]
    if len(reports) == 1:
        return first
    merged = {key: _merged([report.get(key) for report in reports]) for key in first}
    merged["overall_se"] = None
    if merged["overall"] is not None:
        overalls = torch.tensor([report["overall"] for report in reports], dtype=torch.float64)
        # Pictures within a seed and seeds among each other both vary; the larger of the two estimates is the honest one.
        within = (_mean([r.get("overall_se") for r in reports]) or 0.0) / len(reports) ** 0.5
        merged["overall_se"] = max(within, float(overalls.std() / len(reports) ** 0.5))
    return merged | {
        "pictures": sum(r["pictures"] for r in reports),
        "complete": all(r["complete"] for r in reports),
        "missing": _of_seeds(reports, "missing"),
        "extra": _of_seeds(reports, "extra"),
        "failed": {f"seed-{r['seed']}/{name}": why for r in reports for name, why in r["failed"].items()},
        "seed": [r["seed"] for r in reports],
    }


def _merged(values: Sequence[Any]) -> Any:
    """What the seeds' reports have under one key: the mean of numbers, of each entry where they are tables of numbers."""
    if all(value == values[0] for value in values):
        return values[0]
    if all(_is_number(value) for value in values):
        return None if None in values else _mean(values)
    if all(isinstance(value, dict) and all(map(_is_number, value.values())) for value in values):
        return {tag: _mean([value.get(tag) for value in values]) for tag in dict.fromkeys(t for v in values for t in v)}
    return values[0]


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _of_seeds(reports: Sequence[dict[str, Any]], key: str) -> list[str]:
    return [f"seed-{report['seed']}/{name}" for report in reports for name in report[key]]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
