"""Scores as a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

TITLES = {
    "mini-geneval": "mini-GenEval (never comparable to GenEval)",
    "mini-geneval-held-out": "mini-GenEval, held-out pairs (never comparable to GenEval)",
}
EXTRAS = ("strict", "diversity")


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Scores by task as text, one row a model; below it, what keeps a score from being a whole one."""
    first = next(iter(scores.values()))
    extras = [name for name in EXTRAS if name in first]
    suite = first.get("suite", "mini-geneval")
    table = Table(title=TITLES.get(suite, suite))
    tasks = list(dict.fromkeys(task for report in scores.values() for task in report["tasks"]))
    for heading in ("", "NFE", *tasks, "overall", *extras):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, report in scores.items():
        error = f" ±{report['overall_se']:.3f}" if report.get("overall_se") is not None else ""
        table.add_row(
            name,
            str(report.get("evaluations") or "?"),
            *(_number(report["tasks"].get(task), 2) for task in tasks),
            _number(report.get("overall")) + error,
            *(_number(report.get(extra)) for extra in extras),
        )
    text = StringIO()
    Console(file=text, width=140, markup=False).print(table)
    remarks = [remark for name, report in scores.items() for remark in _remarks(name, report)]
    return "\n".join([text.getvalue().rstrip(), *remarks])


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _remarks(name: str, report: Mapping[str, Any]) -> list[str]:
    remarks = [report["warning"]] if "warning" in report else []
    if not report.get("complete", True):
        counts = {key: len(report.get(key, ())) for key in ("missing", "failed", "extra")}
        lacks = ", ".join(f"{count} {key}" for key, count in counts.items() if count) or "not all prompts"
        remarks.append(f"INCOMPLETE ({lacks}), {report['pictures']} pictures scored")
    if report.get("official_prompts") is False:
        remarks.append("other prompts than GenEval's own, so not comparable with scores on those")
    if report.get("scoring", {}).get("comparable") is False:
        remarks.append("not comparable with published scores: see docs/evaluation.md")
    return [f"{name}: {remark}" for remark in remarks]
