"""The tables of a comparison, as rows of text and as markdown."""

from __future__ import annotations

from typing import Any

from apexflow.comparison.plan import BASIS, IMAGES, TEACHER, TIME

TRUE = "true pictures"
TITLES = {IMAGES: "Equal images", TIME: "Equal wall time"}
# The scores by their key in a report, and what they are called.
NAMES = {"overall": "mini-GenEval", "distance": "FD", "diversity": "diversity", "clip": "CLIP score"}
SWEPT = "Mean scores over the numbers of evaluations; seconds. The sweep's best run is the first of the runs, and in both sums."


def markdown(results: dict[str, Any]) -> str:
    """The budgets, the tasks at one step, and what was spent."""
    rows, plan = results["rows"], results["plan"]
    parts = ["# Comparison", legend(results)]
    for budget in kept_budgets(rows):
        parts += [f"## {TITLES[budget]}", table(budget_table(rows, budget, plan["nfe"], results.get("true_pictures")))]
    if tasks := task_table(rows):
        parts += ["## Tasks at one step, equal images", table(tasks)]
    parts += ["## What the sweep of learning rates and the runs cost", SWEPT, table(sweep_table(rows))]
    return "\n\n".join(parts) + "\n"


def main_score(rows: dict[str, Any]) -> str:
    """What methods are compared by at every number of evaluations: mini-GenEval, or FD where the data are no scenes."""
    reports = _reports(rows)
    return "overall" if not reports or "overall" in reports[0] else "distance"


def _reports(rows: dict[str, Any]) -> list[dict[str, Any]]:
    budgets = [one for row in rows.values() for one in row.get("budgets", {}).values()]
    return [report for one in budgets for report in one.get("nfe", {}).values()]


def _beside(rows: dict[str, Any]) -> list[str]:
    """The scores that are given at the fewest evaluations alone."""
    found = ["distance", "diversity"] if main_score(rows) == "overall" else ["diversity"]
    return found + ["clip"] * any("clip" in report for report in _reports(rows))


def kept_budgets(rows: dict[str, Any]) -> list[str]:
    """The budgets that any method was trained to; the teacher has only the first."""
    kept = {budget for name, row in rows.items() if name != TEACHER for budget in row.get("budgets", {})}
    return [budget for budget in TITLES if budget in kept]


