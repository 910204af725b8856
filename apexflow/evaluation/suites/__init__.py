"""The table of benchmarks: one line each."""

from __future__ import annotations

from dataclasses import fields

from apexflow.errors import UserError, suggest
from apexflow.evaluation.suite import Suite, Tools
from apexflow.evaluation.suites.dpg import DpgBench
from apexflow.evaluation.suites.geneval import GenEval
from apexflow.evaluation.suites.mini_geneval import MiniGenEval, MiniGenEvalHeldOut
from apexflow.evaluation.suites.mjhq import Mjhq
from apexflow.evaluation.suites.own import Own
from apexflow.evaluation.suites.pickscore import PickScore
from apexflow.evaluation.suites.wise import Wise

SUITES: dict[str, type[Suite]] = {
    "mini-geneval": MiniGenEval,
    "mini-geneval-held-out": MiniGenEvalHeldOut,
    "geneval": GenEval,
    "dpg": DpgBench,
    "wise": Wise,
    "mjhq": Mjhq,
    "own": Own,
    "pickscore": PickScore,
}


def make_suite(name: str, tools: Tools, per_prompt: int | None = None) -> Suite:
    """UserError for a name that is not in the table, and for a tool that the suite has no use for."""
    if name not in SUITES:
        raise UserError(f"unknown suite {name!r}{suggest(name, SUITES)}; suites: {', '.join(SUITES)}")
    suite = SUITES[name](tools, per_prompt)
    given = [field.name for field in fields(Tools) if field.name != "device" and getattr(tools, field.name) is not None]
    idle = [f"--{tool.replace('_', '-')}" for tool in given if tool not in suite.takes]
    if idle:
        raise UserError(f"{' and '.join(idle)} cannot be used with the suite {name}: leave out what it does not use")
    return suite
