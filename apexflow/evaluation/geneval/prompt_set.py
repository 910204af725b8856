"""The 553 GenEval prompts, regenerated from the 80 class names and one seed.

Source: GenEval (djghosh13/geneval af4902f, MIT), prompts/create_prompts.py and evaluation/object_names.txt. The result
is byte-identical to the official evaluation_metadata.jsonl, and its sha256 is checked each time it is made.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from apexflow.data.scenes import RELATIONS, prompt_text
from apexflow.errors import UserError

# In the detector's index order. Three names differ from COCO's (computer mouse, tv remote, computer keyboard), so
# detector labels are mapped by index, never by name.
NAMES: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip
COLORS: tuple[str, ...] = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
SEED = 43
DRAWS = 100  # per task, before exact duplicates are dropped
PROMPTS_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"


def prompts() -> list[dict[str, Any]]:
    """The 553 official prompts in official order (line N of evaluation_metadata.jsonl is entry N).

    Each entry has tag, include (list of {class, count[, color][, position: [relation, index of the target clause]]}),
    for counting also exclude, and prompt. Raises UserError when NumPy's random stream no longer yields them.
    """
    return [json.loads(line) for line in jsonl().splitlines()]


def jsonl() -> str:
    """The official evaluation_metadata.jsonl as text, one JSON object a line, checked against PROMPTS_SHA256."""
    unique = dict.fromkeys(json.dumps(entry) for entry in _draw_all(np.random.default_rng(SEED)))
    text = "".join(f"{line}\n" for line in unique)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest != PROMPTS_SHA256:
        raise UserError(
            f"the GenEval prompts have sha256 {digest[:8]}..., not the official {PROMPTS_SHA256[:8]}...: NumPy "
            f"{np.__version__} draws another random stream; install numpy 2.4, or point at evaluation_metadata.jsonl"
        )
    return text


def fault(entry: Any) -> str | None:
    """Why a user's prompt cannot be scored; without this check its pictures would just all come out wrong."""
    if not isinstance(entry, dict) or not {"tag", "include", "prompt"} <= entry.keys():
        return "it needs tag, include and prompt"
    try:
        clauses = [_clause_fault(clause, number) for number, clause in enumerate(entry["include"])]
        clauses += [_clause_fault(clause, 0) for clause in entry.get("exclude", [])]
    except (AttributeError, KeyError, TypeError, ValueError):
        return "a clause holds class, count, and where asked for color and position: [relation, clause number]"
    return next(filter(None, clauses), None)


def _clause_fault(clause: dict[str, Any], number: int) -> str | None:
    if clause["class"] not in NAMES:
        return f"the detector knows no {clause['class']!r}"
    if clause["count"] < 1:
        return f"the count of {clause['class']} is {clause['count']}"
    if clause.get("color", COLORS[0]) not in COLORS:
        return f"no colour is called {clause['color']!r}: there are {', '.join(COLORS)}"
    if "position" not in clause:
        return None
    relation, target = clause["position"]
    if relation not in RELATIONS or not 0 <= target < number:
        return (
            f"position {[relation, target]!r} is not one of {', '.join(RELATIONS)} with the number of an earlier clause"
        )
    return None


def _draw_all(rng: np.random.Generator) -> list[dict[str, Any]]:
    """All six tasks in the one order that consumes the random stream as the official generator does."""
    entries = [_single(NAMES[i]) for i in rng.choice(len(NAMES), size=len(NAMES), replace=False)]
    for draw in (_two_objects, _counting, _colors, _position, _color_attribution):
        entries += [draw(rng) for _ in range(DRAWS)]
    return [entry | {"prompt": prompt_text(entry)} for entry in entries]


def _single(name: str) -> dict[str, Any]:
    return {"tag": "single_object", "include": [_clause(name)]}


def _two_objects(rng: np.random.Generator) -> dict[str, Any]:
    first, second = (NAMES[i] for i in rng.choice(len(NAMES), size=2, replace=False))
    return {"tag": "two_object", "include": [_clause(first), _clause(second)]}


def _counting(rng: np.random.Generator) -> dict[str, Any]:
    name = NAMES[rng.choice(len(NAMES))]
    count = int(rng.integers(2, 4, endpoint=True))
    return {"tag": "counting", "include": [_clause(name, count)], "exclude": [_clause(name, count + 1)]}


def _colors(rng: np.random.Generator) -> dict[str, Any]:
    name = NAMES[rng.choice(len(NAMES) - 1) + 1]  # + 1 skips "person": no coloured people
    color = COLORS[rng.choice(len(COLORS))]
    return {"tag": "colors", "include": [_clause(name) | {"color": color}]}


def _position(rng: np.random.Generator) -> dict[str, Any]:
    subject, target = (NAMES[i] for i in rng.choice(len(NAMES), size=2, replace=False))
    relation = RELATIONS[rng.choice(len(RELATIONS))]
    return {"tag": "position", "include": [_clause(target), _clause(subject) | {"position": [relation, 0]}]}


def _color_attribution(rng: np.random.Generator) -> dict[str, Any]:
    names = [NAMES[i + 1] for i in rng.choice(len(NAMES) - 1, size=2, replace=False)]
    colors = [COLORS[i] for i in rng.choice(len(COLORS), size=2, replace=False)]
    include = [_clause(name) | {"color": color} for color, name in zip(colors, names, strict=True)]
    return {"tag": "color_attr", "include": include}


def _clause(name: str, count: int = 1) -> dict[str, Any]:
    return {"class": name, "count": count}
