"""GenEval's rules against a second reading of them, on cases made to be hard: ties, equality, NaN, empty boxes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from apexflow.evaluation import geneval

CLASSES = ("dog", "cat", "cup")
STEP = np.float32(2.0**-20)
SCORES = np.float32([0, 0.3, 0.3 + STEP, 0.5, 0.9, 0.9 - STEP, 0.9 + STEP, 1, np.nan])
THRESHOLDS: tuple[dict[str, float], ...] = ({}, {"threshold": 0.5, "counting_threshold": 0.5})


def survivors(rows: np.ndarray, least: float) -> list[int]:
    best_first = [int(index) for index in np.argsort(rows[:, 4])[::-1]]
    return [index for index in best_first if rows[index, 4] > np.float32(least)][:16]


def relations(a: np.ndarray, b: np.ndarray) -> set[str]:
    offset = [(a[i] + a[i + 2]) / np.float32(2) - (b[i] + b[i + 2]) / np.float32(2) for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    shrunk = [np.sign(o) * max(abs(o) - np.float32(0.1) * s, np.float32(0)) for o, s in zip(offset, sizes, strict=True)]
    if abs(shrunk[0]) < 1e-3 and abs(shrunk[1]) < 1e-3:
        return set()
    norm = np.sqrt(offset[0] ** 2 + offset[1] ** 2)
    x, y = shrunk[0] / norm, shrunk[1] / norm
    tests = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in tests.items() if holds}


def verdict(kept: dict[str, np.ndarray], metadata: dict) -> list[str | tuple]:
    """The reasons in order; one about a relation as a tuple with the relations that were found."""
    reasons: list[Any] = []
    groups: list[Any] = []
    for clause in metadata["include"]:
        name, count = clause["class"], clause["count"]
        found, fault = list(kept.get(name, []))[:count], None
        if len(found) < count:
            fault = f"expected {name}>={count}, found {len(found)}"
        if fault is None and "color" in clause:
            seen = Counter(color(row) for row in found)
            if seen[clause["color"]] < count:
                present = ", ".join(f"{seen[c]} {c}" for c in geneval.COLORS if seen[c])
                wanted = clause["color"]
                fault = f"expected {wanted} {name}>={count}, found {seen[wanted]} {wanted}; and {present}"
        if fault is None and "position" in clause:
            relation, target = clause["position"]
            if groups[target] is None:
                fault = f"no target for {name} to be {relation}"
            else:
                pairs = [relations(a, b) for a in found for b in groups[target]]
                fault = next(((name, relation, found) for found in pairs if relation not in found), None)
        groups.append(None if fault else found)
        reasons += [fault] if fault else []
    for clause in metadata.get("exclude", []):
        seen_all = len(kept.get(clause["class"], []))
        if seen_all >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {seen_all}")
    return reasons


def told(reason: str) -> list[str | tuple]:
    """The lines of a reason; what was found of relations as a set, since its order means nothing."""
    lines: list[str | tuple] = []
    for line in reason.split("\n") if reason else []:
        if line.endswith(" target"):
            name, _, rest = line.removeprefix("expected ").partition(" ")
            relation, _, found = rest.removesuffix(" target").partition(" target, found ")
            lines.append((name, relation, set(found.split(" and ")) - {""}))
        else:
            lines.append(line)
    return lines


def color(row: np.ndarray) -> str:
    return geneval.COLORS[int(row[0] // 5) % 2]


def scene(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict]:
    """Boxes on a coarse grid, some of them empty, with scores at and beside the thresholds; clauses of every kind."""
    detections = {}
    for name in CLASSES[: rng.integers(1, 4)]:
        corners = rng.integers(0, 12, (rng.integers(0, 21), 2)) * 5
        sides = rng.choice([0, 5, 10, 20], corners.shape)
        scores = rng.choice(SCORES, len(corners))[:, None]
        detections[name] = np.concatenate([corners, corners + sides, scores], axis=1).astype(np.float32)
    include: list[dict[str, Any]] = []
    for number in range(rng.integers(0, 4)):
        clause: dict[str, Any] = {"class": str(rng.choice([*CLASSES, "zebra"])), "count": int(rng.integers(1, 4))}
        if rng.random() < 0.3:
            clause["color"] = str(rng.choice(geneval.COLORS[:2]))
        if number and rng.random() < 0.7:
            relation = str(rng.choice(["left of", "right of", "above", "below"]))
            clause = clause | {"count": 1, "position": [relation, int(rng.integers(number))]}
        include.append(clause)
    exclude = [{"class": str(rng.choice(CLASSES)), "count": int(rng.integers(1, 6))} for _ in range(rng.integers(0, 3))]
    return detections, {"tag": str(rng.choice(["counting", "position"])), "include": include, "exclude": exclude}


def test_hard_cases_agree_with_a_second_reading() -> None:
    rng, seen = np.random.default_rng(0), Counter[str]()
    for number in range(2000):
        thresholds = THRESHOLDS[number % len(THRESHOLDS)]
        detections, metadata = scene(rng)
        counting = metadata["tag"] == "counting"
        least = thresholds.get("counting_threshold", 0.9) if counting else thresholds.get("threshold", 0.3)
        expected = {name: rows[survivors(rows, least)] for name, rows in detections.items()}
        kept = geneval.filter_detections(detections, metadata, **thresholds)
        assert list(kept) == [name for name, rows in expected.items() if len(rows)]
        assert all(np.array_equal(rows, expected[name]) for name, rows in kept.items())
        correct, reason = geneval.evaluate_image(kept, metadata, lambda _, found: [color(r) for r in found])
        reasons = verdict(kept, metadata)
        assert told(reason) == reasons and correct == (not reasons), (kept, metadata)
        seen.update([str(correct), *(f"{len(part[2])} relations" for part in reasons if isinstance(part, tuple))])
    assert all(seen[kind] > 5 for kind in ("True", "False", "0 relations", "1 relations", "2 relations")), seen
