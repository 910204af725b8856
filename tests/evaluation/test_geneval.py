"""GenEval's prompts and scoring rules, case by case."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy.stats import beta

from apexflow.errors import UserError
from apexflow.evaluation import geneval
from apexflow.evaluation.geneval.prompt_set import jsonl

NAMES_SHA256 = "608f6a0e5c8ca1c7a92b818430141fe268c85b7930b50f4160f1d65893b5bacd"
OBJECT = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
COUNTING = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}


def boxes(*scores: float, at: tuple[float, float, float, float] = (0, 0, 10, 10)) -> np.ndarray:
    return np.array([[*at, score] for score in scores], dtype=np.float32).reshape(-1, 5)


def never(name: str, found: np.ndarray) -> list[str]:
    raise AssertionError(f"the colour of {name} was asked for")


def position(relation: str, subject: str = "dog", target: str = "cat", count: int = 1) -> dict:
    clauses = [{"class": target, "count": count}, {"class": subject, "count": 1, "position": [relation, 0]}]
    return {"tag": "position", "include": clauses}


def test_prompts_are_the_official_file() -> None:
    entries = geneval.prompts()
    assert hashlib.sha256(("\n".join(geneval.NAMES) + "\n").encode()).hexdigest() == NAMES_SHA256
    assert hashlib.sha256(jsonl().encode()).hexdigest() == geneval.PROMPTS_SHA256
    counts = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    assert Counter(entry["tag"] for entry in entries) == counts
    assert entries[179]["exclude"] == [{"class": "clock", "count": 3}]
    assert entries[353]["prompt"] == "a photo of a dog right of a teddy bear"


def test_changed_random_stream_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apexflow.evaluation.geneval.prompt_set.SEED", 44)
    with pytest.raises(UserError, match="sha256"):
        geneval.prompts()


@pytest.mark.parametrize(("metadata", "threshold"), [(OBJECT, 0.3), (COUNTING, 0.9), ({"tag": "x"}, 0.3)])
def test_threshold_is_strict_in_float32_and_chosen_by_tag(metadata: dict, threshold: float) -> None:
    above = np.nextafter(np.float32(threshold), np.float32(1))
    kept = geneval.filter_detections({"dog": boxes(threshold, above), "cat": boxes(threshold)}, metadata)
    assert list(kept) == ["dog"]
    np.testing.assert_array_equal(kept["dog"], boxes(above))


def test_order_ties_and_the_limit_of_sixteen() -> None:
    rows = np.array([[index, 0, index + 5, 5, 0.5] for index in range(20)], dtype=np.float32)
    kept = geneval.filter_detections({"dog": rows}, OBJECT)["dog"]
    np.testing.assert_array_equal(kept[:, 0], np.arange(19, 3, -1))  # tied scores come out reversed
    assert kept.dtype == np.float32 and kept.shape == (16, 5)
    assert geneval.kept_indices({"dog": rows}, OBJECT) == {"dog": list(range(19, 3, -1))}


def test_overlapping_boxes_are_all_kept() -> None:
    found = {"dog": np.float32([[0, 0, 9, 9, 0.9], [0, 0, 9, 9, 0.8]])}
    assert len(geneval.filter_detections(found, OBJECT)["dog"]) == 2


def test_lists_empties_and_mistakes() -> None:
    assert geneval.filter_detections({"dog": [], "cat": np.zeros((0, 5))}, OBJECT) == {}
    assert geneval.filter_detections({"dog": [[0, 0, 1, 1, 1]]}, OBJECT)["dog"].shape == (1, 5)
    with pytest.raises(UserError, match=r"\(n, 5\)"):
        geneval.filter_detections({"dog": [[0, 0, 1, 1]]}, OBJECT)
    with pytest.raises(TypeError):
        geneval.filter_detections({}, OBJECT, treshold=0.5)


def test_count_reasons() -> None:
    assert geneval.evaluate_image({}, {"tag": "x"}, never) == (True, "")
    assert geneval.evaluate_image({}, OBJECT, never) == (False, "expected dog>=1, found 0")
    assert geneval.evaluate_image({"dog": boxes(0.95, 0.95)}, COUNTING, never) == (True, "")
    too_many = geneval.evaluate_image({"dog": boxes(1, 1, 1, 1)}, COUNTING, never)
    assert too_many == (False, "expected dog<3, found 4")  # all survivors count, not the first `count`
    both = {"include": [{"class": "cat", "count": 1}], "exclude": [{"class": "dog", "count": 1}]}
    reasons = "expected cat>=1, found 0\nexpected dog<1, found 1"
    assert geneval.evaluate_image({"dog": boxes(1)}, both, never) == (False, reasons)


def test_colour_of_the_most_confident_only() -> None:
    metadata = {"include": [{"class": "dog", "count": 2, "color": "red"}]}
    asked: list[int] = []

    def colors(*answer: str):
        return lambda name, found: asked.append(len(found)) or list(answer)

    kept = {"dog": boxes(0.9, 0.8, 0.7)}
    assert geneval.evaluate_image(kept, metadata, colors("red", "red")) == (True, "")
    reason = "expected red dog>=2, found 1 red; and 1 red, 1 blue"
    assert geneval.evaluate_image(kept, metadata, colors("blue", "red")) == (False, reason)
    reason = "expected red dog>=2, found 0 red; and 1 green, 1 white"
    assert geneval.evaluate_image(kept, metadata, colors("white", "green")) == (False, reason)
    assert asked == [2, 2, 2]
    assert geneval.evaluate_image({}, metadata, never) == (False, "expected dog>=2, found 0")


def test_relations_alone_together_and_none() -> None:
    origin = [0, 0, 10, 10]
    assert geneval.relative_position([-100, 0, -90, 10], origin) == {"left of"}
    assert geneval.relative_position([100, 0, 110, 10], origin) == {"right of"}
    assert geneval.relative_position([0, -100, 10, -90], origin) == {"above"}
    assert geneval.relative_position([60, 60, 70, 70], origin) == {"right of", "below"}
    assert geneval.relative_position([1, 1, 11, 11], origin) == set()  # inside the dead zone of 0.1 sizes
    assert geneval.relative_position(origin, origin) == set()
    # Shrunk from 4 to 2 and divided by 4: exactly 0.5 is not enough, and a little more is.
    assert geneval.relative_position([4, 0, 14, 10], origin) == set()
    assert geneval.relative_position([4.01, 0, 14.01, 10], origin) == {"right of"}


def test_position_reasons() -> None:
    dog, cat = boxes(1, at=(0, 0, 10, 10)), boxes(1, at=(50, 0, 60, 10))
    kept = {"dog": dog, "cat": cat}
    assert geneval.evaluate_image(kept, position("left of"), never) == (True, "")
    assert geneval.evaluate_image(kept, position("above"), never) == (
        False,
        "expected dog above target, found left of target",
    )
    same = {"dog": dog, "cat": dog}
    assert geneval.evaluate_image(same, position("above"), never)[1] == "expected dog above target, found  target"
    missing = geneval.evaluate_image({"dog": dog}, position("left of"), never)
    assert missing == (False, "expected cat>=1, found 0\nno target for dog to be left of")
    assert geneval.evaluate_image({"cat": cat}, position("left of"), never) == (False, "expected dog>=1, found 0")
    diagonal = {"dog": boxes(1, at=(100, 100, 110, 110)), "cat": dog}
    assert geneval.evaluate_image(diagonal, position("below"), never) == (True, "")
    assert geneval.evaluate_image(diagonal, position("right of"), never) == (True, "")
    reason = geneval.evaluate_image(diagonal, position("above"), never)[1]
    assert sorted(reason.removesuffix(" target").partition("found ")[2].split(" and ")) == ["below", "right of"]


def test_every_pair_must_stand_in_the_relation() -> None:
    cats = np.concatenate([boxes(0.9, at=(50, 0, 60, 10)), boxes(0.8, at=(0, 50, 10, 60))])
    kept = {"dog": boxes(1), "cat": cats}
    assert geneval.evaluate_image(kept, position("left of", count=1), never)[0]
    reason = "expected dog left of target, found above target"
    assert geneval.evaluate_image(kept, position("left of", count=2), never) == (False, reason)


def test_colour_prompts_and_crops() -> None:
    texts = geneval.color_prompts("apple")
    assert list(texts) == list(geneval.COLORS)
    assert texts["orange"] == [
        "a photo of a orange apple",
        "a photo of a orange-colored apple",
        "a photo of a orange object",
    ]
    image = Image.new("RGBA", (8, 6), (255, 0, 0, 128))
    mask = np.zeros((6, 8), bool)
    mask[1, 2] = True
    crop = geneval.color_crop(image, np.float32([1, 1, 4, 3, 0.9]), mask)
    assert (crop.mode, crop.size) == ("RGB", (3, 2))
    assert crop.getpixel((1, 0)) == (255, 0, 0) and crop.getpixel((0, 0)) == (153, 153, 153)
    assert geneval.color_crop(image, [0.5, 1.5, 3.5, 4.4]).size == (4, 2)  # rounded half to even: 0, 2, 4, 4
    with pytest.raises(UserError, match="mask"):
        geneval.color_crop(image, [0, 0, 1, 1], mask.T)


def test_the_overall_has_an_error_even_where_every_picture_is_right() -> None:
    rows = [{"tag": "a", "correct": True}] * 20 + [{"tag": "b", "correct": False}] * 7
    expected = np.hypot(beta(21, 1).std(), beta(1, 8).std()) / 2
    assert geneval.overall_error(rows) == pytest.approx(expected)
    half = [{"tag": "a", "correct": index % 2 == 0} for index in range(400)]
    assert geneval.overall_error(half) == pytest.approx(0.5 / 20, rel=0.01)  # the binomial one


def test_summary_is_the_mean_of_tasks_over_images() -> None:
    rows = [
        {"tag": "b", "correct": True, "metadata": "1"},
        {"tag": "b", "correct": False, "metadata": "1"},
        {"tag": "a", "correct": False, "metadata": json.dumps({"x": 1})},
        {"tag": "b", "correct": False, "metadata": "2"},
    ]
    summary = geneval.summarize(rows)
    assert summary == {"tasks": {"b": 1 / 3, "a": 0.0}, "overall": 1 / 6, "images": 0.25, "prompts": 1 / 3}
    assert list(summary["tasks"]) == ["b", "a"]
    with pytest.raises(UserError):
        geneval.summarize([])
