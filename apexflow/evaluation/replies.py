"""Many questions to a judge, several at a time, and its replies kept on disk.

`collect` appends every raw reply to a JSONL file as it arrives: nothing scored is ever lost, a second run asks only for
what is missing, and what stays unanswered is reported.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from apexflow.errors import UserError
from apexflow.evaluation.judge import Ask, Judge, JudgeError, Message


@dataclass(frozen=True)
class Request:
    """key: what the reply is stored under; messages: made only when the request's turn comes (images are large)."""

    key: str
    messages: Callable[[], Sequence[Message]]


@dataclass
class Collected:
    """replies {key: accepted raw reply}; failed {key: why there is none}."""

    replies: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, key: str, future: Future[str]) -> None:
        """Takes what a finished request came to; an error that is neither the judge's nor the user's goes up."""
        try:
            self.replies[key] = future.result()
        except (JudgeError, UserError) as error:
            self.failed[key] = str(error)


class ReplyStore:
    """Raw replies in a JSONL file, one {"key", "request", "accepted", "reply"} a line, appended as they arrive."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.accepted: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text("utf-8", errors="replace") if self.path.exists() else ""
        for row in _complete_rows(text):
            if row["accepted"]:
                self.accepted[row["key"], row["request"]] = row["reply"]
        if text and not text.endswith("\n"):
            self._append("")  # closes the half line of a run that was killed while writing

    def add(self, key: str, request: str, reply: str, accepted: bool) -> None:
        """Written and flushed before it returns; safe to call from several threads."""
        row = {"key": key, "request": request, "accepted": accepted, "reply": reply}
        with self._lock:
            self._append(json.dumps(row))
            if accepted:
                self.accepted[key, request] = reply

    def _append(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(f"{line}\n")


def _complete_rows(text: str) -> Iterator[dict[str, Any]]:
    """The rows of a store; half a line is skipped, so its request is asked again."""
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.keys() >= {"key", "request", "accepted", "reply"}:
            yield row


def collect(
    requests: Iterable[Request],
    ask: Ask,
    accept: Callable[[str], bool],
    store: ReplyStore,
    *,
    attempts: int = 3,
    workers: int = 8,
) -> Collected:
    """Asks what the store does not hold yet, `workers` requests at a time and no more messages in memory than that.

    accept(reply) says whether a reply can be parsed; one that cannot is stored too and asked again, up to `attempts`
    times (identical requests, as the official judges do).
    Ctrl-C leaves at once, whatever the judge does; what it answered is in the store.
    """
    collected = Collected()
    running: dict[Future[str], str] = {}
    waiting = iter(requests)
    start = _now if workers == 1 else _aside
    while True:
        for request in islice(waiting, workers - len(running)):
            task = partial(_ask_until_accepted, request, ask, accept, store, attempts)
            running[start(task)] = request.key
        if not running:
            return collected
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            collected.add(running.pop(future), future)


def _now(task: Callable[[], str]) -> Future[str]:
    """Carried out in this thread, where Ctrl-C arrives: an in-process judge must not be left computing."""
    future: Future[str] = Future()
    try:
        future.set_result(task())
    except Exception as error:
        future.set_exception(error)
    return future


def _aside(task: Callable[[], str]) -> Future[str]:
    """Carried out in a thread that nobody waits for at the end: one that hangs on a server keeps no process from leaving."""
    future: Future[str] = Future()

    def carry_out() -> None:
        try:
            future.set_result(task())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=carry_out, daemon=True).start()
    return future


def _ask_until_accepted(
    request: Request, ask: Ask, accept: Callable[[str], bool], store: ReplyStore, attempts: int
) -> str:
    messages = request.messages()
    identity = _identity(ask, messages)
    if (request.key, identity) in store.accepted:
        return store.accepted[request.key, identity]
    for _ in range(attempts):
        reply = ask(messages)
        accepted = accept(reply)
        store.add(request.key, identity, reply, accepted)
        if accepted:
            return reply
    raise JudgeError(f"no reply could be parsed ({attempts} attempts)")


def _identity(ask: Ask, messages: Sequence[Message]) -> str:
    """A judge in process has no request body: its messages alone identify the question."""
    if isinstance(ask, Judge):
        return ask.identity(messages)
    return hashlib.sha256(json.dumps(list(messages), sort_keys=True).encode()).hexdigest()
