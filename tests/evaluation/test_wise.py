"""WISE: what parses, what it adds up to, and the template read from a checkout without running it."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from PIL import Image

from apexflow.errors import UserError
from apexflow.evaluation.suite import Tools
from apexflow.evaluation.suites.wise import Wise
from apexflow.evaluation.wise import PROTOCOLS, aggregate, judge_messages, parse, records, wiscore

SCRIPT = '''
import openai
SYSTEM = "Be strict."

def encode_image(path):
    raise SystemExit("never run")

def build_evaluation_messages(prompt_data, image_base64):
    """Messages."""
    prompt = prompt_data["Prompt"]
    return [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM + " Now."}]},
        {"role": "user", "content": [
            {"type": "text", "text": f"""Grade \\"{prompt}\\" \\"{prompt_data['Explanation']}\\" {{0-2}}""".strip()},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image_base64}"}},
        ]},
    ]

open("ran", "w")
'''
RECORD = {"Prompt": "a {cake}", "Explanation": "round", "prompt_id": 7}


def grades(c: int, r: int, a: int) -> dict[str, int]:
    return {"consistency": c, "realism": r, "aesthetic_quality": a}


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Consistency: 2\nRealism: 1\nAesthetic Quality: 0", grades(2, 1, 0)),
        ("**consistency**: 2\n*REALISM* 1\n**Aesthetic Quality**:0", grades(2, 1, 0)),
        ("Consistency: 1\nRealism: 1\nAesthetic Quality: 1\nConsistency: 2", grades(2, 1, 1)),
        ("Consistency: 10\nRealism: 9\nAesthetic Quality: 2/2", grades(1, 9, 2)),
        ("1\n 2 \n0\n2", grades(1, 2, 0)),
        ("<think>Consistency: 0</think>Consistency: 2\nRealism: 1\nAesthetic Quality: 0", grades(2, 1, 0)),
        ("**Consistency:** 2\n**Realism:** 1\n**Aesthetic Quality:** 0", None),
        ("Consistency\uff1a 2\nRealism\uff1a 1\nAesthetic Quality\uff1a 0", None),
        ("Consistency: 2\nRealism: 1", None),
        ("Consistency: 2\n1\n1\n1", None),
        ("1\n2", None),
        ("3\n1\n1", None),
        ("<think>Consistency: 2\nRealism: 1\nAesthetic Quality: 0", grades(2, 1, 0)),  # never closed: it stays
        ("***Consistency***: 2\nRealism: 1\nAesthetic Quality: 0", None),  # up to two stars
        ("Consistency (0-2): 2\nRealism: 1\nAesthetic Quality: 0", None),
        ("Consistency -1\nRealism: 1\nAesthetic Quality: 0", None),
        ("Consistency\n2\nRealism :1\nAesthetic quality 0", grades(2, 1, 0)),
        ("2, 1, 0", None),
        ("I cannot judge this picture.", None),
        ('{"Consistency": 2, "Realism": 1, "Aesthetic Quality": 0}', None),  # the quote stands where a star may
        ("", None),
    ],
)
def test_legacy_replies(reply: str, expected: dict[str, int] | None) -> None:
    assert parse(reply, "legacy") == expected


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 1", 1),
        ("score 0", 0),
        ("Score: 0 then Score: 1", 0),
        ("I looked.\n1\n", 1),
        ("Score: 1.", 1),
        ("Score: 10", None),
        ("Score: 2", None),
        ("Score: -1", None),
        ("Score: 1/1", 1),
        ("**Score:** 1", None),
        ("**Score:** 1\n1", 1),
        ("Score: one", None),
        ("Score: 0.5", 0),  # the dot ends the word
        ("**Score**: 1", 1),
        ("Score**0", 0),
        ("WiScore: 1", 1),  # the official pattern does not ask where the word begins
        ("WiScore: 1, Score: 0", 1),
        ("1\n0", None),
        ("<think>Score: 0</think>\nScore: 1", 1),
        ("<think>a</think> Score: 0 <think>b</think>\nScore: 1", 0),
        ("Score: 0\n</think>Score: 1", 0),  # a lone closing tag goes, and what stands before it stays
        ("1</think>\n\n0", None),  # with the tag goes the line break, and "10" is no bit
        ("<think>Score: 1", 1),
        ("fine", None),
    ],
)
def test_verified_replies(reply: str, score: int | None) -> None:
    assert parse(reply, "verified") == (None if score is None else {"score": score})


def test_wiscore_weights() -> None:
    assert wiscore(2, 2, 2) == pytest.approx(1)
    assert (wiscore(2, 0, 0), wiscore(0, 2, 0), wiscore(0, 0, 2)) == pytest.approx((0.7, 0.2, 0.1))


@pytest.mark.parametrize("protocol", ["legacy", "verified"])
def test_the_weights_follow_the_sizes(protocol: str) -> None:
    ranges = PROTOCOLS[protocol].categories.values()
    assert [weight for *_, weight in ranges] == pytest.approx([(last - first + 1) / 1000 for first, last, _ in ranges])


def verified(ids: range, score: object = 1) -> list[dict]:
    return [{"prompt_id": identity, "score": score} for identity in ids]


def test_overall_is_weighted_and_needs_every_id() -> None:
    rows = verified(range(1, 401)) + verified(range(401, 1001), 0)
    whole = aggregate(rows, "verified")
    assert whole["overall"] == pytest.approx(0.4)
    assert whole["categories"]["Culture"] == 1 and whole["categories"]["Time"] == 0
    assert aggregate(rows[:-1], "verified")["overall"] is None
    legacy = [{"prompt_id": identity, **grades(2, 2, 2)} for identity in range(1, 1001)]
    assert aggregate(legacy, "legacy")["overall"] == pytest.approx(1)


def test_rows_without_numbers_count_as_present_and_duplicates_are_averaged() -> None:
    rows = verified(range(1, 1001))
    rows[0]["score"] = None
    rows[1]["score"] = float("nan")
    rows += verified(range(3, 4), 0)
    result = aggregate(rows, "verified")
    assert result["categories"]["Culture"] == pytest.approx(398 / 399) and result["overall"] is not None
    empty = aggregate(verified(range(1, 1001), "n/a"), "verified")
    assert (empty["overall"], empty["categories"]["Time"]) == (None, None)


def test_mistakes_in_rows_and_protocols_are_told() -> None:
    with pytest.raises(UserError, match="unknown"):
        aggregate([], "verify")
    with pytest.raises(UserError, match="prompt_id"):
        aggregate([{"score": 1}], "verified")


def checkout(root: Path, script: str, name: str = "WISE_legacy/gpt_eval.py") -> Path:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(script)
    return root


def test_messages_come_from_the_checkout_unexecuted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    messages = judge_messages(checkout(tmp_path, SCRIPT), "legacy", RECORD, b"\xff\xd8jpeg")
    assert messages[0] == {"role": "system", "content": [{"type": "text", "text": "Be strict. Now."}]}
    text, image = messages[1]["content"]
    assert text["text"] == 'Grade "a {cake}" "round" {0-2}'
    encoded = base64.b64encode(b"\xff\xd8jpeg").decode()
    assert image["image_url"]["url"] == f"data:image/png;base64,{encoded}"
    assert not (tmp_path / "ran").exists()


def test_other_ways_to_write_the_template(tmp_path: Path) -> None:
    script = """
