"""Score models on mini-GenEval at several step counts, all 553 prompts x 4 pictures, three seeds, held-out pairs apart.

python benchmarks/score.py NAME=MODEL[:STEPS[:GUIDANCE]] ... [--seeds 3] [--per-prompt 4] [--output results/scores.json]

python benchmarks/score.py teacher=mini-teacher:50 student=mini-student:1 --output results/scores.json

Rows already in the output are kept, but one that is asked for again is scored anew if it is of another commit. A row's pictures
stand in runs/scores until it is done, so that an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from provenance import provenance

from apexflow.bench import Case
from apexflow.evaluation.runner import EvaluationSettings, evaluate, over_seeds
from apexflow.evaluation.table import score_table
from apexflow.files import write_json
from apexflow.generator import load

PICTURES = Path("runs/scores")


def scored(name: str, case: Case, pictures: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The row of one case, over all seeds, with the held-out pairs beside it."""
    generator, report = load(case.model), {}
    for suite in ("mini-geneval", "mini-geneval-held-out"):
        reports = []
        for seed in range(given.seeds):
            settings = EvaluationSettings(
                suite, case.steps, case.guidance, per_prompt=given.per_prompt, seed=seed, limit=given.limit
            )
            reports.append(evaluate(generator, settings, pictures / f"{suite}-{seed}", name))
        report[suite] = over_seeds(reports)
    held_out = report["mini-geneval-held-out"]
    extra = {"held_out": held_out["overall"], "held_out_tasks": held_out["tasks"]}
    return report["mini-geneval"] | extra | {"model": case.model, "seeds": given.seeds} | provenance()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="NAME=MODEL[:STEPS[:GUIDANCE]]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--per-prompt", type=int, default=4)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    scores: dict[str, Any] = {}
    if given.output and given.output.is_file():
        scores = json.loads(given.output.read_text())["scores"]  # cases already scored are kept
    for case in given.cases:
        name, _, rest = case.partition("=")
        sampled = Case.read(rest)
        if name in scores and scores[name]["commit"] == provenance()["commit"]:
            continue
        pictures = PICTURES / re.sub(r"\W+", "-", name)
        scores[name] = scored(name, sampled, pictures, given)
        if given.output:
            write_json(given.output, {"scores": scores})
        shutil.rmtree(pictures)
    print(score_table(scores))


if __name__ == "__main__":
    main()
