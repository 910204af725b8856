"""Prompts -> pictures -> scores -> one report, the same way for every suite; resumable, each picture from its own seed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from apexflow.data.cache import to_tensor
from apexflow.errors import UserError
from apexflow.evaluation import mini_geneval
from apexflow.generator import MAX_BATCH, Generator
from apexflow.progress import Progress

Row = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """A benchmark: its prompts with metadata, the score of one picture, and the summary of all rows."""

    prompts: Callable[[], list[dict[str, Any]]]
    score: Callable[[Image.Image, Mapping[str, Any]], Row]
    aggregate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


SUITES = {
    "mini-geneval": Suite(mini_geneval.prompts, mini_geneval.score_picture, mini_geneval.aggregate),
    "mini-geneval-held-out": Suite(mini_geneval.held_out_prompts, mini_geneval.score_picture, mini_geneval.aggregate),
}


@dataclass(frozen=True)
class Settings:
    """What moves a score beside the model: all of it goes into the report."""

    suite: str = "mini-geneval"
    steps: int | None = None
    guidance: float | None = None
    kappa: float = 0.0
    rho: float = 0.0
    order: int = 1
    per_prompt: int = 4
    seed: int = 0
    limit: int | None = None  # only this many prompts, evenly spread: a quick look, marked incomplete


def evaluate(
    generator: Generator, settings: Settings, folder: Path | None = None, name: str = "model"
) -> dict[str, Any]:
    """Generate and score a suite; its report. With a folder, rows are kept there and an interrupted run goes on."""
    if settings.suite not in SUITES:
        raise UserError(f"unknown suite {settings.suite!r}; suites: {', '.join(SUITES)}")
    if settings.per_prompt < 1 or (settings.limit is not None and settings.limit < 1):
        raise UserError("per_prompt and limit must be at least 1")
    suite = SUITES[settings.suite]
    everything = suite.prompts()
    prompts = _spread(everything, settings.limit)
    jobs = [(index, copy) for index in range(len(prompts)) for copy in range(settings.per_prompt)]
    times = generator.times(settings.steps)
    rows = _read_rows(folder, settings) if folder else []
    pairs: dict[int, list[torch.Tensor]] = {}
    with Progress(f"{settings.suite}, {name}", len(jobs), len(rows)) as progress:
        for start in range(len(rows), len(jobs), MAX_BATCH):
            part = jobs[start : start + MAX_BATCH]
            pictures = generator.generate_seeded(
                [prompts[i]["prompt"] for i, _ in part],
                [(settings.seed, i * settings.per_prompt + copy) for i, copy in part],
                len(times) - 1,
                guidance=settings.guidance,
                kappa=settings.kappa,
                rho=settings.rho,
                order=settings.order,
            )
            fresh = [suite.score(picture, prompts[i]) for picture, (i, _) in zip(pictures, part, strict=True)]
            for (index, _), feature in zip(part, features(generator, pictures), strict=True):
                pairs.setdefault(index, []).append(feature)
            rows += fresh
            if folder:
                _append(folder, fresh)
            progress.advance(len(part))
    report = suite.aggregate(rows) | {
        "suite": settings.suite,
        "name": name,
        "steps": len(times) - 1,
        "evaluations": generator.evaluations,
        "guidance": generator.backbone.settings.guidance if settings.guidance is None else settings.guidance,
        "kappa": settings.kappa,
        "rho": settings.rho,
        "order": settings.order,
        "per_prompt": settings.per_prompt,
        "seed": settings.seed,
        "complete": len(prompts) == len(everything),
        "diversity": diversity(pairs),
    }
    if folder:
        write_json(folder / "report.json", report)
    return report


def _spread(prompts: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[index * len(prompts) // limit] for index in range(limit)]


@torch.no_grad()
def features(generator: Generator, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Pictures as the model's own autoencoder sees them, (B, features): where the distance between seeds is measured."""
    size = (pictures[0].height, pictures[0].width)
    images = torch.stack([to_tensor(picture, size) for picture in pictures])
    return generator.backbone.encode_images(images).flatten(1).cpu()


def diversity(pairs: Mapping[int, Sequence[torch.Tensor]]) -> float | None:
    """Mean distance between pictures of one prompt under different seeds, per feature; None with one picture a prompt."""
    distances = []
    for group in pairs.values():
        if len(group) > 1:
            stacked = torch.stack(list(group))
            distances.append(float(torch.pdist(stacked).mean()) / stacked.shape[1] ** 0.5)
    return sum(distances) / len(distances) if distances else None


def _identity(settings: Settings) -> dict[str, Any]:
    return {key: getattr(settings, key) for key in settings.__dataclass_fields__}


def _read_rows(folder: Path, settings: Settings) -> list[Row]:
    """Rows of an earlier, interrupted evaluation with the same settings; UserError if the folder holds another one."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "settings.json"
    if marker.is_file():
        if json.loads(marker.read_text()) != _identity(settings):
            raise UserError(f"{folder} holds an evaluation with other settings: choose another folder")
    elif any(folder.iterdir()):
        raise UserError(f"output {folder} exists and holds no evaluation: choose another folder")
    else:
        write_json(marker, _identity(settings))
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    path.write_text("".join(json.dumps(row) + "\n" for row in whole))
    return whole


def _append(folder: Path, rows: Sequence[Row]) -> None:
    with (folder / "results.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def over_seeds(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of several that differ by seed: means, and the standard error over seeds where there are several."""
    first = reports[0]
    if len(reports) == 1:
        return first
    mean = {key: _mean([r[key] for r in reports]) for key in ("overall", "strict", "images", "prompts", "diversity")}
    tasks = {tag: _mean([r["tasks"][tag] for r in reports]) for tag in first["tasks"]}
    overalls = torch.tensor([r["overall"] for r in reports], dtype=torch.float64)
    # Pictures within a seed and seeds among each other both vary; the larger of the two estimates is the honest one.
    pooled = _mean([r["overall_se"] for r in reports]) / len(reports) ** 0.5
    between = float(overalls.std() / len(reports) ** 0.5)
    return (
        first
        | mean
        | {
            "tasks": tasks,
            "strict_tasks": {tag: _mean([r["strict_tasks"][tag] for r in reports]) for tag in first["tasks"]},
            "overall_se": max(pooled, between),
            "pictures": sum(r["pictures"] for r in reports),
            "seed": [r["seed"] for r in reports],
        }
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
