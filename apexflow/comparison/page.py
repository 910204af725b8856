"""One HTML page of a comparison: tables, curves over the number of evaluations, pictures, and the stability of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apexflow.comparison.chart import lines_chart
from apexflow.comparison.plan import IMAGES, TEACHER, Plan
from apexflow.comparison.scores import grid_prompts, strips
from apexflow.comparison.tables import (
    NAMES,
    SWEPT,
    TITLES,
    budget_table,
    kept_budgets,
    legend,
    main_score,
    sweep_table,
    task_table,
)
from apexflow.comparison.train import run_folder
from apexflow.evaluation.files import open_picture
from apexflow.objectives import objectives
from apexflow.reporting import curves, pictures
from apexflow.reporting.markup import section, table, tag, text
from apexflow.reporting.report import page, write
from apexflow.training.journal import read_metrics


def write_page(plan: Plan, results: dict[str, Any]) -> Path:
    """Write `report.html` and the picture grids beside it; its path."""
    rows, nfe = results["rows"], list(plan.nfe)
    asked = grid_prompts(plan)
    prompts = grid(plan, rows, "prompts", [str(index + 1) for index in range(len(asked))])
    steps = grid(plan, rows, "nfe", [f"NFE {number}" for number in nfe])
    numbered = "; ".join(f"{index}: {prompt}" for index, prompt in enumerate(asked, 1))
    true = results.get("true_pictures")
    command = tag("p", tag("code", text(results["command"])))
    body = [
        tag("header", tag("p", "Comparison") + tag("h1", "One teacher, every method")),
        section("What was compared", command + _papers(plan, rows), legend(results)),
        *(section(TITLES[budget], shown(budget_table(rows, budget, nfe, true))) for budget in kept_budgets(rows)),
        section("Scores over the number of evaluations", tag("div", _nfe_charts(rows, nfe), class_="charts")),
        *([section("Tasks at one step", shown(tasks))] if (tasks := task_table(rows)) else []),
        section("The same prompts and noise at one step", _picture(prompts, "prompt"), numbered),
        section("One prompt at every number of steps", _picture(steps, "number of steps"), asked[0]),
        section(
            "Stability: loss and gradient norm",
            tag("div", _training(plan, rows), class_="charts"),
            "The first run of each.",
        ),
        section("The sweep of learning rates, and the time of all", shown(sweep_table(rows)), SWEPT),
    ]
    return write(plan.output / "report.html", page("apexflow comparison", "".join(body)))


def _papers(plan: Plan, rows: dict[str, Any]) -> str:
    """The paper of each method, once where several rows are readings of it."""
    methods = dict.fromkeys(plan.entry(name)[0] for name in rows if name != TEACHER)
    return tag("p", text(". ".join(f"{name}: {objectives()[name].citation}" for name in methods)))


def shown(rows: list[list[str]]) -> str:
    """A table as markup."""
    head, *rest = rows
    heads = "".join(tag("th", text(cell), scope="col") for cell in head[1:])
    return table("comparison", heads, ((row[0], "".join(tag("td", text(cell)) for cell in row[1:])) for row in rest))


def _nfe_charts(rows: dict[str, Any], nfe: list[int]) -> str:
    charts, by = [], main_score(rows)
    for budget in kept_budgets(rows):
        ends = {name: row.get("budgets", {}).get(budget, {}) for name, row in rows.items()}
        scored = {name: [one["nfe"][str(steps)] for steps in nfe] for name, one in ends.items() if "nfe" in one}
        if scored:  # nothing, where all diverged
            series = {name: [report[by] for report in reports] for name, reports in scored.items()}
            errors = {
                name: [report[f"{by}_se"] for report in scored[name]]
                for name in scored
                if ends[name].get("runs", 1) > 1
            }
            charts.append(
                lines_chart(f"{NAMES[by]}, {TITLES[budget].lower()}", [str(steps) for steps in nfe], series, errors)
            )
    return "".join(charts)


def _training(plan: Plan, rows: dict[str, Any]) -> str:
    charts = []
    for name, row in rows.items():
        lines = read_metrics(run_folder(plan.output / "runs" / name, row.get("stages", {}).get(IMAGES, IMAGES)))
        for key in ("loss", "grad_norm"):
            # A turn of another network has no gradient of the student, and no loss of its.
            points = [(line["step"], line[key]) for line in lines if key in line and "grad_norm" in line]
            if points:
                curve = curves.Curve(f"{name}: {key.replace('_', ' ')}", points)
                charts.append(curves.figure(curve, (0, lines[-1]["step"])))
    return "".join(charts)


def _picture(path: Path, column: str) -> str:
    shown = pictures.picture_tag(path, f"pictures: a row a method, a column a {column}")
    return tag("div", pictures.figure(shown, "", "grid wide"), class_="pictures")


def grid(plan: Plan, rows: dict[str, Any], kind: str, heads: list[str]) -> Path:
    """A sheet with a row a method and a column a prompt or a number of steps, names beside and above."""
    labels = {name: f"{name}-{row['stages'][IMAGES]}" for name, row in rows.items() if "stages" in row}
    found = {
        name: [open_picture(path) for path in paths]
        for name, label in ({TEACHER: TEACHER} | labels).items()
        if (paths := strips(plan, label, kind))
    }
    sheet = pictures.labelled_sheet(found, heads)
    path = plan.output / f"grid-{kind}.png"
    sheet.save(path)
    return path
