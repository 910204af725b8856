"""What an APEX step costs against a flow-matching step with the same rows: passes, time, memory.

    python benchmarks/step_cost.py [--model mini-teacher] [--batch 32] [--steps 10] [--output results/step-cost.json]

Steps of the two methods alternate, so that a noisy machine slows both. Memory is the growth of the process's peak resident
set over what it held before the first step, each case in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from provenance import provenance

from apexflow.bench import METHODS, begin, step_seconds
from apexflow.files import write_json
from apexflow.training.passes import Pass, cost
from apexflow.training.run import Run
from apexflow.training.spent import peak_gib
from apexflow.training.step import training_step


def rows_a_row(run: Run, steps: int) -> dict[str, float]:
    """Rows through the network over those of the batches, with a graph and without, in some steps: which are guided is chance."""
    rows = {"with_gradient": 0, "without_gradient": 0}
    velocity = run.backbone.velocity

    def counted(network, x_t, t, c):
        graph = torch.is_grad_enabled() and any(p.requires_grad for p in network.parameters())
        rows["with_gradient" if graph else "without_gradient"] += len(x_t)
        return velocity(network, x_t, t, c)

    run.backbone.velocity = counted
    for _ in range(steps):
        training_step(run)
    del run.backbone.velocity
    return {name: count / (steps * run.recipe.batch) for name, count in rows.items()}


def work_ratio(passes: dict[str, dict[str, float]], kind: str) -> float:
    """The passes of an APEX step over those of a flow-matching step, with checkpointing; backward counted as `cost` has it."""

    def work(counted: dict[str, float]) -> float:
        graph, without = (round(1000 * counted[name]) for name in ("with_gradient", "without_gradient"))
        return cost([Pass("any", graph, True), Pass("any", without, False)], checkpointing=True, frozen=kind == "lora")

    return work(passes["apex"]) / work(passes["flow_matching"])


def memory(method: str, kind: str, model: str, batch: int, folder: Path) -> float:
    """Growth of the peak resident set over three steps, MiB, in a fresh process."""
    given = ["--memory-of", method, kind, "--model", model, "--batch", str(batch), "--folder", str(folder)]
    done = subprocess.run([sys.executable, __file__, *given], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def print_memory(method: str, kind: str, model: str, batch: int, folder: Path) -> None:
    run = begin(method, kind, model, batch, folder)
    before = resident()
    for _ in range(3):
        training_step(run)
    print(1024 * peak_gib(torch.device("cpu")) - before)


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-teacher")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", nargs=2, metavar=("METHOD", "KIND"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of:
        scratch = Path(tempfile.mkdtemp(dir=given.folder))
        return print_memory(*given.memory_of, given.model, given.batch, scratch)
    result = {"model": given.model, "batch": given.batch} | provenance()
    for kind in ("full", "lora"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            runs = {method: begin(method, kind, given.model, given.batch, folder) for method in METHODS}
            passes = {name: rows_a_row(run, given.steps) for name, run in runs.items()}
            seconds = step_seconds(runs, given.steps)
            del runs
            peaks = {method: memory(method, kind, given.model, given.batch, folder) for method in METHODS}
        result[kind] = {
            "passes": passes,
            "seconds": seconds,
            "time_ratio": seconds["apex"] / seconds["flow_matching"],
            "peak_mib": peaks,
            "memory_ratio": peaks["apex"] / peaks["flow_matching"],
        }
        print(f"{kind}: an APEX step takes {result[kind]['time_ratio']:.2f} times a flow-matching step")
        ratio = work_ratio(passes, kind)
        print(f"  by passes, with checkpointing: {ratio:.2f} times; rows through the network a row: {passes}")
        print(f"  peak memory over the idle process: {peaks} MiB, ratio {result[kind]['memory_ratio']:.2f}")
    if given.output:
        write_json(given.output, result)


if __name__ == "__main__":
    main()
