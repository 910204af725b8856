"""DPG-Bench sums: the official ones with their bugs, and the fixed ones."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from apexflow.errors import UserError
from apexflow.evaluation.dpg import crops, plain_reply, read_csv, score

HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)


def row(item: str, identity: int, parents: str, what: str) -> dict[str, str]:
    return {
        "item_id": item,
        "proposition_id": str(identity),
        "dependency": parents,
        "tuple": what,
        "question_natural_language": f"{item} {identity}?",
    }


SKIPPED = row("first", 1, "0", "entity - whole (x)")
ROWS = [
    SKIPPED,
    row("a", 1, "0", "entity - whole (car)"),
    row("a", 2, "1", "attribute - color (car, red)"),
    row("a", 3, "1, 2", "attribute - shape (car, round)"),
    row("b", 1, "0", "global - (photo)"),
]


def replies(item: str, **answers: str) -> dict[str, list[str]]:
    """replies("a", q1="yn"): two crops, yes and no, for question 1."""
    words = {"y": "yes", "n": "no", "Y": "Yes"}
    return {f"{item} {key[1:]}?": [words[letter] for letter in text] for key, text in answers.items()}


def test_zeroing_cascades_and_categories_take_raw_answers_of_the_last_crop() -> None:
    answers = {"a": replies("a", q1="yn", q2="ny", q3="yy"), "b": replies("b", q1="yY")}
    result = score(ROWS, answers, ["a.png", "dir/b.x.jpg"], pic_num=2)
    # a: crop 1 keeps question 1 only (2 is no, so 3 falls); crop 2 loses everything. b: "Yes" is not "yes".
    assert result["items"] == {"a": pytest.approx(1 / 6), "b": 0.5}
    assert result["overall"] == pytest.approx(100 * (1 / 6 + 0.5) / 2)
    assert result["l2"] == {"entity - whole": 0, "attribute - color": 100, "attribute - shape": 100, "global -": 0}
    assert result["l1"] == {"entity": 0, "attribute": 100, "global": 0}
    assert result["failed"] == []


def test_fixed_modes_take_every_crop() -> None:
    answers = {"a": replies("a", q1="yn", q2="ny", q3="yy")}
    fixed = score(ROWS, answers, ["a"], pic_num=2, mode="fixed")
    assert fixed["l2"] == {"entity - whole": 50, "attribute - color": 50, "attribute - shape": 100}
    assert fixed["l1"]["attribute"] == 75
    assert fixed["items"] == {"a": pytest.approx(1 / 6)}
    zeroed = score(ROWS, answers, ["a"], pic_num=2, mode="fixed-zeroed")
    assert zeroed["l2"] == {"entity - whole": 50, "attribute - color": 0, "attribute - shape": 0}


def test_the_first_row_is_skipped_and_its_item_fails() -> None:
    rows = [SKIPPED, row("first", 2, "1", "entity - whole (y)"), *ROWS[1:]]
    answers = {"first": replies("first", q1="y", q2="y"), "b": replies("b", q1="y")}
    official = score(rows, answers, ["first.png", "b.png"], pic_num=1)
    assert (official["failed"], official["items"], official["overall"]) == (["first"], {"b": 1.0}, 100)
    assert "entity" not in official["l1"]
    fixed = score(rows, answers, ["first.png", "b.png"], pic_num=1, mode="fixed")
    assert (fixed["failed"], fixed["items"]) == ([], {"first": 1.0, "b": 1.0})


def test_a_child_before_its_parent_reads_the_parent_as_it_stands() -> None:
    rows = [SKIPPED, row("a", 1, "2", "x (1)"), row("a", 2, "3", "x (2)"), row("a", 3, "0", "x (3)")]
    answers = {"a": replies("a", q1="y", q2="y", q3="n")}
    assert score(rows, answers, ["a"], pic_num=1)["items"] == {"a": pytest.approx(1 / 3)}


def test_a_reappearing_item_replaces_its_earlier_rows() -> None:
    rows = [SKIPPED, row("a", 1, "0", "x (1)"), row("b", 1, "0", "x (1)"), row("a", 2, "0", "x (2)")]
    answers = {"a": {1: ["no"], "2": ["yes"]}, "b": replies("b", q1="n")}
    assert score(rows, answers, ["a", "b"], pic_num=1)["items"] == {"a": 1.0, "b": 0.0}


def test_failures_are_named_and_absent_images_cost_nothing() -> None:
    answers = {"b": replies("b", q1="y"), "a": replies("a", q1="y", q2="y")}
    result = score(ROWS, answers, ["b.png", "unknown.png", "a.png"], pic_num=1)
    assert (result["overall"], result["failed"]) == (100, ["unknown", "a"])
    assert score(ROWS, answers, ["b"], pic_num=1)["overall"] == 100
    few = score(ROWS, answers, ["b"], pic_num=2)
    assert few["failed"] == ["b"] and math.isnan(few["overall"])


def second_reading(rows: list[dict], answers: dict, names: list[str], crops: int) -> tuple[dict, list[str], dict]:
    """The official rules one question at a time: item scores, items that stumble, and category means."""
    blocks: dict[str, list[dict]] = {}
    for before, entry in pairwise(rows):  # the first row is lost
        if entry["item_id"] != before["item_id"] or before is rows[0]:
            blocks[entry["item_id"]] = []
        blocks[entry["item_id"]].append(entry)
    items: dict[str, float] = {}
    failed, pooled = [], dict[str, list[int]]()
    for name in names:
        try:
            marks, last = [], {}
            for crop in range(crops):
                last = {
                    int(q["proposition_id"]): int(answers[name][q["question_natural_language"]][crop] == "yes")
                    for q in blocks[name]
                }
                values = dict(last)
                for q in blocks[name]:
                    for parent in map(int, q["dependency"].split(",")):
                        if parent and values[parent] == 0:
                            values[int(q["proposition_id"])] = 0
                            break
                marks += [sum(values.values()) / len(values)]
        except KeyError:
            failed.append(name)
            continue
        items[name] = sum(marks) / crops
        for q in blocks[name]:
            pooled.setdefault(q["tuple"].partition("(")[0].strip(), []).append(last[int(q["proposition_id"])])
    return items, failed, {kind: 100 * sum(found) / len(found) for kind, found in pooled.items()}


def test_agrees_with_a_second_reading_on_tangled_questions() -> None:
    """Children before parents, cycles, parents that do not exist, items that come back, replies that are nearly yes."""
    rng = random.Random(0)
    stumbled = 0
    for _ in range(200):
        rows, order = [SKIPPED], rng.choice(["abc", "aba", "bcb", "acbc"])
        for name in order:
            ids = rng.sample(range(1, 6), rng.randint(1, 4))
            parents = [0, *ids, *([9] if rng.random() < 0.2 else [])]
            for identity in ids:
                above = ", ".join(str(rng.choice(parents)) for _ in range(rng.randint(1, 2)))
                rows.append(
                    row(name, identity, above, rng.choice(["entity - whole (x)", "global - (y)", "other - z (a)"]))
                )
        words = ["yes", "yes", "yes", "no", "Yes", "yes."]
        answers = {
            name: {f"{name} {number}?": [rng.choice(words) for _ in range(2)] for number in range(1, 6)}
            for name in "abc"
        }
        images = [f"{name}.png" for name in "abcd"]
        found = score(rows, answers, images, pic_num=2)
        items, failed, categories = second_reading(rows, answers, list("abcd"), 2)
        assert found["items"] == pytest.approx(items) and found["failed"] == failed
        assert found["l2"] == pytest.approx(categories)
        if items:
            assert found["overall"] == pytest.approx(100 * sum(items.values()) / len(items))
        stumbled += len(set(failed) & set(order))
    assert stumbled > 20


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="whole numbers"):
        score([SKIPPED, row("a", 1, "none", "x (1)")], {}, [])
    with pytest.raises(UserError, match="cannot read"):
        read_csv(tmp_path / "absent.csv")
    (tmp_path / "wrong.csv").write_text("item_id,text\n")
    with pytest.raises(UserError, match="proposition_id"):
        read_csv(tmp_path / "wrong.csv")


def test_csv_cells_stay_strings(tmp_path: Path) -> None:
    text = f'{HEADER}\n007,"a, b",k,1,0,c,d,"attribute - color (car, red)",Is it red?\n'
    (tmp_path / "dpg.csv").write_text(text, encoding="utf-8-sig")
    (read,) = read_csv(tmp_path / "dpg.csv")
    assert (read["item_id"], read["dependency"], read["tuple"]) == ("007", "0", "attribute - color (car, red)")
    assert score([read], {"007": {"Is it red?": ["yes"]}}, ["007.png"], 1, "fixed")["overall"] == 100


def test_crops_run_along_the_rows_and_need_the_exact_grid() -> None:
    grid = Image.new("RGB", (8, 8))
    for index, corner in enumerate([(0, 0), (4, 0), (0, 4), (4, 4)]):
        grid.paste((index, 0, 0), (*corner, corner[0] + 4, corner[1] + 4))
    assert [tile.getpixel((3, 3))[0] for tile in crops(grid)] == [0, 1, 2, 3]
    assert [tile.size for tile in crops(grid, 1)] == [(8, 8)]
    with pytest.raises(UserError, match="8x8"):
        crops(grid.crop((0, 0, 8, 6)))


@pytest.mark.parametrize(("text", "plain"), [("Yes.", "yes"), ("no, there is none", "no"), ("Two dogs", "two dogs")])
def test_plain_reply(text: str, plain: str) -> None:
    assert plain_reply(text) == plain


def test_questions_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "dpg_bench.csv"
    file.write_bytes(b"item_id,\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        read_csv(file)
