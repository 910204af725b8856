"""`apexflow compare`: from words on the command line to a plan, and from results to a table in the terminal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from apexflow.comparison.plan import EVERYONE, Plan, comparison_recipe
from apexflow.comparison.results import run_comparison
from apexflow.comparison.tables import budget_table
from apexflow.data.workers import Share
from apexflow.errors import UserError, going_on
from apexflow.options import read_numbers
from apexflow.training.config import load_recipe


def compare_command(
    methods: tuple[str, ...], output: Path, recipe: Path | None, nfe: str, rates: str, given: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Carry out a comparison; its results and what to print. UserError under torchrun."""
    if Share.from_environment().world > 1:
        raise UserError("compare runs in one process, so that times are comparable: start it without torchrun")
    shared = comparison_recipe()
    if recipe is not None:
        read = load_recipe(recipe)
        short = {key: getattr(shared, key) for key in ("preview", "checkpoint_every", "keep", "sampling_steps")}
        shared = replace(read, sampling_guidance=1.0, suite=None, minutes=None, **short)
    plan = Plan(
        output=output,
        recipe=shared,
        methods=tuple(dict.fromkeys(methods)) or EVERYONE,
        nfe=tuple(int(number) for number in read_numbers(nfe, "--nfe", int)),
        rates=tuple(read_numbers(rates, "--rates", float)),
        **given,
    )
    with going_on(lambda: f"finished runs are kept in {output}: run the same command to resume"):
        results = run_comparison(plan)
    rows = budget_table(results["rows"], "images", list(plan.nfe), results.get("true_pictures"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return results, "\n".join([*lines, f"report: {results['report']}"])
