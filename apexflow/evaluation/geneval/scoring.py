"""GenEval's scoring rules, without a detector: boxes in, verdicts and means out.

Source: GenEval (djghosh13/geneval af4902f, MIT), evaluation/evaluate_images.py and summary_scores.py, restated. A box
is [x1, y1, x2, y2] in pixels, x2 and y2 exclusive; a detection is a box and its score. The official options have their
defaults; that for overlap, max_overlap, is 1, which drops nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from apexflow.errors import UserError
from apexflow.evaluation.geneval.prompt_set import COLORS

Array = NDArray[Any]
ColorOf = Callable[[str, Array], Sequence[str]]

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
POSITION_THRESHOLD = 0.1


def filter_detections(
    detections: Mapping[str, ArrayLike], metadata: Mapping[str, Any], **thresholds: float
) -> dict[str, Array]:
    """The detections that count for this prompt, best first.

    detections: {class name: (n, 5) [x1, y1, x2, y2, score]} in the detector's order. thresholds: as `kept_indices` takes them.
    Returns {class name: (k, 5)} with 1 <= k <= MAX_OBJECTS; a class with nothing left is absent.
    """
    rows = {name: as_rows(found) for name, found in detections.items()}
    return {name: rows[name][index] for name, index in kept_indices(rows, metadata, **thresholds).items()}


def kept_indices(
    detections: Mapping[str, ArrayLike],
    metadata: Mapping[str, Any],
    *,
    threshold: float = THRESHOLD,
    counting_threshold: float = COUNTING_THRESHOLD,
) -> dict[str, list[int]]:
    """Row numbers of what `filter_detections` keeps, in its order: the way from a kept box to its mask."""
    # The tag chooses the threshold, not the presence of an exclude clause.
    least = float(counting_threshold if metadata.get("tag") == "counting" else threshold)
    kept = {}
    for name, found in detections.items():
        rows = as_rows(found)
        scores = rows[:, 4]
        ranked = np.argsort(scores)[::-1]  # the official call: in float32, tied scores come out reversed
        order: list[int] = ranked[scores[ranked] > least][:MAX_OBJECTS].tolist()
        if order:
            kept[name] = order
    return kept


def _floating(values: ArrayLike) -> Array:
    """As an array of floating numbers: float32, as the detector's own output is, unless they are such already."""
    array = np.asarray(values) if hasattr(values, "dtype") else np.asarray(values, dtype=np.float32)
    return array if array.dtype.kind == "f" else array.astype(np.float32)


def as_rows(found: ArrayLike) -> Array:
    """(n, 5) floating array of one class's detections."""
    rows = _floating(found)
    if rows.size == 0:
        return rows.reshape(0, 5)
    if rows.ndim != 2 or rows.shape[1] != 5:
        raise UserError(f"detections of one class have shape {rows.shape}; give (n, 5) [x1, y1, x2, y2, score]")
    return rows


def relative_position(a: ArrayLike, b: ArrayLike) -> set[str]:
    """Where box a stands with respect to box b: a subset of {left of, right of, above, below}.

    A diagonal offset can give two relations, strongly overlapping boxes none. Computed in the boxes' own precision,
    float32 for the detector's (GenEval evaluate_images.py, relative position).
    """
    box_a, box_b = _corners(a), _corners(b)
    offset = box_a.mean(axis=0) - box_b.mean(axis=0)  # (2,) x, y
    sizes = np.abs(box_a[1] - box_a[0]) + np.abs(box_b[1] - box_b[0])
    shrunk = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes, 0) * np.sign(offset)
    if np.all(np.abs(shrunk) < 1e-3):
        return set()
    # Divided by the norm of the offset before shrinking: boxes that nearly touch can miss the 0.5 on both axes.
    dx, dy = shrunk / np.linalg.norm(offset)
    found = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, holds in found.items() if holds}


def _corners(box: ArrayLike) -> Array:
    """(2, 2) [[x1, y1], [x2, y2]]."""
    return _floating(box)[:4].reshape(2, 2)


