"""Scores of a comparison: a feature distance to true pictures, and diversity, at every number of evaluations; with them
mini-GenEval where the data are scenes, else the CLIP score if a CLIP is named."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from apexflow.comparison.plan import BASIS, TEACHER, Plan
from apexflow.comparison.prompts import held_out_prompts
from apexflow.data.cache import CachedSet
from apexflow.data.pictures import PICTURES
from apexflow.data.scenes import scenes
from apexflow.data.shards import groups
from apexflow.evaluation.drawing import features
from apexflow.evaluation.fid import fid_from_statistics, statistics
from apexflow.evaluation.files import open_picture
from apexflow.evaluation.runner import EvaluationSettings, Tools, evaluate, over_seeds
from apexflow.generator import MAX_BATCH, Generator, load
from apexflow.objectives import objectives

SIDE = 4  # latents are averaged to this many places a side: few enough features for some hundred pictures
MOST_TRUE, TRUE_SEED = 2000, 12
QUICK_SEED = 1000  # other noise than the comparison's own
GRID_PROMPTS, GRID_SEED = 8, 11
STRIP_SIDE = 128  # pixels of a picture in a strip at most: a page holds some hundred
OF_ALL = ("diversity", "evaluations", "pictures")
OF_SCENES = ("overall", "overall_se", "strict", "tasks")


def quick_score(plan: Plan, name: str, model: Path) -> dict[str, float]:
    """One picture a prompt, the mean over the plan's numbers of steps: what the sweep chooses by."""
    generator = load(str(model), plan.recipe.device)
    # As many pictures as are scored later, as far as each has a prompt of its own, which tells rates apart the most.
    limit = plan.limit and plan.limit * plan.per_prompt * plan.seeds
    reports = [score(plan, generator, own_sampler(plan, name, n), n, [QUICK_SEED], 1, limit) for n in plan.nfe]
    kept = [key for key in ("overall", "distance") if key in reports[0]]
    return {key: sum(report[key] for report in reports) / len(reports) for key in kept}


def score_at(plan: Plan, name: str, model: Callable[[], Generator], steps: int) -> dict[str, Any]:
    """A model at one number of steps, by its method's own sampler (`name` "teacher": the flow's), over the plan's seeds."""
    return score(plan, model(), own_sampler(plan, name, steps), steps, range(plan.seeds), plan.per_prompt, plan.limit)


def score(
    plan: Plan,
    generator: Generator,
    sampler: dict[str, Any],
    steps: int,
    seeds: Sequence[int],
    per_prompt: int,
    limit: int | None,
) -> dict[str, Any]:
    """The numbers of a comparison's row, without guidance: it is trained in where it can be."""
    suite, size, tools = _suite(plan, generator)
    reports, seen = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            folder = Path(scratch) / str(seed)
            settings = EvaluationSettings(
                suite, steps, 1.0, per_prompt=per_prompt, seed=seed, limit=limit, size=size, **sampler
            )
            reports.append(evaluate(generator, settings, folder, f"{steps} step{'s' * (steps > 1)}", tools))
            seen.append(_pictures_features(generator, folder / "pictures"))
            shutil.rmtree(folder)
    report = over_seeds(reports)
    mine = statistics(torch.cat(seen).numpy())
    kept = (*OF_SCENES, *OF_ALL) if plan.scenes else ("clip", *OF_ALL)
    return {key: report[key] for key in kept if key in report} | {
        "distance": fid_from_statistics(*mine, *true_statistics(str(plan.cache)))
    }


def _suite(plan: Plan, generator: Generator) -> tuple[str, int | None, Tools]:
    """What draws and scores: a suite's name, the side of its pictures (None: the model's own), and its files."""
    if plan.scenes:
        return "mini-geneval", None, Tools()
    tools = Tools(data=prompts_file(plan), clip=plan.clip, device=str(generator.backbone.device))
    return "own", CachedSet(plan.cache).size, tools


