"""The paper's Table 5 in miniature: which data, and how many steps of APEX on them; mini-GenEval at one step.

    python benchmarks/data_steps.py [--steps 100 200 400] [--only words] [--output results/data-steps.json]

Rows: drawn scenes by their number, captions of scenes without pictures (for which only the endpoint objective is left), and
whatever `--data NAME=PATH` adds (pictures that `apexflow synthesize` drew, say). One run a row, scored at each number of
steps. Each cell is written as it is done and kept, and an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from provenance import provenance

from apexflow.data.scenes import scenes
from apexflow.errors import Diverged
from apexflow.evaluation.runner import EvaluationSettings, evaluate
from apexflow.files import write_json
from apexflow.generator import load
from apexflow.progress import console
from apexflow.training.config import Data, short_recipe
from apexflow.training.loop import train

HOME = Path("runs/data-steps")
SIZES = (100, 1000, 10000)
SEED = 2
ALONE = f"{SIZES[-1]:,} captions alone, endpoint only"


def rows(given: list[str]) -> dict[str, Data]:
    """The data of every row; captions are written where the row needs them."""
    found = {f"{count:,} scenes": Data(source="scenes", count=count, seed=SEED) for count in SIZES}
    captions = HOME / "captions.txt"
    captions.parent.mkdir(parents=True, exist_ok=True)
    captions.write_text("".join(f"{scene.caption}\n" for scene in scenes(SIZES[-1], SEED)))
    found[ALONE] = Data(source=str(captions))
    for one in given:
        name, _, path = one.partition("=")
        found[name] = Data(source=path)
    return found


def run_row(name: str, data: Data, given: argparse.Namespace, cells: dict[str, Any], keep: Callable[[], None]) -> None:
    """One run, stopped and scored at each number of steps, `keep` called after each; marked from where it diverges on.

    A cell has to be kept before the run goes on: its checkpoint is that of the last cell alone.
    """
    folder = HOME / name.replace(" ", "-").replace(",", "")
    for steps in given.steps:
        if str(steps) in cells:
            continue
        recipe = short_recipe(
            str(folder),
            model=given.model,
            data=data,
            objective={"path_weight": 0.0} if name == ALONE else {},
            learning_rate=given.learning_rate,
            steps=steps,
            batch=given.batch,
        )
        try:
            model = train(recipe, resume=folder.is_dir() and any(folder.iterdir()))
        except Diverged as error:
            cells |= {str(more): {"diverged": str(error)} for more in given.steps if more >= steps}
            keep()
            return
        settings = EvaluationSettings(steps=1, guidance=1.0, per_prompt=given.per_prompt, limit=given.limit)
        report = evaluate(load(str(model)), settings, name=f"{name}, {steps} steps")
        cells[str(steps)] = {key: report[key] for key in ("overall", "overall_se", "strict", "tasks")}
        keep()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-teacher")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--per-prompt", type=int, default=1)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--data", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--only", nargs="*", help="Only the rows whose name holds one of these words.")
    parser.add_argument("--output", type=Path, default=Path("results/data-steps.json"))
    given = parser.parse_args()
    given.steps.sort()
    settings = {key: getattr(given, key) for key in ("batch", "learning_rate", "per_prompt", "limit")}
    table: dict[str, Any] = {}
    if given.output.is_file():
        earlier = json.loads(given.output.read_text())
        if earlier["settings"] != settings or earlier["teacher"] != given.model:
            sys.exit(
                f"{given.output} was made with {earlier['settings']} of {earlier['teacher']}: choose another --output"
            )
        table = earlier["rows"]

    def keep() -> None:
        write_json(given.output, {"rows": table, "settings": settings, "teacher": given.model} | provenance())

    for name, data in rows(given.data).items():
        if given.only and not any(word in name for word in given.only):
            continue
        run_row(name, data, given, table.setdefault(name, {}), keep)
        console.print(f"{name}: {', '.join(f'{steps} steps {shown(cell)}' for steps, cell in table[name].items())}")
    shutil.rmtree(HOME, ignore_errors=True)


def shown(cell: dict[str, Any]) -> str:
    return "diverged" if "diverged" in cell else f"{cell['overall']:.3f}"


if __name__ == "__main__":
    main()