def legend(results: dict[str, Any]) -> str:
    """What was done, and what the columns mean."""
    plan, rows = results["plan"], results["rows"]
    alone = [
        name for name, row in rows.items() if any(end.endswith("-alone") for end in row.get("stages", {}).values())
    ]
    drawn = [report["pictures"] // (plan["seeds"] * plan["per_prompt"]) for report in _reports(rows)]
    limit = "" if plan["limit"] is None else f", {min([plan['limit'], *drawn])} prompts"  # there may be fewer
    rates = len(plan["rates"])
    return (
        f"Teacher {results['teacher']}; {plan['images']:,} images a run at batch {plan['recipe']['batch']}, "
        f"at the best of {counted(rates, 'learning rate')} by the mean score over the evaluations of a run each with the "
        f"first seed. {_equal_time(results['first'], alone)}{about_errors(rows)} Scores are {_scored(rows)}, each "
        f"method with its own sampler, without guidance but what was trained in: {counted(plan['seeds'], 'seed')} of the noise, "
        f"{counted(plan['per_prompt'], 'picture')} a prompt{limit}. {_explained(rows)} at the fewest "
        f"evaluations.{_floor(results)} {'Memory' if results['first'] is None else 'Time and memory'} of a training step "
        f"relative to {BASIS}'s; diverged: of the results of the sweep and of every run at each budget."
        f"{_own_settings(plan['recipe'], rows)}"
    )


def _scored(rows: dict[str, Any]) -> str:
    """The main score in a legend."""
    if main_score(rows) == "overall":
        return "mini-GenEval, overall"
    return "FD (distance of features to those of the data's pictures; less is better) on captions that no run was trained on"


def _explained(rows: dict[str, Any]) -> str:
    """The other scores in a legend."""
    diversity = "diversity (distance between pictures of a prompt)"
    if main_score(rows) == "overall":
        return f"FD (distance of features to true pictures; less is better) and {diversity} are"
    features = "FD's features are latents averaged over a grid of four by four: they see colours and where they are, not detail"
    clip = " and the CLIP score are" if "clip" in _beside(rows) else " is"
    return f"{features}. {diversity.capitalize()}{clip}"


def _own_settings(recipe: dict[str, Any], rows: dict[str, Any]) -> str:
    """What the recipe sets of its own method, if that has a row; all others have their defaults."""
    given = ", ".join(f"{key}: {value}" for key, value in recipe["objective"].items())
    return f" {recipe['method']} has the recipe's {given}." if given and recipe["method"] in rows else ""


def _floor(results: dict[str, Any]) -> str:
    """What a distance is to be compared with."""
    return f" By FD no method near {TRUE} can be told from them." if "true_pictures" in results else ""


def _equal_time(first: str | None, alone: list[str]) -> str:
    """How the two budgets come about; nothing where the images are the only one."""
    if first is None:
        return ""
    told = f"Equal wall time: what {first} needs for the images. "
    if not alone:
        return f"{told}One run passes both budgets. "
    return (
        f"{told}One run passes both budgets, but {' and '.join(alone)}, in which something is timed by the run's length, "
        "had a run for each. "
    )


def about_errors(rows: dict[str, Any]) -> str:
    """What means and errors are over."""
    most = max(len(row.get("runs", [])) for row in rows.values())
    if main_score(rows) == "distance":  # which has no error over pictures
        over_runs = "means over those that lasted, and ± is the standard error over them"
        return "One run a method." if most < 2 else f"Up to {most} runs a method, by the seed of training: {over_runs}."
    over_pictures = "± is the standard error over pictures"
    if most < 2:
        return f"One run a method: {over_pictures}, not over runs."
    return (
        f"Up to {most} runs a method, which differ by the seed of training, as the column says: means over those that "
        f"lasted, and ± is the standard error over them; of one run, and of the teacher, {over_pictures.removeprefix('± is ')}."
    )


def counted(number: int, thing: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number} {thing}{'s' * (number != 1)}"


def table(rows: list[list[str]]) -> str:
    """Rows of cells as markdown, the first as its head."""
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def budget_table(
    rows: dict[str, Any], budget: str, nfe: list[int], true: dict[str, Any] | None = None
) -> list[list[str]]:
    """A row a method: scores at each number of evaluations, the others at one step, runs, costs, stability.

    Above them the distance of as many `true` pictures, where results have it. No column of times where none was taken.
    """
    by, beside = main_score(rows), _beside(rows)
    each = "NFE" if by == "overall" else f"{NAMES[by]}, NFE"
    head = ["", *[f"{each} {steps}" for steps in nfe], *[NAMES[key] for key in beside]]
    head += ["runs", "images", "rate", "time", "memory"]
    found = [[*head, "further networks", "diverged"]]
    if true and budget == IMAGES:
        scores = [*[by] * len(nfe), *beside]
        found.append([TRUE, *[with_error(true, key) for key in scores], *[""] * 7])
    for name, row in rows.items():
        one = row.get("budgets", {}).get(budget)
        if one is None and name == TEACHER:
            continue
        found.append([name, *_score_cells(one, nfe, by, beside), *_cost_cells(row, one)])
    if any(row.get("time") for row in rows.values()):
        return found
    untimed = found[0].index("time")
    return [row[:untimed] + row[untimed + 1 :] for row in found]


def _score_cells(one: dict[str, Any] | None, nfe: list[int], by: str, beside: list[str]) -> list[str]:
    if one is None or "nfe" not in one:
        return ["diverged", *[""] * (len(nfe) + len(beside) - 1)]
    scored = [one["nfe"][str(steps)] for steps in nfe]
    # mini-GenEval always has an error, of 0 where it is not known.
    known = [report | ({"overall_se": report.get("overall_se") or 0} if by == "overall" else {}) for report in scored]
    return [*(with_error(report, by) for report in known), *(with_error(scored[0], key) for key in beside)]


def with_error(report: dict[str, Any], key: str) -> str:
    """A number, with its standard error where several runs give one; nothing where it lacks."""
    value, error = report.get(key), report.get(f"{key}_se")
    return "" if value is None else f"{value:.3f}" + ("" if error is None else f" ±{error:.3f}")


def _cost_cells(row: dict[str, Any], one: dict[str, Any] | None) -> list[str]:
    if "sweep" not in row:
        return [""] * 7
    lasting, all_runs = (one.get(key, 1) for key in ("runs", "trained")) if one else (0, 0)
    runs = str(lasting) if lasting == all_runs else f"{lasting} of {all_runs}"
    cost = ["" if row.get(key) is None else f"{row[key]:.2f}" for key in ("time", "memory")]
    rate = "" if row["rate"] is None else f"{row['rate']:g}"
    return [runs, f"{one['images']:,}" if one else "", rate, *cost, ", ".join(row["further"]), row["diverged"]]


def task_table(rows: dict[str, Any]) -> list[list[str]]:
    """mini-GenEval by task at the fewest steps; nothing where the data are no scenes."""
    if main_score(rows) != "overall":
        return []
    scored = {name: row.get("budgets", {}).get(IMAGES, {}).get("nfe") for name, row in rows.items()}
    first = {name: next(iter(reports.values())) for name, reports in scored.items() if reports}
    tasks = list(next(iter(first.values()))["tasks"])
    head = ["", *[task.replace("_", " ") for task in tasks], "strict"]
    return [
        head,
        *[[name, *[f"{r['tasks'][t]:.2f}" for t in tasks], f"{r['strict']:.3f}"] for name, r in first.items()],
    ]


def sweep_table(rows: dict[str, Any]) -> list[list[str]]:
    """Mean scores of every rate over the evaluations, and the seconds that they and all runs to the budgets took."""
    swept = {name: row["sweep"] for name, row in rows.items() if "sweep" in row}
    rates = list(next(iter(swept.values()))["tried"])
    by, found = main_score(rows), [["", *rates, "sweep, seconds", "runs, seconds"]]
    for name, one in swept.items():
        trained = sum(run["seconds"] for run in rows[name]["runs"])
        cells = ["diverged" if "diverged" in r else f"{r[by]:.3f}" for r in one["tried"].values()]
        found.append([name, *cells, f"{one['seconds']:.0f}", f"{trained:.0f}"])
    return found
