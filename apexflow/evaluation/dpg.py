"""DPG-Bench: questions from the user's CSV, yes/no answers from any VQA model, the official sums.

Source: TencentQQGYLab/ELLA 3c228f1 (Apache-2.0), dpg_bench/compute_dpg_bench.py, restated. Modes:
  official      bug for bug, as one process: the first data row is skipped, and the categories are averaged over the
                raw answers of the last crop only. Its overall is the comparable number. Published category columns
                are not comparable: the official eight-process launch mixes them.
  fixed         the first row counts, and the categories take every crop.
  fixed-zeroed  fixed, with the categories averaged after the dependency rule instead of before it.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from apexflow.errors import UserError

MODES = ("official", "fixed", "fixed-zeroed")
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
YES = "yes"

Answers = Mapping[str, Mapping[Any, Sequence[str]]]

log = logging.getLogger(__name__)


@dataclass
class Item:
    """The questions of one prompt, by proposition id, in row order."""

    questions: dict[int, str] = field(default_factory=dict)
    parents: dict[int, list[int]] = field(default_factory=dict)
    categories: dict[int, str] = field(default_factory=dict)


@dataclass
class ItemScore:
    """score: mean over crops, in [0, 1]. raw, zeroed: per crop {proposition id: 0 or 1}, before and after zeroing."""

    score: float
    raw: list[dict[int, float]]
    zeroed: list[dict[int, float]]


def score(
    rows: Sequence[Mapping[str, Any]],
    answers: Answers,
    images: Iterable[str | Path],
    pic_num: int = 4,
    mode: str = "official",
) -> dict[str, Any]:
    """Scores the images that exist; images that do not are not penalised, so check completeness before.

    rows: the CSV as dicts of strings, in file order. answers[item][question]: the replies, one a crop (top left, top
    right, bottom left, bottom right), under the question's text or its proposition id; only "yes" exactly scores.
    images: names or paths; the item is the base name up to its first dot.

    Returns overall, l1 and l2 {category: score} in percent (overall is nan when every item failed), items {item: score
    in [0, 1]} and failed (items that were left out: unknown, a parent question is missing, an answer is missing).
    """
    questions = read_items(rows, mode)
    items: dict[str, float] = {}
    scores: list[float] = []
    failed: list[str] = []
    pooled: dict[str, list[float]] = {}
    for image in images:
        name = item_id(image)
        try:
            result = score_item(questions[name], answers[name], pic_num)
        except (KeyError, IndexError) as error:
            log.warning("DPG item %s is left out, nothing found for %s", name, error)
            failed.append(name)
            continue
        items[name] = result.score
        scores.append(result.score)
        for identity, value in _category_values(result, mode):
            pooled.setdefault(questions[name].categories[identity], []).append(value)
    return {
        "overall": _percent(scores) if scores else float("nan"),
        "l1": _top_level(pooled),
        "l2": {category: _percent(values) for category, values in pooled.items()},
        "items": items,
        "failed": failed,
    }


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows of dpg_bench.csv, every cell a string: numeric item ids must keep matching file names."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = [dict(row) for row in reader]
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    except OSError as error:
        raise UserError(
            f"cannot read the DPG questions at {path}: {error.strerror}; give ELLA's dpg_bench.csv"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV file in UTF-8 ({error}): give ELLA's dpg_bench.csv") from None
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}: give ELLA's dpg_bench.csv")
    return rows


def read_items(rows: Sequence[Mapping[str, Any]], mode: str) -> dict[str, Item]:
    """Questions by item, in row order. Consecutive rows make an item: one that reappears later replaces itself."""
    items: dict[str, Item] = {}
    previous = None
    # The official script skips row 0, a question that the rest of its item depends on: that item then fails.
    first = 1 if mode == "official" else 0
    for number, row in enumerate(rows[first:], start=first):
        name = str(row["item_id"])
        if name != previous:
            items[name] = Item()
        previous = name
        identity, parents = _numbers(row, number)
        items[name].questions[identity] = str(row["question_natural_language"])
        items[name].parents[identity] = parents
        items[name].categories[identity] = str(row["tuple"]).split("(")[0].strip()
    return items


def _numbers(row: Mapping[str, Any], number: int) -> tuple[int, list[int]]:
    try:
        return int(row["proposition_id"]), [int(part) for part in str(row["dependency"]).split(",")]
    except ValueError:
        raise UserError(
            f"DPG row {number} ({row['item_id']}) has proposition_id {row['proposition_id']!r} and dependency "
            f"{row['dependency']!r}: both must be whole numbers, dependency separated by commas, 0 for none"
        ) from None


def score_item(item: Item, answers: Mapping[Any, Sequence[str]], pic_num: int) -> ItemScore:
    """One image. Raises KeyError or IndexError for what the official script would have stumbled over."""
    raw, zeroed = [], []
    for crop in range(pic_num):
        given = {
            identity: float(_replies(answers, identity, question)[crop] == YES)
            for identity, question in item.questions.items()
        }
        raw.append(given)
        zeroed.append(_zero_children(given, item.parents))
    crops = [sum(values.values()) / len(values) for values in zeroed]
    return ItemScore(sum(crops) / len(crops), raw, zeroed)


def _replies(answers: Mapping[Any, Sequence[str]], identity: int, question: str) -> Sequence[str]:
    for key in (question, identity, str(identity)):
        if key in answers:
            return answers[key]
    raise KeyError(f"answer to question {identity}")


def _zero_children(given: Mapping[int, float], parents: Mapping[int, list[int]]) -> dict[int, float]:
    """A question whose parent stands at 0 becomes 0: in row order and in place, so it cascades only downwards."""
    values = dict(given)
    for identity, above in parents.items():
        if any(values[parent] == 0 for parent in above if parent != 0):
            values[identity] = 0.0
    return values


def _category_values(result: ItemScore, mode: str) -> list[tuple[int, float]]:
    """(proposition id, value) pairs that the category means pool."""
    crops = {"official": result.raw[-1:], "fixed": result.raw, "fixed-zeroed": result.zeroed}[mode]
    return [pair for crop in crops for pair in crop.items()]


def _top_level(pooled: Mapping[str, list[float]]) -> dict[str, float]:
    """L1 categories: pooled over questions, which is not the mean of their L2 scores."""
    top: dict[str, list[float]] = {}
    for category, values in pooled.items():
        top.setdefault(category.split("-")[0].strip(), []).extend(values)
    return {category: _percent(values) for category, values in top.items()}


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def item_id(image: str | Path) -> str:
    """The base name up to its first dot."""
    return Path(image).name.split(".")[0]


def crops(image: Image.Image, pic_num: int = 4) -> list[Image.Image]:
    """The samples of one grid image: the whole (pic_num 1) or top left, top right, bottom left, bottom right (4).

    A sample is as wide as the image's width says. UserError unless the image is exactly that grid: the official script would
    silently cut across the samples.
    """
    across = 1 if pic_num == 1 else 2
    side = image.width // across
    if image.size != (side * across, side * across):
        raise UserError(
            f"a DPG image is {image.width}x{image.height} pixels: {pic_num} samples of {side} pixels need "
            f"{side * across}x{side * across}"
        )
    corners = [(column * side, row * side) for row in range(across) for column in range(across)]
    return [image.crop((x, y, x + side, y + side)) for x, y in corners]


def plain_reply(text: str) -> str:
    """A chat model's "Yes." as the bare lower-case word that the official VQA model answers."""
    words = text.lower().replace(",", " ").replace(".", " ").split()
    return words[0] if words and words[0] in (YES, "no") else " ".join(words)