TEMPLATE = "{} means {}"
def make_messages(prompt, explanation, image_path):
    picture = encode_image(image_path)
    return [{"role": "user", "content": TEMPLATE.format(prompt, explanation) + picture}]
"""
    root = checkout(tmp_path, script, "vllm_eval.py")
    (tmp_path / "x.png").write_bytes(b"x")
    (message,) = judge_messages(root, "verified", RECORD, tmp_path / "x.png")
    assert message == {"role": "user", "content": "a {cake} means roundeA=="}
    (message,) = judge_messages(root, "verified", RECORD, Image.new("RGB", (1, 1)))
    assert message["content"].startswith("a {cake} means roundiVBORw0KGgo")


@pytest.mark.parametrize(
    "script",
    [
        "x = 1",
        "def (",
        "def build_evaluation_messages(data, image): return [__import__('os').getcwd()]",
        "def build_evaluation_messages(data, image):\n for x in data: pass",
        "def build_evaluation_messages(data, image): return [data['Absent']]",
        "def build_evaluation_messages(data, image): return 1 + 'x'",
        "def build_evaluation_messages(data, image): pass",
    ],
)
def test_scripts_that_are_no_template_are_refused(tmp_path: Path, script: str) -> None:
    with pytest.raises(UserError):
        judge_messages(checkout(tmp_path, script), "legacy", RECORD, b"")


def test_missing_checkout_and_image(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="checkout"):
        judge_messages(tmp_path, "legacy", RECORD, b"")
    with pytest.raises(UserError, match="image"):
        judge_messages(checkout(tmp_path, SCRIPT), "legacy", RECORD, tmp_path / "absent.png")
    with pytest.raises(UserError, match="checkout"):
        records(tmp_path, "verified")


def test_records_in_order(tmp_path: Path) -> None:
    (tmp_path / "data_verified").mkdir()
    for name, identity in (("a_verified", 2), ("b_verified", 1), ("merge", 9)):
        (tmp_path / "data_verified" / f"{name}.json").write_text(json.dumps([{"prompt_id": identity}]))
    assert [record["prompt_id"] for record in records(tmp_path, "verified")] == [1, 2]


def test_a_verified_score_beyond_the_bit_is_dropped() -> None:
    result = aggregate([*verified(range(1, 1001)), {"prompt_id": 1, "score": 2}], "verified")
    assert result["categories"]["Culture"] == 1 and result["overall"] is not None


@pytest.mark.parametrize("content", ["[1, 2]", '{"a": 1}', "7"])
def test_prompts_that_are_no_records(content: str, tmp_path: Path) -> None:
    (tmp_path / "data_verified").mkdir()
    (tmp_path / "data_verified" / "a_verified.json").write_text(content)
    with pytest.raises(UserError, match="WISE prompts"):
        records(tmp_path, "verified")


def test_prompts_without_text(tmp_path: Path) -> None:
    (tmp_path / "data_verified").mkdir()
    (tmp_path / "data_verified" / "a_verified.json").write_text('[{"prompt_id": 1}]')
    with pytest.raises(UserError, match="have no text"):
        Wise(Tools(data=tmp_path, protocol="verified")).prompts()
