"""The judge against a real HTTP server that answers rubbish, fails, stalls and hangs up."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from judge_server import Server, Step, answer, half_a_body, hang_up, raw, stall, status
from little import question
from PIL import Image

from apexflow.errors import UserError
from apexflow.evaluation.judge import Judge, JudgeError, Message, strip_thinking
from apexflow.evaluation.replies import ReplyStore, Request, collect

MESSAGES = [{"role": "user", "content": "hello"}]


def judge(server: Server, **changes: object) -> Judge:
    return Judge(**{"base_url": server.url, "model": "m", "timeout": 0.3, "attempts": 3, "backoff": 0.01} | changes)


def test_request_and_reply(server: Server) -> None:
    server.script = [answer("fine")]
    messages = question("what?", Image.new("RGB", (2, 2)))
    options = {"temperature": 0, "max_tokens": 5}
    assert judge(server, api_key="secret", options=options)(messages) == "fine"
    assert server.asked == [{"path": "/v1/chat/completions", "model": "m", "messages": messages, **options}]
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in repr(judge(server, api_key="secret"))


PASSING = [status(429), status(500), status(503), hang_up, half_a_body, stall, raw(b"<html>"), raw(b"{}"), answer(None)]


@pytest.mark.parametrize("failure", PASSING)
def test_passing_failures_are_retried_then_reported(server: Server, failure: Step) -> None:
    server.script = [failure, failure]
    assert judge(server)(MESSAGES) == "2"
    server.script = [failure] * 3
    with pytest.raises(JudgeError, match="3 attempts"):
        judge(server)(MESSAGES)
    assert len(server.asked) == 6


def test_the_server_may_ask_for_time(server: Server) -> None:
    server.script = [status(429, Retry_After="0.3")]
    start = time.perf_counter()
    assert judge(server)(MESSAGES) == "2"
    assert time.perf_counter() - start >= 0.3
    server.script = [status(429, Retry_After="3600")]
    assert judge(server, longest_wait=0.01)(MESSAGES) == "2"


def test_refusals_are_final(server: Server) -> None:
    server.script = [status(401)]
    with pytest.raises(JudgeError, match=r"401.*told so"):
        judge(server)(MESSAGES)
    assert len(server.asked) == 1


def test_nobody_there(server: Server) -> None:
    with pytest.raises(JudgeError, match="no answer"):
        judge(server, base_url="http://127.0.0.1:9/v1")(MESSAGES)
    for wrong in ({"base_url": "localhost:8000"}, {"base_url": "file:///etc"}, {"attempts": 0}):
        with pytest.raises(UserError):
            judge(server, **wrong)


def requests(count: int) -> list[Request]:
    return [
        Request(str(index), lambda index=index: [{"role": "user", "content": str(index)}]) for index in range(count)
    ]


def test_collect_keeps_everything_and_asks_only_for_the_rest(server: Server, tmp_path: Path) -> None:
    server.script = [status(401), answer("rubbish"), answer("rubbish")]
    path = tmp_path / "replies" / "judge.jsonl"
    first = collect(requests(3), judge(server), str.isdigit, ReplyStore(path), attempts=2, workers=1)
    assert first.replies == {"2": "2"}
    assert "401" in first.failed["0"] and "parsed" in first.failed["1"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["key"], row["reply"], row["accepted"]) for row in rows] == [
        ("1", "rubbish", False),
        ("1", "rubbish", False),
        ("2", "2", True),
    ]
    asked = len(server.asked)
    again = collect(requests(3), judge(server), str.isdigit, ReplyStore(path))
    assert again.replies == {"0": "2", "1": "2", "2": "2"} and not again.failed
    assert len(server.asked) == asked + 2


def test_another_model_is_asked_anew(server: Server, tmp_path: Path) -> None:
    store = ReplyStore(tmp_path / "r.jsonl")
    collect(requests(2), judge(server), str.isdigit, store)
    collect(requests(2), judge(server), str.isdigit, store)
    assert len(server.asked) == 2
    collect(requests(2), judge(server, model="other"), str.isdigit, store)
    assert len(server.asked) == 4


def test_half_a_line_of_a_killed_run(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    collect(requests(2), judge(server), str.isdigit, ReplyStore(path), workers=1)
    path.write_text(path.read_text()[:-20])
    assert len(collect(requests(2), judge(server), str.isdigit, ReplyStore(path)).replies) == 2
    assert len(server.asked) == 3
    collect(requests(2), judge(server), str.isdigit, ReplyStore(path))
    assert len(server.asked) == 3


def test_many_at_once_with_trouble(server: Server, tmp_path: Path) -> None:
    server.script = [status(500), hang_up, raw(b"no")] * 5
    path = tmp_path / "r.jsonl"
    result = collect(requests(30), judge(server, attempts=20), str.isdigit, ReplyStore(path), workers=8)
    assert len(result.replies) == 30 and not result.failed
    assert len(path.read_text().splitlines()) == 30


def test_a_judge_in_process_and_an_unreadable_image(tmp_path: Path) -> None:
    def missing() -> list[dict]:
        return question("?", tmp_path / "absent.png")

    asked = [*requests(1), Request("gone", missing)]
    result = collect(asked, lambda messages: "1", str.isdigit, ReplyStore(tmp_path / "r.jsonl"))
    assert result.replies == {"0": "1"} and "absent.png" in result.failed["gone"]


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_leaves_a_hanging_judge_at_once_and_keeps_what_it_answered(tmp_path: Path, workers: int) -> None:
    hanging, release = threading.Event(), threading.Event()
    ended: list[str] = []

    def ask(messages: Sequence[Message]) -> str:
        if messages[0]["content"] == "0":
            return "2"
        hanging.set()
        release.wait(20)
        ended.append("after its time")
        return "2"

    def interrupt() -> None:
        hanging.wait()
        while not store.accepted:  # another worker's answer may still be on its way
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    requests = [Request(str(n), lambda n=n: [{"role": "user", "content": str(n)}]) for n in range(3)]
    store = ReplyStore(tmp_path / "replies.jsonl")
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        collect(requests, ask, bool, store, workers=workers)
    assert not ended and [key for key, _ in store.accepted] == ["0"]
    left = [thread.daemon for thread in threading.enumerate() if "carry_out" in thread.name]
    assert all(left) and bool(left) == (workers > 1)  # none that the process would wait for
    release.set()


@pytest.mark.parametrize(
    ("reply", "rest"), [("<think>a</think> b", "b"), ("a</think>b", "b"), ("<think>a", ""), (" b ", "b")]
)
def test_strip_thinking(reply: str, rest: str) -> None:
    assert strip_thinking(reply) == rest


def test_a_body_that_nests_too_deep_is_rubbish(server: Server) -> None:
    server.script = [raw(b"[" * 100_000)]
    assert judge(server)([]) == "2"


@pytest.mark.parametrize("url", ["http://[::1/v1", "http://host:many/v1", "http://a..b/v1", "http://host:0/v1"])
def test_addresses_that_cannot_be(url: str) -> None:
    with pytest.raises(UserError, match="address"):
        Judge(url, "m")


@pytest.mark.parametrize("key", ["secret\n", "secret\u2013"])
def test_a_key_that_no_header_takes_is_not_shown(key: str) -> None:
    with pytest.raises(UserError, match="OPENAI_API_KEY") as told:
        Judge("http://host/v1", "m", key)
    assert "secret" not in str(told.value)