def evaluate_image(kept: Mapping[str, ArrayLike], metadata: Mapping[str, Any], color_of: ColorOf) -> tuple[bool, str]:
    """Whether an image shows what its prompt asks for, and every reason why not, one a line.

    kept: what `filter_detections` returned. color_of(class_name, boxes (k, 5)) -> k colour names; it is called only for
    the first `count` objects of a clause that names a colour.
    """
    objects = {name: as_rows(rows) for name, rows in kept.items()}
    reasons: list[str] = []
    groups: list[Array | None] = []  # per include clause: its objects, or None when it was not matched
    for clause in metadata.get("include", []):
        found = objects.get(clause["class"], np.empty((0, 5), np.float32))[: clause["count"]]
        reason = _include_failure(clause, found, groups, color_of)
        groups.append(found if reason is None else None)
        reasons += [] if reason is None else [reason]
    for clause in metadata.get("exclude", []):
        seen = len(objects.get(clause["class"], ()))
        if seen >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {seen}")
    return not reasons, "\n".join(reasons)


def _include_failure(
    clause: Mapping[str, Any], found: Array, groups: Sequence[Array | None], color_of: ColorOf
) -> str | None:
    """The one reason why an include clause fails, or None. Count comes first, then colour, then position."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in clause:
        wanted, colors = clause["color"], list(color_of(name, found))
        right = colors.count(wanted)
        if right < count:
            present = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
            return f"expected {wanted} {name}>={count}, found {right} {wanted}; and {present}"
    if "position" in clause:
        relation, target = clause["position"]
        return _position_failure(name, relation, found, groups[target])
    return None


def _position_failure(name: str, relation: str, found: Array, targets: Array | None) -> str | None:
    """Every found object must stand in `relation` to every target; the first pair that does not is the reason."""
    if targets is None:
        return f"no target for {name} to be {relation}"
    for box in found:
        for target in targets:
            relations = relative_position(box, target)
            if relation not in relations:
                # Joined in set order, as the official script does: with two relations the order carries no meaning.
                return f"expected {name} {relation} target, found {' and '.join(relations)} target"
    return None


def summarize(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """GenEval summary_scores.py over the rows of a results.jsonl (each with tag, correct, metadata).

    Returns fractions in [0, 1]: tasks {tag: mean of correct over its images}, overall (unweighted mean of the tasks
    present, in order of first appearance), images (share of correct images) and prompts (share of prompts with at
    least one correct image; images belong together when their metadata are the same). Raises UserError on no rows.
    """
    tasks: dict[str, list[bool]] = {}
    by_prompt: dict[str, list[bool]] = {}
    for row in rows:
        correct = bool(row["correct"])
        tasks.setdefault(row["tag"], []).append(correct)
        by_prompt.setdefault(_prompt_key(row), []).append(correct)
    if not tasks:
        raise UserError("there are no GenEval results to summarise: score at least one image first")
    means = {tag: sum(values) / len(values) for tag, values in tasks.items()}
    images = [correct for values in tasks.values() for correct in values]
    return {
        "tasks": means,
        "overall": sum(means.values()) / len(means),
        "images": sum(images) / len(images),
        "prompts": sum(any(values) for values in by_prompt.values()) / len(by_prompt),
    }


def overall_error(rows: Iterable[Mapping[str, Any]]) -> float:
    """One standard error of the overall, for the pictures being a sample of what the model draws.

    A task's share of right pictures has the spread of its posterior under a uniform prior: close to the binomial one, and
    not zero where all pictures are right or all are wrong.
    """
    tasks: dict[str, list[bool]] = {}
    for row in rows:
        tasks.setdefault(row["tag"], []).append(bool(row["correct"]))
    variances = [
        (sum(seen) + 1) * (len(seen) - sum(seen) + 1) / ((len(seen) + 2) ** 2 * (len(seen) + 3))
        for seen in tasks.values()
    ]
    return math.sqrt(sum(variances)) / len(tasks)


def _prompt_key(row: Mapping[str, Any]) -> str:
    """The official grouping key is the metadata string; a row that holds it parsed, or only the prompt, works too."""
    metadata = row["metadata"] if "metadata" in row else row["prompt"]
    return metadata if isinstance(metadata, str) else json.dumps(metadata)
