"""The paper's ablations and the open readings in miniature: one short APEX run a row, all else equal.

    python benchmarks/ablate.py weights     # Table 7: lambda_p : lambda_e
    python benchmarks/ablate.py shift       # Table 6: the (a, b) grid
    python benchmarks/ablate.py readings    # pairing, real branch, path velocity, lambda, norm, guidance, beta ...
    python benchmarks/ablate.py weights --seeds 0 1 2

Every run starts from the same teacher with the same data, and is scored at one and four steps on mini-GenEval. With several
seeds all rows are trained with the first before any is with the second. Runs that are already in the output file are kept, so
an interrupted ablation goes on, and one of fewer seeds takes more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from provenance import provenance

from apexflow.comparison.averages import mean_report
from apexflow.comparison.plan import VARIANTS
from apexflow.errors import Diverged
from apexflow.evaluation.runner import EvaluationSettings, evaluate
from apexflow.files import write_json
from apexflow.generator import load
from apexflow.progress import console
from apexflow.training.config import Data, short_recipe
from apexflow.training.loop import train

WEIGHTS = {
    "1:0 (path only)": {"path_weight": 1.0, "endpoint_weight": 0.0},
    "0:1 (endpoint only)": {"path_weight": 0.0, "endpoint_weight": 1.0},
    "1:0.5": {"endpoint_weight": 0.5},
    "1:1": {},
    "1:2": {"endpoint_weight": 2.0},
    "0:1, every row generated from": {"path_weight": 0.0, "share": 1.0},  # costs what 1:1 costs
}
SHIFT = {f"a={a}, b={b}": {"a": a, "b": b} for a in (-1.0, -0.5, 0.5) for b in (0.0, 0.1, 1.0, 10.0)}
READINGS = {
    "default": {},
    "path rows: all": {"path_rows": "all"},
    "pairing: printed": {"pairing": "printed"},
    "fake's own velocity below 0.4": {"exact_below": 0.4},
    "real branch: EMA": {"real": "reference"},
    "real branch: student": {"real": "student"},
    "path velocity: the sample's own": {"path_velocity": "sample"},
    "theta-minus: EMA": {"reference": "reference"},
    "guidance: none": {"guidance": 1.0},
    "guidance: 1.5": {"guidance": 1.5},
    "guidance: 4": {"guidance": 4.0},
    "lambda: ramp to 0.9": {"lambda_law": "ramp"},
    "lambda: constant 0.5": {"lambda_law": "constant", "lambda_max": 0.5},
    "lambda: uniform to 0.5": {"lambda_max": 0.5},
    "lambda: 0": {"lambda_max": 0.0},
    "norm: mean": {"reduction": "mean"},
    "norm: plain l2 (p = 0)": {"p": 0.0},
    "clip: none": {"clip": None},
    "beta: cosine": {"beta": "cosine"},
    "share: 0.25": {"share": 0.25},
    "share: 0.75": {"share": 0.75},
    "all as printed": VARIANTS["apex-printed"][1],
}
GROUPS = {"weights": WEIGHTS, "shift": SHIFT, "readings": READINGS}


def run_one(
    objective: dict[str, Any], seed: int, given: argparse.Namespace, scratch: Path, cache: Path
) -> dict[str, Any]:
    """Train one row with one seed and score it; a run that diverges is marked, not fatal."""
    recipe = short_recipe(
        str(scratch / "run"),
        model=given.model,
        objective=objective,
        data=Data(source="scenes", count=10000, seed=2, cache=str(cache)),
        learning_rate=given.learning_rate,
        steps=given.steps,
        batch=given.batch,
        seed=seed,
    )
    try:
        model = train(recipe)
    except Diverged as error:
        return {"diverged": str(error)}
    generator = load(str(model))
    result: dict[str, Any] = {}
    for steps in (1, 4):
        report = evaluate(generator, EvaluationSettings(steps=steps, guidance=1.0, per_prompt=given.per_prompt))
        kept = ("overall", "overall_se", "strict", "diversity", "tasks")
        result[f"steps_{steps}"] = {key: report[key] for key in kept}
    return result


def read(output: Path, settings: dict[str, Any], teacher: str) -> dict[str, dict[str, Any]]:
    """The runs of every row by seed, each with its commit. An earlier version kept one run a row, of seed 0."""
    if not output.is_file():
        return {}
    found = json.loads(output.read_text())
    if found["settings"] != settings or found["teacher"] != teacher:
        sys.exit(f"{output} was made with {found['settings']} of {found['teacher']}: choose another --output")
    return {
        name: row["runs"] if "runs" in row else {"0": row | {"commit": found["commit"]}}
        for name, row in found["rows"].items()
    }


def keep(output: Path, settings: dict[str, Any], teacher: str, name: str, seed: int, run: dict[str, Any]) -> None:
    """Add a run to the file as it now is: another process may have written to it since."""
    origin = provenance()
    table = read(output, settings, teacher)
    table.setdefault(name, {})[str(seed)] = run | {"commit": origin["commit"]}
    rows = {name: row(runs) for name, runs in table.items()}
    commits = sorted({run["commit"] for runs in table.values() for run in runs.values()})
    write_json(output, {"rows": rows, "settings": settings, "teacher": teacher} | origin | {"commits": commits})


def row(runs: dict[str, Any]) -> dict[str, Any]:
    """A row of the file: its runs, and their mean over those that lasted."""
    lasting = [run for run in runs.values() if "diverged" not in run]
    if not lasting:
        return {"runs": runs, "diverged": next(iter(runs.values()))["diverged"]}
    means = {steps: mean_report([run[steps] for run in lasting]) for steps in ("steps_1", "steps_4")}
    return {"runs": runs, "lasting": len(lasting)} | means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--model", default="mini-teacher")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--per-prompt", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Of training; a run each.")
    parser.add_argument("--only", nargs="*", help="Only the rows whose name holds one of these words.")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    output = given.output or Path("results") / f"ablate-{given.group}.json"
    settings = {
        "steps": given.steps,
        "batch": given.batch,
        "learning_rate": given.learning_rate,
        "per_prompt": given.per_prompt,
    }
    cache = Path("runs/cache/ablate")
    for seed in given.seeds:
        for name, objective in GROUPS[given.group].items():
            done = read(output, settings, given.model).get(name, {})
            if str(seed) in done or (given.only and not any(word in name for word in given.only)):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                run = run_one(objective, seed, given, Path(scratch), cache)
            keep(output, settings, given.model, name, seed, run)
            console.print(f"{name}, seed {seed}: {summary(run)}")


def summary(run: dict[str, Any]) -> str:
    if "diverged" in run:
        return "diverged"
    one, four = run["steps_1"], run["steps_4"]
    first = f"one step {one['overall']:.3f} (strict {one['strict']:.3f}, diversity {one['diversity'] or 0:.3f})"
    return f"{first}, four {four['overall']:.3f}"


if __name__ == "__main__":
    main()
