"""The tables of a comparison, as rows of text and as markdown."""

from __future__ import annotations

from typing import Any

from apexflow.comparison.plan import BASIS, IMAGES, TEACHER, TIME


def markdown(results: dict[str, Any]) -> str:
    """Both budgets, the tasks at one step, and what was spent."""
    rows, plan = results["rows"], results["plan"]
    parts = ["# Comparison\n", told(results) + "\n"]
    for budget, title in ((IMAGES, "Equal images"), (TIME, "Equal wall time")):
        parts += [f"## {title}\n", table(budget_table(rows, budget, plan["nfe"]))]
    parts += ["## Tasks at one step, equal images\n", table(task_table(rows))]
    parts += ["## What the sweep of learning rates cost\n", table(sweep_table(rows))]
    return "\n".join(parts)


def told(results: dict[str, Any]) -> str:
    """What was done, and what the columns mean."""
    plan, rows = results["plan"], results["rows"]
    first = next(name for name in rows if name != TEACHER)
    limit = "" if plan["limit"] is None else f", {plan['limit']} prompts"
    rates = len(plan["rates"])
    return (
        f"Teacher {results['teacher']}; {plan['images']:,} images a run at batch {plan['recipe']['batch']}; one run a method, "
        f"at the best of {counted(rates, 'learning rate')} by the one-step score of short runs of {plan['sweep']:.0%} of the "
        f"images. Equal wall time: what {first} needs for the images. Scores are mini-GenEval, overall, each method with its "
        f"own sampler, without guidance but what was trained in: {counted(plan['seeds'], 'seed')}, "
        f"{counted(plan['per_prompt'], 'picture')} a prompt{limit}; ± is the standard error over pictures. FD (distance of "
        "features to true pictures; less is better) and diversity (distance between pictures of a prompt) are at the fewest "
        f"evaluations. Time and memory of a training step are relative to {BASIS}; diverged: runs of all runs."
    )


def counted(number: int, thing: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number} {thing}{'s' * (number != 1)}"


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body]) + "\n"


def budget_table(rows: dict[str, Any], budget: str, nfe: list[int]) -> list[list[str]]:
    """A row a method: scores at each number of evaluations, distance and diversity at one step, costs, stability."""
    head = ["", *[f"NFE {steps}" for steps in nfe], "FD", "diversity", "images", "rate", "time", "memory"]
    found = [[*head, "further networks", "diverged"]]
    for name, row in rows.items():
        one = row.get("budgets", {}).get(budget)
        if one is None and name == TEACHER:
            continue
        found.append([name, *_score_cells(one, nfe), *_cost_cells(row, one)])
    return found


def _score_cells(one: dict[str, Any] | None, nfe: list[int]) -> list[str]:
    if one is None or "nfe" not in one:
        return ["diverged", *[""] * (len(nfe) + 1)]
    scored = [one["nfe"][str(steps)] for steps in nfe]
    cells = [f"{report['overall']:.3f} ±{report.get('overall_se') or 0:.3f}" for report in scored]
    spread = scored[0].get("diversity")
    return [*cells, f"{scored[0]['distance']:.3f}", "" if spread is None else f"{spread:.3f}"]


def _cost_cells(row: dict[str, Any], one: dict[str, Any] | None) -> list[str]:
    if "sweep" not in row:
        return [""] * 6
    cost = ["" if row.get(key) is None else f"{row[key]:.2f}" for key in ("time", "memory")]
    rate = "" if row["rate"] is None else f"{row['rate']:g}"
    return [f"{one['images']:,}" if one else "", rate, *cost, ", ".join(row["further"]), row["diverged"]]


def task_table(rows: dict[str, Any]) -> list[list[str]]:
    """mini-GenEval by task at the fewest steps."""
    scored = {name: row.get("budgets", {}).get(IMAGES, {}).get("nfe") for name, row in rows.items()}
    first = {name: next(iter(reports.values())) for name, reports in scored.items() if reports}
    tasks = list(next(iter(first.values()))["tasks"])
    head = ["", *[task.replace("_", " ") for task in tasks], "strict"]
    return [
        head,
        *[[name, *[f"{r['tasks'][t]:.2f}" for t in tasks], f"{r['strict']:.3f}"] for name, r in first.items()],
    ]


def sweep_table(rows: dict[str, Any]) -> list[list[str]]:
    """One-step scores of every rate, and seconds."""
    swept = {name: row["sweep"] for name, row in rows.items() if "sweep" in row}
    rates = list(next(iter(swept.values()))["tried"])
    found = [["", *rates, "seconds"]]
    for name, one in swept.items():
        cells = ["diverged" if "diverged" in r else f"{r['overall']:.3f}" for r in one["tried"].values()]
        found.append([name, *cells, f"{one['seconds']:.0f}"])
    return found
