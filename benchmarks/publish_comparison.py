"""Take a finished comparison into the repository: its numbers with their source, its page, its pictures.

python benchmarks/publish_comparison.py runs/compare
python benchmarks/publish_comparison.py runs/compare-falling --name comparison-falling    # another one: its numbers only
python benchmarks/tables.py
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from provenance import provenance

ROOT = Path(__file__).parent.parent
NAME = "comparison"


def told(text: str, folder: Path) -> str:
    """A text that says nothing of where on this machine the folder is."""
    for place in (folder.resolve(), folder.absolute()):
        text = text.replace(str(place), f"runs/{folder.resolve().name}")
    return text


def commits(results: dict[str, Any], now: str, published: Path) -> dict[str, list[str]]:
    """Which runs were made at which commit: what the published results of the same plan do not have was made at this one."""
    before = json.loads(published.read_text()) if published.is_file() else {}
    known = before.get("commits", {}) if is_same(before.get("plan", {"recipe": {}}), results["plan"]) else {}
    named = {run for runs in known.values() for run in runs}
    new = [run for name, row in results["rows"].items() for run in runs_of(name, row) if run not in named]
    return known | ({now: [*known.get(now, []), *new]} if new else {})


def is_same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two plans are one; recipes have had fields since."""
    return before | {"recipe": now["recipe"] | before["recipe"]} == now


def runs_of(name: str, row: dict[str, Any]) -> list[str]:
    """Names of what was trained for a row (the teacher: scored); the first seed goes without one."""
    alone = [stage for stage in row.get("stages", {}).values() if stage.endswith("-alone")]
    seeds = ["", *(f", seed {run['seed']}" for run in row.get("runs", [])[1:])]
    return [f"{name}{seed}{stage}" for seed in seeds for stage in ("", *(f", {stage}" for stage in alone))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default=NAME, help=f"of the file below results/; only {NAME} has page and pictures")
    given = parser.parse_args()
    if not (given.folder / "results.json").is_file():
        sys.exit(f"{given.folder} holds no finished comparison: run apexflow compare -o {given.folder}")
    results = json.loads((given.folder / "results.json").read_text())
    # Commit and device are those of this machine now: publish where, and as soon as, the comparison is done.
    published = ROOT / "results" / f"{given.name}.json"
    origin = provenance()
    results |= origin | {"command": results["command"], "commits": commits(results, str(origin["commit"]), published)}
    published.write_text(told(json.dumps(results, indent=1) + "\n", given.folder))
    if given.name != NAME:
        return
    (ROOT / "results" / "comparison.html").write_text(told((given.folder / "report.html").read_text(), given.folder))
    for kind in ("prompts", "nfe"):
        shutil.copy(given.folder / f"grid-{kind}.png", ROOT / "docs" / "images" / f"compare-{kind}.png")


if __name__ == "__main__":
    main()
