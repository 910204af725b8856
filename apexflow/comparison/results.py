"""The comparison from start to end: what was trained and scored, as one JSON, one table in markdown and one page."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

from apexflow.comparison.averages import over_runs
from apexflow.comparison.cost import check_clip, check_pictures
from apexflow.comparison.page import write_page
from apexflow.comparison.plan import BASIS, IMAGES, TEACHER, TIME, Plan
from apexflow.comparison.scores import draw_strips, grid_prompts, score_at, true_pictures
from apexflow.comparison.tables import main_score, markdown
from apexflow.comparison.train import costs, once, stages, sweep, train_to_budgets
from apexflow.errors import UserError, is_taken
from apexflow.files import make_folder, read_json, write_json, write_text
from apexflow.generator import load
from apexflow.locking import alone_in
from apexflow.progress import console
from apexflow.training.config import Recipe


def run_comparison(plan: Plan) -> dict[str, Any]:
    """Carry out a plan, or what an earlier run has left of it; the results, which are also written to `plan.output`.

    Each method is trained with the first seed before any is trained with the second, and so on, and the results are written
    anew with each seed. What the folder has of other methods, and of further seeds, stays in them.
    UserError for a folder that holds another comparison or in which one goes on, for a method that the backbone cannot take, and
    for data without pictures.
    """
    check_pictures(plan)
    check_clip(plan)
    with alone_in(plan.output):
        return _carry_out(plan)


def _carry_out(plan: Plan) -> dict[str, Any]:
    _claim(plan)
    earlier = _earlier(plan)
    names = plan.trained
    costs(plan, [*names, BASIS])
    grid_prompts(plan)  # told now if there are too few
    pace = _pace(plan, earlier) if plan.timed else {}
    rows: dict[str, Any] = {TEACHER: {"budgets": {IMAGES: _scores(plan, TEACHER, TEACHER, plan.recipe.model)}}}
    rows |= {name: row for name, row in earlier["rows"].items() if "runs" in row}
    seeds = {name: _seeds(plan, rows.get(name, {})) for name in names}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    results: dict[str, Any] = {}
    for seed in sorted(set().union(*seeds.values())):
        for name in names:
            if seed in seeds[name]:
                tried = sweep(plan, name)
                runs[name] += _runs(plan, name, tried, pace.get("seconds_a_step"), seed)
                rows[name] = _row(plan, name, tried, runs[name])
                console.print(f"{name}: {_summary(rows[name])}")
        results = _write(plan, rows, pace.get("method"), earlier["commands"])
    return results


def _claim(plan: Plan) -> None:
    """Take a new folder, or go on with the same comparison. One that was refused before it made anything is new."""
    marker = plan.output / "plan.json"
    if marker.is_file():
        before, now = read_json(marker, "the comparison"), _as_json(plan.identity())
        before = {"timed": True} | before  # as all were before plans said so
        before["recipe"] = _with_defaults(before["recipe"], _as_json(asdict(Recipe(output=""))))
        differs = [key for key in before | now if before.get(key) != now.get(key)]
        if differs and {path.name for path in plan.output.iterdir()} <= {"plan.json", "costs"}:
            shutil.rmtree(plan.output / "costs", ignore_errors=True)
            write_json(marker, plan.identity())
        elif differs:
            raise UserError(
                f"{plan.output} holds a comparison with different {' and '.join(differs)}: choose another folder with -o"
            )
        return
    if is_taken(plan.output):
        raise UserError(f"output {plan.output} exists and is not a comparison: choose another folder with -o")
    make_folder(plan.output)
    write_json(marker, plan.identity())


def _with_defaults(found: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The recipe of an earlier folder; a field that recipes did not have then gets its default."""
    parts = {
        key: _with_defaults(found[key], value)
        for key, value in defaults.items()
        if key in found and value and isinstance(value, dict)
    }
    return defaults | found | parts


def _as_json(plain: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(plain))


def _earlier(plan: Plan) -> dict[str, Any]:
    """Rows and commands of the results that the folder has; none in a new one. An earlier version kept one command."""
    path = plan.output / "results.json"
    if not path.is_file():
        return {"rows": {}, "commands": []}
    found = read_json(path, "the results of the comparison")
    return {"rows": found["rows"], "commands": found.get("commands", [found["command"]])}


def _pace(plan: Plan, earlier: dict[str, Any]) -> dict[str, Any]:
    """Which method sets the wall time, and its seconds a step: the one that was first when the folder was."""

    def make() -> dict[str, Any]:
        first = next((name for name in earlier["rows"] if name != TEACHER), plan.methods[0])
        return {"method": first, "seconds_a_step": sweep(plan, first)["seconds_a_step"]}

    return once(plan.output / "pace.json", make)


