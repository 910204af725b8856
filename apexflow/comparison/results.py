"""The comparison from start to end: what was trained and scored, as one JSON, one table in markdown and one page."""

from __future__ import annotations

import json
import shlex
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

from apexflow.comparison.page import write_page
from apexflow.comparison.plan import BASIS, BUDGETS, IMAGES, TEACHER, TIME, Plan, needed
from apexflow.comparison.scores import draw_strips, score_at
from apexflow.comparison.tables import markdown
from apexflow.comparison.train import costs, once, sweep, train_to_budgets
from apexflow.errors import UserError, is_taken, writing
from apexflow.evaluation.files import read_json, write_json, write_text
from apexflow.generator import load
from apexflow.progress import console


def run_comparison(plan: Plan) -> dict[str, Any]:
    """Carry out a plan, or what an earlier run has left of it; the results, which are also written to `plan.output`.

    UserError for a folder that holds another comparison, and for a method that the backbone cannot take.
    """
    _claim(plan)
    names = needed(plan.methods)
    held = costs(plan, names)
    swept = {name: sweep(plan, name) for name in names}
    first = swept[plan.methods[0]]["seconds_a_step"]
    rows: dict[str, Any] = {TEACHER: {"budgets": {IMAGES: _scores(plan, TEACHER, TEACHER, plan.recipe.model)}}}
    for name in names:
        tried = swept[name]
        rows[name] = {"sweep": tried, "further": held[name]["further"], "rate": tried["rate"]}
        if tried["rate"] is not None:
            rows[name] |= _to_budgets(plan, name, tried, first)
        rows[name]["diverged"] = _diverged(rows[name])
        console.print(f"{name}: {_summary(rows[name])}")
    for name in names:
        rows[name] |= _relative(rows, held, name)
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    results = {"plan": plan.identity(), "teacher": plan.recipe.model, "rows": rows, "command": command}
    write_json(plan.output / "results.json", results)
    write_text(plan.output / "results.md", markdown(results))
    results["report"] = str(write_page(plan, results))
    return results


def _claim(plan: Plan) -> None:
    """Take a new folder, or go on with the same comparison."""
    marker = plan.output / "plan.json"
    if marker.is_file():
        before, now = read_json(marker, "the comparison"), _as_json(plan)
        if differs := [key for key in now if before.get(key) != now[key]]:
            raise UserError(
                f"{plan.output} holds a comparison with other {' and '.join(differs)}: choose another folder with -o"
            )
        return
    if is_taken(plan.output):
        raise UserError(f"output {plan.output} exists and holds no comparison: choose another folder with -o")
    with writing(plan.output):
        plan.output.mkdir(parents=True, exist_ok=True)
    write_json(marker, _as_json(plan))


def _as_json(plan: Plan) -> dict[str, Any]:
    return json.loads(json.dumps(plan.identity()))


def _to_budgets(plan: Plan, name: str, tried: dict[str, Any], first: float | None) -> dict[str, Any]:
    """Train to both budgets and score each; the budget in time is what the first method needs for the images."""
    ratio = (first or tried["seconds_a_step"]) / tried["seconds_a_step"]
    steps = once(
        plan.output / "runs" / name / "steps.json",
        lambda: {IMAGES: plan.steps, TIME: max(1, round(plan.steps * ratio))},
    )
    trained = train_to_budgets(plan, name, tried["rate"], steps)
    budgets = {}
    for budget in BUDGETS:
        if "diverged" in trained[budget]:
            budgets[budget] = trained[budget]
            continue
        same = budget == TIME and steps[TIME] == steps[IMAGES]  # one model, one set of scores
        scored = IMAGES if same else budget
        model = str(plan.output / "runs" / name / f"model-{scored}")
        budgets[budget] = trained[budget] | _scores(plan, name, f"{name}-{scored}", model)
    return {"budgets": budgets, "seconds_a_step": trained[IMAGES].get("seconds_a_step")}


def _scores(plan: Plan, name: str, label: str, model: str) -> dict[str, Any]:
    """Scores by number of evaluations, and the strips of pictures."""
    folder = plan.output / "scores" / label
    loaded = cache(lambda: load(model, plan.recipe.device))  # once, and only if something is left to score
    by_steps = {
        str(steps): once(folder / f"nfe-{steps}.json", partial(score_at, plan, name, loaded, steps))
        for steps in plan.nfe
    }
    once(folder / "strips.json", partial(draw_strips, plan, name, loaded, folder / "strips"))
    return {"nfe": by_steps}


def _diverged(row: dict[str, Any]) -> str:
    """How many of a method's runs diverged, of how many."""
    runs = [*row["sweep"]["tried"].values(), *row.get("budgets", {}).values()]
    return f"{sum('diverged' in run for run in runs)}/{len(runs)}"


def _relative(rows: dict[str, Any], held: dict[str, Any], name: str) -> dict[str, Any]:
    """Step costs over those of flow matching."""
    basis = rows[BASIS].get("seconds_a_step")
    own = rows[name].get("seconds_a_step")
    return {
        "time": own / basis if own and basis else None,
        "memory": held[name]["bytes"] / held[BASIS]["bytes"],
    }


def _summary(row: dict[str, Any]) -> str:
    scored = row.get("budgets", {}).get(IMAGES, {}).get("nfe")
    if not scored:
        return f"diverged ({row['diverged']} runs)"
    numbers = ", ".join(f"{steps} step{'s' * (steps != '1')} {one['overall']:.3f}" for steps, one in scored.items())
    return f"learning rate {row['rate']:g}: {numbers}"
