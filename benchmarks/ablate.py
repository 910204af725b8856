"""The paper's ablations and the open readings in miniature: one short APEX run a row, all else equal.

    python benchmarks/ablate.py weights     # Table 7: lambda_p : lambda_e
    python benchmarks/ablate.py shift       # Table 6: the (a, b) grid
    python benchmarks/ablate.py readings    # pairing, real branch, path velocity, lambda, norm, guidance, beta ...

Every run starts from the same teacher with the same data and seed, and is scored at one and four steps on mini-GenEval. Runs
that are already in the output file are kept, so an interrupted ablation goes on.
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

from apexflow.comparison.plan import VARIANTS
from apexflow.errors import Diverged
from apexflow.evaluation.runner import Settings, evaluate, write_json
from apexflow.generator import load
from apexflow.progress import console
from apexflow.training.config import Data, Optimizer, Preview, Recipe
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


def run_one(objective: dict[str, Any], given: argparse.Namespace, scratch: Path, cache: Path) -> dict[str, Any]:
    """Train and score one row; a run that diverges is marked, not fatal."""
    recipe = Recipe(
        output=str(scratch / "run"),
        model=given.model,
        objective=objective,
        data=Data(source="scenes", count=10000, seed=2, cache=str(cache)),
        optimizer=Optimizer(learning_rate=given.learning_rate, warmup=20),
        preview=Preview(every=10**6),
        steps=given.steps,
        batch=given.batch,
        ema_decay=0.98,
        checkpoint_every=10**6,
        sampling_steps=1,
        sampling_guidance=1.0,
    )
    try:
        model = train(recipe)
    except Diverged as error:
        return {"diverged": str(error)}
    generator = load(str(model))
    result: dict[str, Any] = {}
    for steps in (1, 4):
        report = evaluate(generator, Settings(steps=steps, guidance=1.0, per_prompt=given.per_prompt))
        kept = ("overall", "overall_se", "strict", "diversity", "tasks")
        result[f"steps_{steps}"] = {key: report[key] for key in kept}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--model", default="mini-teacher")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--per-prompt", type=int, default=2)
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
    rows = {}
    if output.is_file():
        earlier = json.loads(output.read_text())
        if earlier["settings"] != settings or earlier["teacher"] != given.model:
            sys.exit(f"{output} was made with {earlier['settings']} of {earlier['teacher']}: choose another --output")
        rows = earlier["rows"]
    cache = Path("runs/cache/ablate")
    for name, objective in GROUPS[given.group].items():
        if name in rows or (given.only and not any(word in name for word in given.only)):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            rows[name] = run_one(objective, given, Path(scratch), cache)
        write_json(output, {"rows": rows, "settings": settings, "teacher": given.model} | provenance())
        console.print(f"{name}: {summary(rows[name])}")


def summary(row: dict[str, Any]) -> str:
    if "diverged" in row:
        return "diverged"
    one, four = row["steps_1"], row["steps_4"]
    first = f"one step {one['overall']:.3f} (strict {one['strict']:.3f}, diversity {one['diversity'] or 0:.3f})"
    return f"{first}, four {four['overall']:.3f}"


if __name__ == "__main__":
    main()
