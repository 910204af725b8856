"""The table of benchmarks: one line each."""

from __future__ import annotations

from collections.abc import Callable

from apexflow.errors import UserError
from apexflow.evaluation.suite import Suite, Tools
from apexflow.evaluation.suites.geneval import GenEval
from apexflow.evaluation.suites.mini_geneval import MiniGenEval, MiniGenEvalHeldOut

SUITES: dict[str, Callable[[Tools], Suite]] = {
    "mini-geneval": MiniGenEval,
    "mini-geneval-held-out": MiniGenEvalHeldOut,
    "geneval": GenEval,
}


def make_suite(name: str, tools: Tools) -> Suite:
    """UserError for a name that is not in the table."""
    if name not in SUITES:
        raise UserError(f"unknown suite {name!r}; suites: {', '.join(SUITES)}")
    return SUITES[name](tools)
