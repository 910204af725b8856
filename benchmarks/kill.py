"""Kill a run at a random step, resume it, and compare it bit for bit with one that nobody killed, five times.

python benchmarks/kill.py --processes 2 parallel=fsdp --output results/kill.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from provenance import provenance

from apexflow.backbones.miniature import build_miniature
from apexflow.data.scenes import vocabulary
from apexflow.files import write_json
from apexflow.training.checkpoint import checkpoints, load_checkpoint
from apexflow.training.journal import read_metrics

RECIPE = """
data: {source: scenes, count: 64, seed: 2}
batch: 4
checkpoint_every: 3
preview: {every: 1000, count: 2}
"""
LIBRARIES = [
    "apexflow.training.loop",
    "apexflow.generator",
    "diffusers",
    "transformers",
    "peft",
    "torch.utils.tensorboard",
]


def launch(processes: int, recipe: Path, overrides: list[str], resume: bool = False) -> list[Any]:
    """The processes of a run, placed as torchrun places them, forked from one that has the libraries loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": processes}
    arguments = ["train", str(recipe), *overrides, *["--resume"] * resume]
    started = [
        context.Process(target=command, args=(place | {"RANK": rank, "LOCAL_RANK": rank}, arguments))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    return started


def command(place: dict[str, object], arguments: list[str]) -> None:
    from apexflow.cli import main as apexflow

    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    sys.argv = ["apexflow", *arguments]
    apexflow()


def finished(processes: list[Any]) -> None:
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a run has failed")


def kill_at(processes: list[Any], folder: Path, step: int) -> int:
    """SIGKILL to every process of a run once `step` is recorded; the step that was then reached."""
    while len(read_metrics(folder)) < step:
        if not all(process.is_alive() for process in processes):
            raise SystemExit("a run ended before it could be killed")
        time.sleep(0.005)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    return len(read_metrics(folder))


def same(one: Path, two: Path) -> bool:
    """Equal losses at every step, and equal tensors in the last checkpoint, to the bit."""
    losses = [[(m["step"], m["loss"]) for m in read_metrics(folder)] for folder in (one, two)]
    tensors = [load_checkpoint(checkpoints(folder / "checkpoints")[-1]).tensors for folder in (one, two)]
    flat = [{f"{part}/{name}": t for part, named in each.items() for name, t in named.items()} for each in tensors]
    equal = flat[0].keys() == flat[1].keys() and all(torch.equal(flat[0][name], flat[1][name]) for name in flat[0])
    return losses[0] == losses[1] and equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="recipe keys, such as tuning.kind=lora parallel=fsdp")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the steps to kill at")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    dice, trials = random.Random(given.seed), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = folder / "recipe.yaml"
        model = folder / "model"
        model.mkdir()
        backbone = build_miniature(vocabulary(), seed=0, width=32, depth=1)
        backbone.save(model, backbone.settings)
        recipe.write_text(f"output: {folder / 'whole'}\nmodel: {model}\nsteps: {given.steps}{RECIPE}")
        common = [f"data.cache={folder / 'cache'}", *given.overrides]
        finished(launch(given.processes, recipe, common))
        for trial in range(given.times):
            output = folder / f"trial-{trial}"
            overrides = [*common, f"output={output}"]
            killed_at = kill_at(launch(given.processes, recipe, overrides), output, dice.randint(1, given.steps - 1))
            finished(launch(given.processes, recipe, overrides, resume=True))
            trials.append({"killed_at": killed_at, "same": same(folder / "whole", output)})
            print(f"killed at step {killed_at}: {'the same' if trials[-1]['same'] else 'DIFFERENT'}", flush=True)
    result = vars(given) | {"output": None, "trials": trials} | provenance()
    if given.output:
        write_json(given.output, result)
    sys.exit(not all(trial["same"] for trial in trials))


if __name__ == "__main__":
    main()
