"""mini-GenEval: GenEval's six tasks and scoring rules on scenes, with a programmatic detector. Never comparable to GenEval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from apexflow.data.scenes import COLORS, HELD_OUT, NUMBERS, RELATIONS, SHAPES, metadata_of
from apexflow.evaluation.detector import Detection, detect
from apexflow.evaluation.geneval import evaluate_image, filter_detections, overall_error, summarize

# As many prompts a task as GenEval has. Small tasks have fewer distinct prompts than that and repeat them, with other seeds.
TASKS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
HELD_OUT_PROMPTS = 100
PROMPT_SEED = 43
# The detector's score is an overlap of outlines. True shapes reach .8 and more even when small; half a
# shape or a blur stays below .7. GenEval's own .3 and .9 belong to its detector.
THRESHOLD = 0.7


def prompts() -> list[dict[str, Any]]:
    """553 prompts with GenEval metadata, free of the held-out pairs of shape and colour."""
    rng = np.random.default_rng(PROMPT_SEED)
    allowed = [(s, c) for s in SHAPES for c in COLORS if (s, c) not in HELD_OUT]
    return [_draw(tag, rng, allowed) for tag, count in TASKS.items() for _ in range(count)]


def held_out_prompts() -> list[dict[str, Any]]:
    """Prompts of the held-out pairs, which no training caption or picture has: half alone, half beside a known pair."""
    rng = np.random.default_rng(PROMPT_SEED + 1)
    unseen, allowed = sorted(HELD_OUT), [(s, c) for s in SHAPES for c in COLORS if (s, c) not in HELD_OUT]
    half = HELD_OUT_PROMPTS // 2
    single = [metadata_of("colors", [unseen[i % len(unseen)]], named=True) for i in range(half)]
    double = []
    for index in range(half):
        pair = unseen[index % len(unseen)]
        others = [p for p in allowed if p[0] != pair[0] and p[1] != pair[1]]
        double.append(metadata_of("color_attr", [pair, others[int(rng.integers(len(others)))]], named=True))
    return single + double


def _draw(tag: str, rng: np.random.Generator, allowed: Sequence[tuple[str, str]]) -> dict[str, Any]:
    first, second = _two_pairs(rng, allowed)
    named = tag in ("colors", "color_attr")
    if tag in ("single_object", "colors"):
        return metadata_of(tag, [first], named)
    if tag == "counting":
        return metadata_of(tag, [first], named, int(rng.integers(min(NUMBERS), max(NUMBERS) + 1)))
    relation = str(rng.choice(RELATIONS)) if tag == "position" else None
    return metadata_of(tag, [first, second], named, relation=relation)


def _two_pairs(rng: np.random.Generator, allowed: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two allowed pairs that share neither shape nor colour, as GenEval's attribute prompts do."""
    while True:
        first, second = (allowed[int(i)] for i in rng.choice(len(allowed), 2, replace=False))
        if first[0] != second[0] and first[1] != second[1]:
            return first, second


def score_picture(image: Image.Image, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """One row of results: `correct` by GenEval's rules, `strict` if besides nothing else is in the picture, and why not."""
    everything = detect(image)  # recognisable or not: what the strict score counts
    found = [d for d in everything if d.score > THRESHOLD]
    kept = filter_detections(_by_class(found), metadata, threshold=THRESHOLD, counting_threshold=THRESHOLD)
    correct, reason = evaluate_image(kept, metadata, _color_lookup(found))
    wanted = sum(clause["count"] for clause in metadata["include"])
    strict = correct and len(everything) == wanted
    return {
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "metadata": dict(metadata),
        "correct": bool(correct),
        "strict": bool(strict),
        "reason": reason,
        "found": [f"{d.color} {d.shape}" for d in found],
    }


def _by_class(found: Sequence[Detection]) -> dict[str, ArrayLike]:
    return {
        shape: np.array([(*d.box, d.score) for d in found if d.shape == shape], dtype=np.float32).reshape(-1, 5)
        for shape in SHAPES
    }


def _color_lookup(found: Sequence[Detection]) -> Any:
    """The colour of a box is that of the detection it came from."""
    # Boxes lie on whole pixels, so they compare exactly.
    colors: dict[Any, str] = {(d.shape, d.box): d.color for d in found}
    return lambda shape, boxes: [colors[shape, tuple(float(side) for side in box[:4])] for box in boxes]


def aggregate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means by task, their mean with its standard error over pictures, and the strict ones."""
    loose = summarize(rows)
    strict = summarize([{**row, "correct": row["strict"]} for row in rows])
    return loose | {
        "overall_se": overall_error(rows),
        "strict": strict["overall"],
        "strict_tasks": strict["tasks"],
        "pictures": len(rows),
    }
