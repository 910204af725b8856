"""WISE: world knowledge scored by a judge model, in the paper's protocol ("legacy") and the newer one ("verified").

Source: PKU-YuanGroup/WISE eb51174, gpt_eval.py, vllm_eval.py and their score scripts, restated. That repository has no
licence, so neither its prompts nor its rubric are in this package: both are read from the user's own checkout.
Legacy scores are comparable with published ones only when GPT-4o-2024-05-13 was the judge.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apexflow.errors import UserError
from apexflow.evaluation.judge import Message, Picture, picture_base64
from apexflow.evaluation.template import Template

SCORES = ("consistency", "realism", "aesthetic_quality")


@dataclass(frozen=True)
class Protocol:
    """What differs between the two; categories: {name: (first id, last id, weight)}, options: of the request."""

    categories: Mapping[str, tuple[int, int, float]]
    scripts: tuple[str, ...]
    data: tuple[str, ...]
    options: Mapping[str, Any]


_LEGACY_FILES = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
CATEGORIES = ("Culture", "Time", "Space", "Biology", "Physics", "Chemistry")


def _ranges(last: tuple[int, ...], weights: tuple[float, ...]) -> dict[str, tuple[int, int, float]]:
    first = (1, *(identity + 1 for identity in last[:-1]))
    return dict(zip(CATEGORIES, zip(first, last, weights, strict=True), strict=True))


PROTOCOLS: Mapping[str, Protocol] = {
    "legacy": Protocol(
        categories=_ranges((400, 567, 700, 800, 900, 1000), (0.4, 0.167, 0.133, 0.1, 0.1, 0.1)),
        scripts=("WISE_legacy/gpt_eval.py", "gpt_eval.py"),
        data=tuple(f"WISE_legacy/data/{stem}.json" for stem in _LEGACY_FILES),
        options={"temperature": 0, "max_tokens": 2000},
    ),
    "verified": Protocol(
        categories=_ranges((400, 520, 640, 760, 880, 1000), (0.4, 0.12, 0.12, 0.12, 0.12, 0.12)),
        scripts=("vllm_eval.py",),
        data=("data_verified/*_verified.json",),
        options={"temperature": 0, "max_tokens": 500, "chat_template_kwargs": {"enable_thinking": False}},
    ),
}

_LEGACY = re.compile(r"\*{0,2}(Consistency|Realism|Aesthetic Quality)\*{0,2}\s*:?\s*(\d)", re.IGNORECASE)
# A lone closing tag goes, what stands before it stays; a thought that was never closed stays, too.
_THOUGHTS = re.compile(r"(?:<think>.*?)?</think>\s*", re.DOTALL)
_VERIFIED = re.compile(r"Score\*{0,2}\s*:?\s*([01])\b", re.IGNORECASE)


def parse(reply: str, protocol: str) -> dict[str, int] | None:
    """The scores in a judge's reply, or None when it cannot be parsed, by the official patterns.

    Legacy: {consistency, realism, aesthetic_quality}; one digit each, no range check, later matches win; with no label
    at all, the first three lines that hold a lone 0, 1 or 2. Verified: {score}; the first match, or the only lone bit.
    Thoughts are taken out of both as the verified script does it.
    """
    _protocol(protocol)
    text = _THOUGHTS.sub("", reply).strip()
    return _parse_legacy(text) if protocol == "legacy" else _parse_verified(text)


def _parse_legacy(text: str) -> dict[str, int] | None:
    labelled = _LEGACY.findall(text)
    if labelled:
        found = {label.lower().replace(" ", "_"): int(digit) for label, digit in labelled}
    else:
        found = dict(zip(SCORES, _lone_digits(text, "012"), strict=False))
    return {name: found[name] for name in SCORES} if found.keys() >= set(SCORES) else None


def _parse_verified(text: str) -> dict[str, int] | None:
    match = _VERIFIED.search(text)
    if match:
        return {"score": int(match[1])}
    lone = _lone_digits(text, "01")
    return {"score": lone[0]} if len(lone) == 1 else None


def _lone_digits(text: str, digits: str) -> list[int]:
    lines = (line.strip() for line in text.split("\n"))
    return [int(line) for line in lines if len(line) == 1 and line in digits]


def wiscore(consistency: float, realism: float, aesthetic_quality: float) -> float:
    """The legacy score of one image in [0, 1], from three grades in [0, 2]."""
    return (0.7 * consistency + 0.2 * realism + 0.1 * aesthetic_quality) / 2


def aggregate(rows: Iterable[Mapping[str, Any]], protocol: str) -> dict[str, Any]:
    """Means by category, and the weighted overall of all six.

    rows: {prompt_id, consistency, realism, aesthetic_quality} (legacy) or {prompt_id, score} (verified).

    Returns overall (None unless every id is there) and categories {name: mean or None}. As officially, a row without numbers
    (verified: without 0 or 1) is dropped from its mean but its id counts as present, and duplicates are all averaged.
    """
    ranges = _protocol(protocol).categories
    values: dict[str, list[float]] = {name: [] for name in ranges}
    present: set[int] = set()
    for row in rows:
        identity = _prompt_id(row)
        name = next((name for name in ranges if ranges[name][0] <= identity <= ranges[name][1]), None)
        if name is None:
            continue
        present.add(identity)
        value = _image_score(row, protocol)
        if value is not None:
            values[name].append(value)
    wanted = {identity for name in ranges for identity in range(ranges[name][0], ranges[name][1] + 1)}
    means = {name: sum(found) / len(found) if found else None for name, found in values.items()}
    return {"overall": _weighted(means, ranges) if present >= wanted else None, "categories": means}


def _weighted(means: Mapping[str, float | None], ranges: Mapping[str, tuple[int, int, float]]) -> float | None:
    terms = [mean * ranges[name][2] for name, mean in means.items() if mean is not None]
    return sum(terms) if len(terms) == len(means) else None


def _prompt_id(row: Mapping[str, Any]) -> int:
    try:
        return int(row["prompt_id"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"a WISE result has no whole-number prompt_id: {str(dict(row))[:120]}") from None


def _image_score(row: Mapping[str, Any], protocol: str) -> float | None:
    grades = [row.get(name) for name in (SCORES if protocol == "legacy" else ("score",))]
    numbers = [float(grade) for grade in grades if isinstance(grade, int | float) and math.isfinite(grade)]
    if len(numbers) != len(grades):
        return None
    if protocol == "legacy":
        return wiscore(*numbers)
    return numbers[0] if numbers[0] in (0, 1) else None


def _protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise UserError(f"WISE protocol {name!r} is unknown: use one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def records(root: str | Path, protocol: str) -> list[dict[str, Any]]:
    """The prompts in the user's checkout, by prompt_id: {Prompt, Explanation, Category, Subcategory, prompt_id}."""
    found: list[dict[str, Any]] = []
    for pattern in _protocol(protocol).data:
        paths = sorted(Path(root).glob(pattern))
        if not paths:
            raise UserError(f"no {pattern} in {root}: point at a checkout of PKU-YuanGroup/WISE")
        for path in paths:
            try:
                found += json.loads(path.read_text("utf-8"))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"cannot read the WISE prompts in {path}: {error}") from None
    if not all(isinstance(record, dict) for record in found):
        raise UserError(f"the WISE prompts in {root} are not records: check out PKU-YuanGroup/WISE again")
    return sorted(found, key=_prompt_id)


def judge_messages(root: str | Path, protocol: str, record: Mapping[str, Any], image: Picture) -> list[Message]:
    """The official conversation about one image, from the template in the user's WISE checkout.

    root: the checkout; record: one of `records`; image: a path (its bytes are sent as they are), bytes or a picture.
    The script is parsed, never run: its message-building function may use constants, f-strings, string methods and
    look-ups. Raises UserError when it is missing or needs more than that.
    """
    scripts = [Path(root) / name for name in _protocol(protocol).scripts]
    script = next((path for path in scripts if path.is_file()), None)
    if script is None:
        raise UserError(f"no {scripts[0]}: point at a checkout of PKU-YuanGroup/WISE")
    return Template(script).messages(record, picture_base64(image))
