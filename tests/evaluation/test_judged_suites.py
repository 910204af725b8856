"""WISE and DPG-Bench with a judge over real HTTP that fails in every way: nothing that it answered is lost."""

from __future__ import annotations

import json
from pathlib import Path

import little
import pytest
from judge_server import Server, Step, answer, half_a_body, hang_up, raw, stall, status
from PIL import Image

from apexflow.errors import UserError
from apexflow.evaluation import judging
from apexflow.evaluation.judge import Judge
from apexflow.evaluation.runner import EvaluationSettings, Tools, score_folder

VERIFIED = EvaluationSettings(suite="wise")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time-outs and pauses that a test can wait for; one request at a time, so that the script has an order."""

    def judge(address: str, model: str, key: str | None, options: dict) -> Judge:
        return Judge(address, model, key, timeout=0.3, attempts=2, backoff=0.01, options=options)

    monkeypatch.setattr(judging, "Judge", judge)
    monkeypatch.setattr(judging, "WORKERS", 1)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(1, 5):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def wise_root(tmp_path: Path) -> Path:
    (tmp_path / "wise").mkdir()
    return little.wise_checkout(tmp_path / "wise")


def tools(server: Server, data: Path, protocol: str | None = "verified", model: str = "m") -> Tools:
    return Tools(data=data, judge=server.url, judge_model=model, protocol=protocol)


@pytest.mark.parametrize("failure", [status(429), status(500), hang_up, half_a_body, stall, raw(b"rubbish")])
def test_a_failing_judge_costs_only_the_picture_it_failed_on(
    server: Server, pictures: Path, wise_root: Path, tmp_path: Path, failure: Step
) -> None:
    server.script = [answer("Score: 1"), failure, failure, answer("Score: 1"), failure, answer("Score: 0")]
    report = score_folder(pictures, VERIFIED, tmp_path / "e", "x", tools(server, wise_root))
    assert list(report["failed"]) == ["2.png"] and "2 attempts" in report["failed"]["2.png"]
    assert (report["pictures"], report["overall"], report["complete"]) == (3, None, False)
    assert report["tasks"]["Culture"] == pytest.approx(2 / 3) and len(report["missing"]) == 996
    asked = len(server.asked)
    server.script = [answer("Score: 1")]
    again = score_folder(pictures, VERIFIED, tmp_path / "e", "x", tools(server, wise_root))
    assert len(server.asked) == asked + 1 and not again["failed"]
    assert again["tasks"]["Culture"] == pytest.approx(3 / 4)


def test_a_judge_that_never_makes_sense(server: Server, pictures: Path, wise_root: Path, tmp_path: Path) -> None:
    server.script = [answer("well ...")] * 3 + [answer("Score: 1")] * 3
    report = score_folder(pictures, VERIFIED, tmp_path / "e", "x", tools(server, wise_root))
    assert "parsed" in report["failed"]["1.png"] and report["pictures"] == 3
    stored = [json.loads(line) for line in (tmp_path / "e" / "replies.jsonl").read_text().splitlines()]
    assert [row["reply"] for row in stored] == ["well ..."] * 3 + ["Score: 1"] * 3


def test_a_judge_that_went_away_stops_the_run_and_loses_nothing(
    server: Server, pictures: Path, wise_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apexflow.evaluation.suites.wise.CHUNK", 2)
    server.script = [answer("Score: 1"), answer("Score: 0"), *[status(503)] * 4]
    with pytest.raises(UserError, match=r"answered none of 2 requests .*503.*run again"):
        score_folder(pictures, VERIFIED, tmp_path / "e", "x", tools(server, wise_root))
    rows = [json.loads(line) for line in (tmp_path / "e" / "results.jsonl").read_text().splitlines()]
    assert [row["prompt_id"] for row in rows] == [1, 2]
    server.script = [answer("Score: 1")] * 2
    asked = len(server.asked)
    report = score_folder(pictures, VERIFIED, tmp_path / "e", "x", tools(server, wise_root))
    assert len(server.asked) == asked + 2 and report["tasks"]["Culture"] == pytest.approx(3 / 4)


def test_what_is_sent_and_what_makes_a_score_comparable(
    server: Server, pictures: Path, wise_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.script = [answer("Score: 1")] * 4
    model = "Qwen/Qwen3.5-35B-A3B"
    report = score_folder(pictures, VERIFIED, tmp_path / "e", "x", tools(server, wise_root, model=model))
    assert report["scoring"]["comparable"] and report["scoring"]["judge"] == model
    first = server.asked[0]
    assert first["model"] == model and first["temperature"] == 0 and first["max_tokens"] == 500
    assert first["messages"][0]["content"][0]["text"] == "Grade a star 1 five points"
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in "".join(path.read_text() for path in (tmp_path / "e").iterdir() if path.is_file())
    with pytest.raises(UserError, match="different judge"):
        score_folder(pictures, VERIFIED, tmp_path / "e", "x", tools(server, wise_root))


def test_an_unreadable_picture_is_never_sent(server: Server, pictures: Path, wise_root: Path, tmp_path: Path) -> None:
    (pictures / "3.png").write_bytes(b"torn")
    server.script = [answer("Score: 1")] * 3
    report = score_folder(pictures, VERIFIED, tmp_path / "e", "x", tools(server, wise_root))
    assert len(server.asked) == 3 and "unreadable" in report["failed"]["3.png"]


def test_dpg_loses_one_picture_and_asks_only_what_it_has_no_reply_to(server: Server, tmp_path: Path) -> None:
    for name in ("data", "grids"):
        (tmp_path / name).mkdir()
    data = little.dpg_folder(tmp_path / "data", 2)
    for item in range(2):
        Image.new("RGB", (8, 8), (item, 0, 0)).save(tmp_path / "grids" / f"{item}.png")
    settings = EvaluationSettings(suite="dpg", per_prompt=1)
    server.script = [answer("Yes."), answer("no"), status(500), status(500), *[answer("yes")] * 3]
    report = score_folder(tmp_path / "grids", settings, tmp_path / "e", "x", tools(server, data, None))
    assert "1 of 3 requests" in report["failed"]["0.png"] and report["overall"] == 100
    assert "yes or no" in server.asked[0]["messages"][0]["content"][1]["text"]
    server.script = [answer("yes")]
    asked = len(server.asked)
    report = score_folder(tmp_path / "grids", settings, tmp_path / "e", "x", tools(server, data, None))
    assert len(server.asked) == asked + 1 and not report["failed"]
    # Item 0: yes, no, and a yes that depends on the no.
    assert report["overall"] == pytest.approx(100 * (1 / 3 + 1) / 2)
