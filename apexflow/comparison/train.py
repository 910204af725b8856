"""Training of a comparison: the sweep of learning rates, then each method to both budgets. What is finished is not repeated.

Each budget's result is that of a run of just its length. Where nothing in a run is timed by its length, one run passes both
budgets; else the larger budget has a run of its own, called `alone`. The sweep's run at the best rate is the first seed's run on
the budget in images, and is not trained again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from apexflow.comparison.cost import measure, seconds_a_step
from apexflow.comparison.plan import IMAGES, Plan
from apexflow.comparison.scores import quick_score
from apexflow.comparison.tables import counted
from apexflow.errors import Diverged, Stopped, is_taken
from apexflow.files import read_json, write_json
from apexflow.progress import console
from apexflow.training.config import Recipe
from apexflow.training.journal import read_metrics
from apexflow.training.loop import train

ALONE = "-alone"


def once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` answers, kept in a file: made once, whatever interrupts the rest."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return read_json(path, "a result of the comparison")


def costs(plan: Plan, names: list[str]) -> dict[str, dict[str, Any]]:
    """Memory of every method; UserError before any training if one cannot be taken."""
    return {name: once(plan.output / "costs" / f"{name}.json", partial(measure, plan, name)) for name in names}


def sweep(plan: Plan, name: str) -> dict[str, Any]:
    """Every learning rate on the budget in images: scores, seconds, the best rate (None where all diverged), which is that
    of the least distance where there is no score."""
    tried = {rate: _tried(plan, name, rate) for rate in plan.rates}
    whole = {rate: result for rate, result in tried.items() if "diverged" not in result}
    best = max(whole, key=lambda rate: (whole[rate].get("overall", 0), -whole[rate]["distance"]), default=None)
    for rate in set(plan.rates) - {best}:
        shutil.rmtree(swept_run(plan, name, rate), ignore_errors=True)
    return {
        "rate": best,
        "tried": {f"{rate:g}": result for rate, result in tried.items()},
        "seconds": sum(result["seconds"] for result in tried.values()),
        "seconds_a_step": min((result["seconds_a_step"] for result in whole.values()), default=None),
    }


def _tried(plan: Plan, name: str, rate: float) -> dict[str, Any]:
    """What came of one learning rate."""
    folder = swept_run(plan, name, rate)
    return once(folder.parent / f"{rate:g}.json", partial(_try, plan, name, rate, folder))


def swept_run(plan: Plan, name: str, rate: float) -> Path:
    """Where the sweep trains at a rate; gone once another rate is better, or the run has become the first seed's."""
    return plan.output / "sweep" / name / f"run-{rate:g}"


def _try(plan: Plan, name: str, rate: float, folder: Path) -> dict[str, Any]:
    result = _trained(plan.recipe_for(name, folder, rate, plan.steps), name)
    return result if "diverged" in result else result | quick_score(plan, name, folder / "model")


def stages(plan: Plan, name: str, steps: dict[str, int]) -> dict[str, str]:
    """By budget, the stage of training that gives its result, the smaller budget first."""
    if len(set(steps.values())) == 1:
        return dict.fromkeys(steps, IMAGES)
    first, second = sorted(steps, key=lambda budget: steps[budget])
    return {first: first, second: second if plan.nested(name, steps.values()) else second + ALONE}


def run_folder(folder: Path, stage: str) -> Path:
    """The run that a stage belongs to, below the folder of a method and seed."""
    own = folder / f"run-{stage}"  # taken over from the sweep, beside a shorter run for the budget in time
    return own if own.exists() else folder / f"run{ALONE * stage.endswith(ALONE)}"


def take_over(plan: Plan, name: str, rate: float, order: Sequence[str]) -> None:
    """Make the sweep's run at `rate` that of the first seed on the budget in images. order: the stages, the shorter first.

    A run that would pass the budget in time on its way is past it already: so that budget gets a run of its own, beside it.
    """
    swept, folder = swept_run(plan, name, rate), plan.output / "runs" / name
    stage = next(stage for stage in order if stage.startswith(IMAGES))
    past = stage == IMAGES and order[0] != IMAGES
    goal = folder / f"run-{stage}" if past else run_folder(folder, stage)
    if swept.exists() and not goal.exists() and not (folder / f"{stage}.json").exists():
        goal.parent.mkdir(parents=True, exist_ok=True)
        swept.rename(goal)
    shutil.rmtree(swept, ignore_errors=True)


def train_to_budgets(
    plan: Plan, name: str, rate: float, steps: dict[str, int], seed: int
) -> tuple[dict[str, dict[str, Any]], float]:
    """Results by budget, whose models are kept, and the seconds of it all. A run that diverges marks what it has not reached."""
    folder = plan.of_seed(plan.output / "runs" / name, seed)
    order = stages(plan, name, steps)
    if seed == plan.recipe.seed:
        take_over(plan, name, rate, list(order.values()))
    results: dict[str, dict[str, Any]] = {}
    runs: dict[Path, dict[str, Any]] = {}  # how far each run has come
    for budget, stage in order.items():
        run = run_folder(folder, stage)
        if "diverged" not in runs.get(run, {}):
            recipe = plan.recipe_for(name, run, rate, steps[budget], seed)
            runs[run] = once(folder / f"{stage}.json", partial(_stage, recipe, name, folder / f"model-{stage}"))
        results[budget] = runs[run]
    for run in runs:
        for spent in ("checkpoints", "model"):  # the models at each budget are kept beside the run
            shutil.rmtree(run / spent, ignore_errors=True)
    return results, sum(result["seconds"] for result in runs.values())


def _stage(recipe: Recipe, name: str, model: Path) -> dict[str, Any]:
    result = _trained(recipe, name)
    if "diverged" not in result:
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(Path(recipe.output) / "model", model)
    return result


def _trained(recipe: Recipe, name: str) -> dict[str, Any]:
    """Train, or go on with an interrupted run; a run that diverged is marked, not fatal."""
    folder = Path(recipe.output)
    begun = is_taken(folder)
    told = f"{counted(recipe.steps, 'step')} at learning rate {recipe.optimizer.learning_rate:g}, seed {recipe.seed}"
    console.print(f"{name}: {'on to ' if begun else ''}{told}")
    diverged = {}
    try:
        train(recipe, resume=begun)
    except Diverged as error:
        diverged = {"diverged": str(error)}
    except Stopped:
        raise Stopped("everything is saved; run the same command to resume") from None
    lines = read_metrics(folder)  # none, where the first step diverged
    spent = {"seconds": lines[-1]["seconds"], "seconds_a_step": seconds_a_step(lines)} if lines else {"seconds": 0.0}
    return {"steps": len(lines), "images": len(lines) * recipe.batch, **spent, **diverged}
