"""Several trainings of one setting, which differ by seed alone: means, and standard errors over the trainings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

NUMBERS = ("overall", "strict", "diversity", "distance", "clip")


def over_runs(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several runs to one budget, over the `runs` that lasted of those `trained`; the first where all diverged.

    Seconds and scores are means; images, steps and the number of pictures are a run's.
    """
    lasting = [result for result in results if "diverged" not in result]
    known = {"runs": len(lasting), "trained": len(results)}
    if not lasting:
        return results[0] | known
    spent = {key: statistics.fmean(result[key] for result in lasting) for key in ("seconds", "seconds_a_step")}
    scored = {steps: mean_report([result["nfe"][steps] for result in lasting]) for steps in lasting[0]["nfe"]}
    return lasting[0] | known | spent | {"nfe": scored}


def mean_report(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of the scores of several trainings, `KEY_se` its standard error over them. One alone stays as it is.

    A number that one training lacks, the mean lacks too.
    """
    if len(reports) == 1:
        return reports[0]
    merged = dict(reports[0])
    for key in NUMBERS:
        if key in merged:
            merged[key], merged[f"{key}_se"] = mean_and_error([report[key] for report in reports])
    if "tasks" not in merged:
        return merged
    by_task = {task: mean_and_error([report["tasks"].get(task) for report in reports]) for task in merged["tasks"]}
    merged["tasks"] = {task: mean for task, (mean, _) in by_task.items()}
    merged["tasks_se"] = {task: error for task, (_, error) in by_task.items()}
    return merged


def mean_and_error(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard error of several numbers; None and None where one lacks."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None, None
    return statistics.fmean(known), statistics.stdev(known) / math.sqrt(len(known))
