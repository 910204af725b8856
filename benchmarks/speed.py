"""Inference speed: the one-step student against the guided many-step teacher, text encoder and decoder included (Table 1).

    python benchmarks/speed.py [--student mini-student] [--teacher mini-teacher] [--output results/speed.json]

Latency: seconds for one picture at batch 1. Throughput: pictures a second at batch 10. Medians over repeats. The same for other
models and numbers: `apexflow bench`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from provenance import provenance

from apexflow.bench import Case, bench_table, sampling_speed
from apexflow.files import write_json
from apexflow.generator import load

BATCH = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="mini-student")
    parser.add_argument("--teacher", default="mini-teacher")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    teacher, student = load(given.teacher), load(given.student)
    cases = {"teacher, 50 steps, guided": (teacher, Case(given.teacher, 50))}
    cases |= {f"student, {n} step{'s' * (n > 1)}": (student, Case(given.student, n)) for n in (1, 2, 4)}
    result = {"batch": BATCH, "rows": sampling_speed(cases, BATCH)} | provenance()
    print(bench_table(result))
    if given.output:
        write_json(given.output, result)


if __name__ == "__main__":
    main()