def _seeds(plan: Plan, row: dict[str, Any]) -> set[int]:
    """The seeds that are asked for, and those that the folder has results of."""
    return {*plan.training_seeds, *(run["seed"] for run in row.get("runs", []))}


def _runs(plan: Plan, name: str, tried: dict[str, Any], pace: float | None, seed: int) -> list[dict[str, Any]]:
    """One seed of a method, trained to both budgets and each scored; nothing where every rate diverged in the sweep."""
    if tried["rate"] is None:
        return []
    steps = _steps(plan, name, tried, pace)
    trained, seconds = train_to_budgets(plan, name, tried["rate"], steps, seed)
    folder = plan.of_seed(plan.output / "runs" / name, seed)
    budgets = {}
    for budget, stage in stages(plan, name, steps).items():
        budgets[budget] = trained[budget]
        if "diverged" not in trained[budget]:
            place = plan.of_seed(Path(f"{name}-{stage}"), seed)
            budgets[budget] = trained[budget] | _scores(plan, name, str(place), str(folder / f"model-{stage}"))
    return [{"seed": seed, "seconds": seconds, "budgets": budgets}]


def _steps(plan: Plan, name: str, tried: dict[str, Any], pace: float | None) -> dict[str, int]:
    """Steps of every budget; that in time is what the first method needs for the images."""
    ratio = (pace or tried["seconds_a_step"]) / tried["seconds_a_step"]
    steps = {IMAGES: plan.steps, TIME: max(1, round(plan.steps * ratio))}
    return once(plan.output / "runs" / name / "steps.json", lambda: {budget: steps[budget] for budget in plan.budgets})


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


def _row(plan: Plan, name: str, tried: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the results have of a method: the sweep, every run, and both budgets over the runs."""
    row = {"sweep": tried, "rate": tried["rate"], "runs": runs}
    if runs:
        row["budgets"] = {budget: over_runs([run["budgets"][budget] for run in runs]) for budget in plan.budgets}
        row["stages"] = stages(plan, name, read_json(plan.output / "runs" / name / "steps.json", "the budgets"))
        row["seconds_a_step"] = row["budgets"][IMAGES].get("seconds_a_step") if plan.timed else None
    ends = [*tried["tried"].values(), *(end for run in runs for end in run["budgets"].values())]
    row["diverged"] = f"{sum('diverged' in end for end in ends)}/{len(ends)}"
    return row


def _write(plan: Plan, rows: dict[str, Any], first: str | None, commands: list[str]) -> dict[str, Any]:
    """Write JSON, markdown and page of what there is."""
    names = [name for name in rows if name != TEACHER]
    held = costs(plan, [*names, BASIS])
    for name in names:
        rows[name] |= {"further": held[name]["further"], **_relative(rows, held, name)}
    commands = list(dict.fromkeys([*commands, own_command()]))
    results: dict[str, Any] = {"plan": plan.identity(), "teacher": plan.recipe.model, "first": first, "rows": rows}
    results |= {"commands": commands, "command": "; ".join(commands)}
    scored = rows[TEACHER]["budgets"][IMAGES]["nfe"][str(plan.nfe[0])]["pictures"]
    floor = once(plan.output / "scores" / "true-pictures.json", partial(true_pictures, plan, scored))
    results |= {"true_pictures": floor} if floor else {}
    write_json(plan.output / "results.json", results)
    write_text(plan.output / "results.md", markdown(results))
    return results | {"report": str(write_page(plan, results))}


def _relative(rows: dict[str, Any], held: dict[str, Any], name: str) -> dict[str, Any]:
    """Step costs over those of flow matching; time is None where it was not taken."""
    basis = rows.get(BASIS, {}).get("seconds_a_step")
    own = rows[name].get("seconds_a_step")
    return {
        "time": own / basis if own and basis else None,
        "memory": held[name]["bytes"] / held[BASIS]["bytes"],
    }


def _summary(row: dict[str, Any]) -> str:
    scored = row.get("budgets", {}).get(IMAGES, {}).get("nfe")
    if not scored:
        return f"diverged ({row['diverged']} runs)"
    by = main_score({"": row})
    numbers = ", ".join(f"{steps} step{'s' * (steps != '1')} {one[by]:.3f}" for steps, one in scored.items())
    return f"learning rate {row['rate']:g}: {numbers}"


def own_command() -> str:
    """The command line of this process, the same however it was started (`python -m` puts a file's path first)."""
    name = Path(sys.argv[0]).name
    return shlex.join(["apexflow" if name == "__main__.py" else name, *sys.argv[1:]])
