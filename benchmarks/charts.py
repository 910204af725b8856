"""Draw the curves of docs/comparison.md from the JSON files under results/: score over the number of evaluations.

python benchmarks/charts.py            # rewrite docs/images/compare-curves*.svg
python benchmarks/charts.py --check    # exit 1 if a drawing differs from its JSON
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from apexflow.comparison.chart import lines_chart
from apexflow.comparison.plan import IMAGES

ROOT = Path(__file__).parent.parent
DRAWINGS = {
    "comparison": "compare-curves",
    "comparison-longer": "compare-curves-longer",
    "comparison-falling": "compare-curves-falling",
}
# What the page says in its style sheet; a picture by itself has none.
STYLE = (
    "svg{background:#fff;font-family:sans-serif}text{fill:#555;font-size:11px}path{fill:none;stroke-linejoin:round}"
    ".rule{stroke:#ddd;stroke-width:1}"
)


def curves(results: dict[str, Any]) -> str:
    """An SVG picture: mini-GenEval at equal images, a line a method, with errors where it has several runs."""
    rows, nfe = results["rows"], [str(steps) for steps in results["plan"]["nfe"]]
    ends = {name: row["budgets"][IMAGES] for name, row in rows.items()}
    series = {name: [end["nfe"][steps]["overall"] for steps in nfe] for name, end in ends.items()}
    errors = {
        name: [end["nfe"][steps]["overall_se"] for steps in nfe] for name, end in ends.items() if end.get("runs", 1) > 1
    }
    figure = lines_chart("mini-GenEval over the number of evaluations, equal images", nfe, series, errors)
    (drawing,) = re.findall(r"<svg.*</svg>", figure, re.DOTALL)
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="840" height="354"{drawing[4 : drawing.index(">") + 1]}'
    return f"{opening}<style>{STYLE}</style>{drawing[drawing.index('>') + 1 :]}\n"


def main() -> None:
    for file, name in DRAWINGS.items():
        drawn = curves(json.loads((ROOT / "results" / f"{file}.json").read_text()))
        path = ROOT / "docs" / "images" / f"{name}.svg"
        if "--check" not in sys.argv:
            path.write_text(drawn)
        elif not path.is_file() or path.read_text() != drawn:
            sys.exit(f"{path.relative_to(ROOT)} differs from results/{file}.json: run python benchmarks/charts.py")


if __name__ == "__main__":
    main()
