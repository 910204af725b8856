"""The demonstration: the shipped teacher becomes a one-step generator in minutes, scored and pictured before and after."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apexflow.backbones.folder import RECIPE
from apexflow.data.scenes import scenes
from apexflow.errors import UserError, is_taken
from apexflow.evaluation.runner import EvaluationSettings, evaluate
from apexflow.files import read_json, write_json
from apexflow.generator import Generator, load, picture_grid
from apexflow.locking import alone_in
from apexflow.reporting.report import write_report
from apexflow.training.config import Data, Preview, Recipe, short_recipe
from apexflow.training.loop import train
from apexflow.training.run import holds_run

PROMPTS = 120  # of 553: enough to see the change, few enough for five minutes
GRID = 32
GRID_SEED = 11


def demo_recipe(output: Path, minutes: float) -> Recipe:
    """The student's recipe (`recipes/mini-apex.yaml`), shortened, on freshly drawn scenes."""
    return short_recipe(
        str(output),
        objective={"path_weight": 0.0, "share": 1.0},
        data=Data(source="scenes", count=4000, seed=2),
        preview=Preview(every=100),
        steps=100_000,
        minutes=minutes,
        checkpoint_every=200,
    )


def run_demo(output: Path, minutes: float, force: bool = False) -> dict[str, Any]:
    """Tune, score, draw and report; paths and scores. UserError if the folder exists (unless `force`)."""
    if is_taken(output):
        if output.is_symlink():
            raise UserError(f"output {output} is a link, not a folder: give {output.resolve()}")
        if not force:
            raise UserError(
                f"output {output} exists: pass --force to replace the earlier demo, or choose another with -o"
            )
        if not holds_demo(output):
            raise UserError(
                f"output {output} holds something other than a demo, which --force would delete: choose another with -o"
            )
        with alone_in(output):
            shutil.rmtree(output)
    model = train(demo_recipe(output, minutes))
    teacher, student = load("mini-teacher"), load(str(model))
    one_step = EvaluationSettings(steps=1, guidance=1.0, per_prompt=2, limit=PROMPTS)
    cases = {
        "teacher, one step": (teacher, one_step),
        "student, one step": (student, one_step),
        "teacher, 50 steps, guided": (teacher, EvaluationSettings(per_prompt=1, limit=PROMPTS)),
    }
    scores = {name: evaluate(generator, settings, name=name) for name, (generator, settings) in cases.items()}
    prompts = [scene.caption for scene in scenes(GRID, seed=GRID_SEED)]
    grids = [
        (name, draw_grid(prompts, generator, settings, output / "grids" / f"{index}.png"))
        for index, (name, (generator, settings)) in enumerate(cases.items())
    ]
    write_json(output / "scores.json", scores)
    title = "apexflow demo: from a teacher to one-step pictures"
    report = write_report(output, scores, grids, title, prompts)
    return {"scores": scores, "report": str(report), "model": str(model)}


def holds_demo(folder: Path) -> bool:
    """Whether a folder is an earlier demo's, or what a run left that ended while it prepared."""
    if not holds_run(folder) or not (folder / RECIPE).is_file():
        return holds_run(folder)
    before, own = read_json(folder / RECIPE, "recipe"), demo_recipe(folder, 1.0).to_dict()
    return all(before.get(key) == own[key] for key in ("objective", "steps"))


def draw_grid(prompts: Sequence[str], generator: Generator, settings: EvaluationSettings, path: Path) -> Path:
    """The prompts from the same seeds for every case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(generator.generate(prompts, settings.steps, GRID_SEED, guidance=settings.guidance), scale=2).save(path)
    return path
