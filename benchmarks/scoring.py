"""How long scoring takes beside the networks: FID's square root at 2048 features, and all of mini-GenEval's pictures.

    python benchmarks/scoring.py --output results/scoring.json

Wall-clock seconds depend on what else the machine does; processor seconds (all threads together) hardly do.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from provenance import provenance

from apexflow.data.scenes import draw_scene, render
from apexflow.evaluation.drawing import Drawing
from apexflow.evaluation.fid import fid_from_statistics
from apexflow.evaluation.files import save_picture, write_json, write_text
from apexflow.evaluation.runner import Settings, score_folder
from apexflow.evaluation.suite import Tools
from apexflow.evaluation.suites import make_suite

FEATURES = 2048


def timed(work: Callable[[], Any]) -> dict[str, float]:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return {
        "seconds": round(time.perf_counter() - wall, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
    }


def square_root() -> dict[str, float]:
    """The distance of two sets of features of full rank."""
    rng = np.random.default_rng(0)
    covariances = [np.cov(rng.standard_normal((3000, FEATURES)), rowvar=False) for _ in range(2)]
    means = np.zeros((2, FEATURES))
    return timed(lambda: fid_from_statistics(means[0], covariances[0], means[1], covariances[1]))


def mini_geneval() -> dict[str, Any]:
    """Scoring a folder of 553 x 4 scenes, reading the pictures included."""
    suite = make_suite("mini-geneval", Tools())
    prompts, _ = suite.choose(None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pictures"
        tags = {prompt.index: prompt.metadata["tag"] for prompt in prompts}
        drawings: list[Drawing] = suite.drawings(prompts)
        for number, drawing in enumerate(drawings):
            scene = draw_scene(np.random.default_rng(number), tags[number // suite.per_prompt])
            save_picture(render(scene.things), folder / drawing.path, Path(scratch) / "partial")
        for name, text in suite.notes(prompts).items():
            write_text(folder / name, text)
        return {"pictures": len(drawings)} | timed(lambda: score_folder(folder, Settings()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    result = {"fid_square_root_2048": square_root(), "mini_geneval": mini_geneval()} | provenance()
    print(result)
    if given.output:
        write_json(given.output, result)


if __name__ == "__main__":
    main()
