"""Training of a comparison: the sweep of learning rates, then each method to both budgets. What is finished is not repeated."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from apexflow.comparison.cost import measure, seconds_a_step
from apexflow.comparison.plan import BUDGETS, Plan
from apexflow.comparison.scores import quick_score
from apexflow.comparison.tables import counted
from apexflow.errors import Diverged, Stopped, is_taken
from apexflow.evaluation.files import read_json, write_json
from apexflow.progress import console
from apexflow.training.journal import read_metrics
from apexflow.training.loop import train


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
    """Every learning rate on a share of the budget: scores, seconds, the best rate (None where all diverged)."""
    tried = {rate: _tried(plan, name, rate) for rate in plan.rates}
    whole = {rate: result for rate, result in tried.items() if "diverged" not in result}
    best = max(whole, key=lambda rate: (whole[rate]["overall"], -whole[rate]["distance"]), default=None)
    return {
        "rate": best,
        "tried": {f"{rate:g}": result for rate, result in tried.items()},
        "seconds": sum(result["seconds"] for result in tried.values()),
        "seconds_a_step": min((result["seconds_a_step"] for result in whole.values()), default=None),
    }


def _tried(plan: Plan, name: str, rate: float) -> dict[str, Any]:
    """What came of one learning rate. Its run is thrown away, once that is written."""
    folder = plan.output / "sweep" / name
    result = once(folder / f"{rate:g}.json", partial(_try, plan, name, rate, folder / f"run-{rate:g}"))
    shutil.rmtree(folder / f"run-{rate:g}", ignore_errors=True)
    return result


def _try(plan: Plan, name: str, rate: float, folder: Path) -> dict[str, Any]:
    result = _trained(plan, name, folder, rate, plan.sweep_steps)
    return result if "diverged" in result else result | quick_score(plan, folder / "model")


def train_to_budgets(plan: Plan, name: str, rate: float, steps: dict[str, int]) -> dict[str, dict[str, Any]]:
    """One run to both budgets, the model kept at each; the smaller first. A run that diverges marks what it has not reached."""
    folder = plan.output / "runs" / name
    results: dict[str, dict[str, Any]] = {}
    for budget in sorted(BUDGETS, key=lambda budget: steps[budget]):
        if any("diverged" in result for result in results.values()):
            results[budget] = next(result for result in results.values() if "diverged" in result)
            continue
        made = folder / f"{budget}.json"
        results[budget] = once(made, partial(_stage, plan, name, rate, budget, steps[budget]))
    for spent in ("checkpoints", "model"):  # the models at each budget are kept beside the run
        shutil.rmtree(folder / "run" / spent, ignore_errors=True)
    return results


def _stage(plan: Plan, name: str, rate: float, budget: str, steps: int) -> dict[str, Any]:
    folder = plan.output / "runs" / name
    result = _trained(plan, name, folder / "run", rate, steps)
    if "diverged" not in result:
        shutil.rmtree(folder / f"model-{budget}", ignore_errors=True)
        shutil.copytree(folder / "run" / "model", folder / f"model-{budget}")
    return result


def _trained(plan: Plan, name: str, folder: Path, rate: float, steps: int) -> dict[str, Any]:
    """Train, or go on with an interrupted run; a run that diverged is marked, not fatal."""
    recipe = plan.recipe_for(name, folder, rate, steps)
    console.print(f"{name}: {counted(steps, 'step')} at learning rate {rate:g}")
    diverged = {}
    try:
        train(recipe, resume=is_taken(folder))
    except Diverged as error:
        diverged = {"diverged": str(error)}
    except Stopped:
        raise Stopped("everything is saved; the same command goes on from here") from None
    lines = read_metrics(folder)  # none, where the first step diverged
    spent = {"seconds": lines[-1]["seconds"], "seconds_a_step": seconds_a_step(lines)} if lines else {"seconds": 0.0}
    return {"steps": len(lines), "images": len(lines) * recipe.batch, **spent, **diverged}
