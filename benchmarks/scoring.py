"""How long scoring takes: FID's square root at 2048 features, all of mini-GenEval's pictures, and each network on one picture.

    python benchmarks/scoring.py --output results/scoring.json

The networks have their real sizes and random weights, which take as long as trained ones. Wall-clock seconds depend on what
else the machine does; processor seconds (all threads together) hardly do.
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
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "evaluation"))

import numpy as np
from little import inception_tensors
from PIL import Image
from provenance import provenance
from transformers import CLIPConfig, CLIPModel, Mask2FormerForUniversalSegmentation

from apexflow.data.scenes import draw_scene, render
from apexflow.evaluation.clip import Clip
from apexflow.evaluation.drawing import Drawing
from apexflow.evaluation.fid import fid_from_statistics
from apexflow.evaluation.files import save_picture
from apexflow.evaluation.geneval import Mask2FormerDetector
from apexflow.evaluation.geneval.convert import detector_config
from apexflow.evaluation.inception import Inception, prepare
from apexflow.evaluation.runner import EvaluationSettings, score_folder
from apexflow.evaluation.suite import Tools
from apexflow.evaluation.suites import make_suite
from apexflow.files import write_json, write_text

FEATURES = 2048
SIDE = 1024  # of the picture that each network looks at
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


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
            save_picture(render(scene.things), folder / drawing.path)
        for name, text in suite.notes(prompts).items():
            write_text(folder / name, text)
        return {"pictures": len(drawings)} | timed(lambda: score_folder(folder, EvaluationSettings()))


def networks() -> dict[str, dict[str, float]]:
    """The preparation of the picture included."""
    picture = Image.effect_noise((SIDE, SIDE), 60).convert("RGB")
    finder = Mask2FormerDetector(Mask2FormerForUniversalSegmentation(detector_config()))
    inception = Inception(inception_tensors(1))
    large = CLIPConfig(vision_config={**VISION, "patch_size": 14}, text_config=TEXT, projection_dim=768)
    clip = Clip(CLIPModel(large), lambda text, **_: {"input_ids": [0, 1]})
    work: dict[str, Callable[[], Any]] = {
        "mask2former": lambda: finder.detect(picture),
        "clip": lambda: clip.score([picture], [""]),
        "inception": lambda: inception.features(prepare(picture, "sana", SIDE)[None]),
    }
    return {name: timed(once) for name, once in work.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    result = {
        "fid_square_root_2048": square_root(),
        "mini_geneval": mini_geneval(),
        "networks": networks(),
    } | provenance()
    print(result)
    if given.output:
        write_json(given.output, result)


if __name__ == "__main__":
    main()
