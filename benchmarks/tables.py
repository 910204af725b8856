"""Write the tables of README.md, docs/ and the model cards: no number is typed by hand.

    python benchmarks/tables.py            # rewrite the marked sections
    python benchmarks/tables.py --check    # exit 1 if a section differs from its source

A section stands between `<!-- NAME -->` and `<!-- /NAME -->`. It comes from a JSON file under results/, and says so where that is
not there yet, or lists what the code knows (`reference.py`).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from reference import LISTS
from step_cost import work_ratio

from apexflow.comparison.plan import IMAGES
from apexflow.comparison.tables import TITLES, about_errors, budget_table, counted, kept_budgets, table, with_error

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
CARDS = ("mini-teacher", "mini-student")
DOCUMENTS = (
    *("README.md", "docs/comparison.md", "docs/evaluation.md", "docs/models.md", "docs/paper.md", "docs/recipe.md"),
    *("docs/speed.md", "docs/training.md"),
    *(f"apexflow/assets/{name}/README.md" for name in CARDS),
)


def source(result: dict[str, Any], file: str) -> str:
    commits = [commit[:9] + "+changes" * ("+" in commit) for commit in result.get("commits", [result["commit"]])]
    return f"`{result['command']}` at {' and '.join(commits)} on {result['device']}; `results/{file}`."


def scores(result: dict[str, Any]) -> str:
    tasks = list(next(iter(result["scores"].values()))["tasks"])
    head = ["", "NFE", *[t.replace("_", " ") for t in tasks], "overall", "strict", "held out", "diversity", "seeds"]
    rows = [head]
    for name, row in result["scores"].items():
        values = [f"{row['tasks'][task]:.2f}" for task in tasks]
        overall = f"**{row['overall']:.3f}** ±{row['overall_se']:.3f}"
        rest = [f"{row[key]:.3f}" for key in ("strict", "held_out", "diversity")]
        rows.append([name, str(row["evaluations"]), *values, overall, *rest, str(row["seeds"])])
    origins = dict.fromkeys(source(row, "scores.json") for row in result["scores"].values())
    return "\n\n".join([table(rows), folded(origins)])


def folded(lines: Iterable[str]) -> str:
    return "\n\n".join(["<details><summary>commands, commits, device</summary>", *lines, "</details>"])


def card(name: str) -> Callable[[dict[str, Any]], str]:
    """The scores of one shipped model, for its card."""
    return lambda result: scores(
        {"scores": {key: row for key, row in result["scores"].items() if row["model"] == name}}
    )


def speed(result: dict[str, Any]) -> str:
    rows = [["", "NFE", "latency, batch 1", "throughput, batch 10", "faster by latency", "by throughput"]]
    for name, row in result["rows"].items():
        times = [f"{row['latency_s'] * 1e3:.1f} ms", f"{row['throughput_per_s']:.1f}/s"]
        gains = [f"{row[key]:.1f} times" for key in ("speedup_latency", "speedup_throughput")]
        rows.append([name, str(row["evaluations"]), *times, *gains])
    return table(rows)


def real_size(result: dict[str, Any]) -> str:
    """Training steps: a row of the table for both methods."""
    rows = [["", "rows", "APEX", "flow matching", "ratio", "APEX, rate", "memory held", "planned"]]
    by_key = {(row["case"], row["batch"], row["method"]): row for row in result["rows"] if "seconds" in row}
    for case, batch in dict.fromkeys((r["case"], r["batch"]) for r in result["rows"] if r["method"] == "apex"):
        row = by_key.get((case, batch, "apex"))
        if row is None:  # it had no room
            rows.append([case, str(batch), "out of memory", *[""] * 5])
            continue
        other = by_key.get((case, batch, "flow_matching"))
        times = [f"{other['seconds']:.2f} s", f"{row['seconds'] / other['seconds']:.2f} times"] if other else ["", ""]
        held = f"{row['reserved_gib']:.1f} GiB" if row["reserved_gib"] else ""
        rate = f"{row['tflops_a_second']:.0f} TFLOP/s" if row["tflops_a_second"] else ""
        rows.append([case, str(batch), f"{row['seconds']:.2f} s", *times, rate, held, f"{row['planned_gib']:.1f} GiB"])
    return table(rows)


def real_speed(result: dict[str, Any]) -> str:
    rows = [["", "size", "", "NFE", "latency, batch 1", "throughput", "faster by latency", "by throughput"]]
    for case in result["cases"]:
        for name, row in case["rows"].items():
            rate = f"{row['throughput_per_s']:.2f}/s at batch {case['batch']}"
            gains = [f"{row[key]:.1f} times" for key in ("speedup_latency", "speedup_throughput")]
            start = [case["case"], str(case["size"]), name, str(row["evaluations"])]
            rows.append([*start, f"{row['latency_s']:.3f} s", rate, *gains])
    return table(rows)


def step_cost(result: dict[str, Any]) -> str:
    rows = [["tuning", "passes, with checkpointing", "time, without", "rows with / without gradient", "peak memory"]]
    for kind in ("full", "lora"):
        row = result[kind]
        passes = row["passes"]["apex"]
        counted = f"{passes['with_gradient']:.2f} / {passes['without_gradient']:.2f}"
        by_passes = f"{work_ratio(row['passes'], kind):.3f} times"
        rest = [f"{row['time_ratio']:.2f} times", counted, f"{row['memory_ratio']:.2f} times"]
        rows.append([kind, by_passes, *rest])
    return table(rows)


def ablation(result: dict[str, Any]) -> str:
    """Rows of one run or of several; a row of an earlier version has one and does not say so."""
    rows = [["", "runs", "one step", "strict", "diversity", "four steps"]]
    for name, row in result["rows"].items():
        lasting, all_runs = row.get("lasting", 1), len(row.get("runs", [row]))
        runs = str(all_runs) if lasting == all_runs else f"{lasting} of {all_runs}"
        if "diverged" in row:
            rows.append([name, f"0 of {all_runs}", "diverged", "", "", ""])
            continue
        one, four = row["steps_1"], row["steps_4"]
        numbers = [with_error(one, key) for key in ("overall", "strict", "diversity")]
        rows.append([name, runs, *numbers, with_error(four, "overall")])
    settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in result["settings"].items())
    error = "± is a standard error: over the runs of a row, which differ by the seed of training, or over a single run's pictures"
    return f"{settings}. {error}.\n\n{table(rows)}"


def scoring(result: dict[str, Any]) -> str:
    names = {
        "fid_square_root_2048": "FID of two sets of 2048 features",
        "mini_geneval": "mini-GenEval, 553 x 4 pictures",
    }
    rows = [["scoring alone", "processor time"]]
    rows += [[title, f"{result[name]['processor_seconds']:.1f} s"] for name, title in names.items()]
    one = {name: network["processor_seconds"] for name, network in result["networks"].items()}
    rows += [
        ["Mask2Former Swin-S, one picture", f"{one['mask2former']:.1f} s"],
        ["CLIP ViT-L/14, one picture and its prompt", f"{one['clip']:.1f} s"],
        ["FID's Inception, one picture", f"{one['inception']:.1f} s"],
        ["GenEval, from these: 2,212 pictures, 1,176 colours", hours(2212 * one["mask2former"] + 1176 * one["clip"])],
        [
            "MJHQ-30K, from these: 30,000 pictures and as many references",
            hours(6e4 * one["inception"] + 3e4 * one["clip"]),
        ],
    ]
    return table(rows)


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.0f} h"


def comparison(result: dict[str, Any]) -> str:
    """The budgets of `apexflow compare`, and what they are; a longer one has that in images alone."""
    plan, rows = result["plan"], result["rows"]
    prompts = "all prompts" if plan["limit"] is None else f"{plan['limit']} prompts"
    told = f"{plan['images']:,} images a run at batch {plan['recipe']['batch']}; {prompts} x {plan['per_prompt']} pictures x "
    told += f"{counted(plan['seeds'], 'seed')} of the noise."
    tables = [
        f"{TITLES[budget]}:\n\n{table(budget_table(rows, budget, plan['nfe'], result.get('true_pictures')))}"
        for budget in kept_budgets(rows)
    ]
    return "\n\n".join([f"{told} {about_errors(rows)}", *tables])


def comparison_short(result: dict[str, Any]) -> str:
    """What the comparisons say of one step and of four, and what a training step costs."""
    lengths = [result, json.loads((RESULTS / "comparison-falling.json").read_text())]
    images = [f"{one['plan']['images']:,}" for one in lengths]
    rows = [
        ["", *[f"{steps}, {n}" for steps in ("one step", "four") for n in images], "time", "memory", "further networks"]
    ]
    for name, row in result["rows"].items():
        cells = [_overall(one["rows"].get(name), steps) for steps in ("1", "4") for one in lengths]
        cost = ["" if row.get(key) is None else f"{row[key]:.1f}" for key in ("time", "memory")]
        rows.append([name, *cells, *cost, ", ".join(row.get("further", []))])
    return table(rows)


def _overall(row: dict[str, Any] | None, steps: str) -> str:
    if row is None:
        return ""
    report = row.get("budgets", {}).get(IMAGES, {}).get("nfe", {}).get(steps)
    return "diverged" if report is None else f"{report['overall']:.2f} ±{report['overall_se']:.2f}"


def data_steps(result: dict[str, Any]) -> str:
    columns = sorted({steps for row in result["rows"].values() for steps in row}, key=int)
    rows = [["", *[f"{steps} steps" for steps in columns]]]
    for name, row in result["rows"].items():
        cells = [row.get(steps, {}) for steps in columns]
        rows.append([name, *["diverged" if "diverged" in c else f"{c['overall']:.3f}" if c else "" for c in cells]])
    return table(rows)


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "scores": ("scores.json", scores),
    "speed": ("speed.json", speed),
    "speed-gpu": ("speed-gpu.json", speed),
    "real-size": ("real-size.json", real_size),
    "real-speed": ("real-speed.json", real_speed),
    "step-cost": ("step-cost.json", step_cost),
    "scoring": ("scoring.json", scoring),
    "comparison": ("comparison.json", comparison),
    "comparison-short": ("comparison.json", comparison_short),
    "comparison-longer": ("comparison-longer.json", comparison),
    "comparison-falling": ("comparison-falling.json", comparison),
    "data-steps": ("data-steps.json", data_steps),
    "weights": ("ablate-weights.json", ablation),
    "shift": ("ablate-shift.json", ablation),
    "readings": ("ablate-readings.json", ablation),
    **{name: ("scores.json", card(name)) for name in CARDS},
}


def render(name: str) -> str:
    if name in LISTS:
        return LISTS[name]()
    file, write = SECTIONS[name]
    path = RESULTS / file
    if not path.is_file():
        return "Not measured yet."
    result = json.loads(path.read_text())
    if "commit" not in result:
        return write(result)
    return f"{write(result)}\n\n{folded([source(result, file)])}"


def fill(text: str) -> str:
    def section(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{render(name)}\n<!-- /{name} -->"

    names = "|".join(map(re.escape, [*SECTIONS, *LISTS]))
    return re.sub(rf"<!-- ({names}) -->\n.*?<!-- /\1 -->", section, text, flags=re.DOTALL)


def main() -> None:
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text()
        after = fill(before)
        if after != before:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(after)
    if stale and "--check" in sys.argv:
        sys.exit(f"tables differ from their source: {', '.join(stale)}; run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
