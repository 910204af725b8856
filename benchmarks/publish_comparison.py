"""Take a finished comparison into the repository: its numbers with their source, its page, its pictures.

python benchmarks/publish_comparison.py runs/compare
python benchmarks/tables.py
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from provenance import provenance

ROOT = Path(__file__).parent.parent


def told(text: str, folder: Path) -> str:
    """A text that says nothing of where on this machine the folder is."""
    for place in (folder.resolve(), folder.absolute()):
        text = text.replace(str(place), f"runs/{folder.resolve().name}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    if not (given.folder / "results.json").is_file():
        sys.exit(f"{given.folder} holds no finished comparison: run apexflow compare -o {given.folder}")
    results = json.loads((given.folder / "results.json").read_text())
    # Commit and device are those of this machine now: publish where, and as soon as, the comparison is done.
    results |= provenance() | {"command": results["command"]}
    (ROOT / "results" / "comparison.json").write_text(told(json.dumps(results, indent=1) + "\n", given.folder))
    (ROOT / "results" / "comparison.html").write_text(told((given.folder / "report.html").read_text(), given.folder))
    for kind in ("prompts", "nfe"):
        shutil.copy(given.folder / f"grid-{kind}.png", ROOT / "docs" / "images" / f"compare-{kind}.png")


if __name__ == "__main__":
    main()