def own_sampler(plan: Plan, name: str, steps: int) -> dict[str, Any]:
    """What a method recommends to sample with in so many steps; for the teacher, what flow matching does."""
    return objectives()[BASIS if name == TEACHER else plan.entry(name)[0]].sampling(steps)


def _pictures_features(generator: Generator, folder: Path) -> Tensor:
    paths = sorted(path for path in folder.rglob("*") if path.suffix in PICTURES)
    parts = []
    for group in groups(paths, MAX_BATCH):
        pictures = [open_picture(path) for path in group]
        shape = generator.backbone.latent_shape((pictures[0].height, pictures[0].width))
        parts.append(pooled(features(generator, pictures).reshape(len(pictures), *shape)))
    return torch.cat(parts)


def pooled(latents: Tensor) -> Tensor:
    """(B, features): latents (B, C, h, w) averaged over at most SIDE x SIDE places."""
    height, width = (min(SIDE, length) for length in latents.shape[-2:])
    return adaptive_avg_pool2d(latents.float(), (height, width)).flatten(1)


@lru_cache(maxsize=1)
def true_statistics(cache: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the features of true pictures: the training set's, from its cache."""
    data = CachedSet(Path(cache))
    return _cached_statistics(data, range(min(len(data), MOST_TRUE)))


def true_pictures(plan: Plan, count: int) -> dict[str, Any]:
    """The distance of `count` other pictures of the training set: what FD says of true pictures, by their small number alone.

    Nothing where the set has too few beside those that everything is measured against.
    """
    data = CachedSet(plan.cache)
    others = np.arange(MOST_TRUE, len(data))
    if len(others) < count:
        return {}
    drawn = np.random.default_rng(TRUE_SEED).choice(others, count, replace=False)
    mine = _cached_statistics(data, drawn.tolist())
    return {"pictures": count, "distance": fid_from_statistics(*mine, *true_statistics(str(plan.cache)))}


def _cached_statistics(data: CachedSet, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    most = 256 if len(data.buckets) == 1 else 1  # latents of several shapes are not read at once
    return statistics(torch.cat([pooled(data.latents(group)) for group in groups(rows, most)]).numpy())


def draw_strips(plan: Plan, name: str, model: Callable[[], Generator], folder: Path) -> dict[str, Any]:
    """A row of pictures at one step, a prompt each, and a row of one prompt at every number of steps."""
    generator = model()
    shown, size = grid_prompts(plan), _suite(plan, generator)[1]
    folder.mkdir(parents=True, exist_ok=True)
    row = generator.generate(shown, 1, GRID_SEED, size, 1.0, **own_sampler(plan, name, 1))
    column = [
        generator.generate(shown[:1], steps, GRID_SEED, size, 1.0, **own_sampler(plan, name, steps))[0]
        for steps in plan.nfe
    ]
    for kind, pictures in (("prompts", row), ("nfe", column)):
        for index, picture in enumerate(pictures):
            if not plan.scenes:
                picture.thumbnail((STRIP_SIDE, STRIP_SIDE))
            picture.save(folder / f"{kind}-{index}.png")
    return {"prompts": len(row), "nfe": len(column)}


def strips(plan: Plan, label: str, kind: str) -> list[Path]:
    """The pictures of a row, in order."""
    folder = plan.output / "scores" / label / "strips"
    return sorted(folder.glob(f"{kind}-*.png"), key=lambda path: int(path.stem.rpartition("-")[2]))


def prompts_file(plan: Plan) -> Path:
    """Where the prompts are kept that are not mini-GenEval's."""
    return held_out_prompts(plan.cache, plan.held_out, plan.output)


def grid_prompts(plan: Plan) -> list[str]:
    """The prompts of the picture strips."""
    if plan.scenes:
        return [scene.caption for scene in scenes(GRID_PROMPTS, seed=GRID_SEED)]
    return [json.loads(line) for line in prompts_file(plan).read_text().splitlines()[:GRID_PROMPTS]]
