"""Inference speed: the one-step student against the guided many-step teacher, text encoder and decoder included (Table 1).

    python benchmarks/speed.py [--student mini-student] [--teacher mini-teacher] [--output results/speed.json]

Latency: seconds for one picture at batch 1. Throughput: pictures a second at batch 10. Medians over repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from provenance import provenance

from apexflow.generator import Generator, load

PROMPT = "a photo of a red star left of a blue circle"


def seconds(generator: Generator, batch: int, steps: int | None, guidance: float | None, repeats: int) -> float:
    """Median wall-clock seconds of one `generate` call."""
    measured = []
    for index in range(repeats + 1):
        began = time.perf_counter()
        generator.generate([PROMPT] * batch, steps, seed=index, guidance=guidance)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        measured.append(time.perf_counter() - began)
    return statistics.median(measured[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="mini-student")
    parser.add_argument("--teacher", default="mini-teacher")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    cases = {"teacher, 50 steps, guided": (load(given.teacher), 50, None, 3)}
    cases |= {f"student, {n} step{'s' * (n > 1)}": (load(given.student), n, None, 15) for n in (1, 2, 4)}
    rows = {}
    for name, (generator, steps, guidance, repeats) in cases.items():
        latency, ten = (seconds(generator, batch, steps, guidance, repeats) for batch in (1, 10))
        rows[name] = {"evaluations": generator.evaluations, "latency_s": latency, "throughput_per_s": 10 / ten}
    teacher = rows["teacher, 50 steps, guided"]
    for name, row in rows.items():
        row["speedup_latency"] = teacher["latency_s"] / row["latency_s"]
        row["speedup_throughput"] = row["throughput_per_s"] / teacher["throughput_per_s"]
        print(
            f"{name:26} NFE {row['evaluations']:3}  {row['latency_s'] * 1e3:8.1f} ms  {row['throughput_per_s']:7.1f} pictures/s"
            f"  x{row['speedup_latency']:.1f} latency  x{row['speedup_throughput']:.1f} throughput"
        )
    if given.output:
        given.output.write_text(json.dumps({"rows": rows} | provenance(), indent=1) + "\n")


if __name__ == "__main__":
    main()
