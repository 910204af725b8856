"""A judge over an OpenAI-compatible HTTP API (vLLM, SGLang, llama.cpp, hosted), with its replies kept on disk.

`Judge.ask` sends one conversation and retries what may pass (time-outs, closed connections, 408/409/429/5xx, a body
that is no answer). `collect` asks many, several at a time, and appends every raw reply to a JSONL file as it arrives:
nothing scored is ever lost, a second run asks only for what is missing, and what stays unanswered is reported.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from apexflow.errors import UserError

Message = dict[str, Any]
Ask = Callable[[Sequence[Message]], str]
Picture = Image.Image | bytes | str | Path

PASSING = frozenset({408, 409, 425, 429})  # client errors that the same request may survive later; 5xx joins them
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


class JudgeError(Exception):
    """One request that got no answer: the last thing that went wrong, after every attempt."""


class _Retry(Exception):
    """A failure that another attempt may survive; `after` is the server's own wish in seconds, if it had one."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


@dataclass(frozen=True)
class Judge:
    """An OpenAI-compatible chat endpoint as a callable: messages in, the reply's text out."""

    base_url: str  # up to and including /v1
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 120.0  # seconds, for connecting and for each read
    attempts: int = 5
    backoff: float = 1.0  # seconds before the second attempt; doubles each time, with jitter
    longest_wait: float = 60.0  # seconds; also bounds a server's Retry-After
    options: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})  # merged into the request body

    def __post_init__(self) -> None:
        if not _is_address(self.base_url):
            raise UserError(
                f"the judge's address {self.base_url!r} is not usable: give one such as http://host:8000/v1"
            )
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError(
                "the judge's key holds a line break or another sign that no key has: set OPENAI_API_KEY anew"
            )
        if self.attempts < 1:
            raise UserError(f"judge attempts is {self.attempts}: allow at least one")

    def __call__(self, messages: Sequence[Message]) -> str:
        return self.ask(messages)

    def ask(self, messages: Sequence[Message]) -> str:
        """The text of the reply. Raises JudgeError after the last attempt, or at once for a refusal such as 401."""
        attempt = 1
        while True:
            try:
                return self._post(messages)
            except _Retry as failure:
                if attempt >= self.attempts:
                    raise JudgeError(f"{self.base_url}: {failure} ({attempt} attempts)") from None
                time.sleep(self._pause(attempt, failure.after))
            attempt += 1

    def identity(self, messages: Sequence[Message]) -> str:
        """sha256 of everything that decides the answer: a stored reply is reused only for the same request."""
        return hashlib.sha256(json.dumps(self._body(messages), sort_keys=True).encode()).hexdigest()

    def _body(self, messages: Sequence[Message]) -> dict[str, Any]:
        return {"model": self.model, "messages": list(messages), **self.options}

    def _pause(self, attempt: int, wished: float | None) -> float:
        """Seconds until the next attempt; the jitter keeps parallel workers from returning all at once."""
        doubled = self.backoff * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
        return min(doubled if wished is None else max(wished, doubled), self.longest_wait)

    def _post(self, messages: Sequence[Message]) -> str:
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            request = urllib.request.Request(url, json.dumps(self._body(messages)).encode(), headers, method="POST")
            with _opener(url).open(request, timeout=self.timeout) as response:
                return _reply_text(response.read())
        except urllib.error.HTTPError as error:
            raise _http_failure(url, error) from None
        except (OSError, http.client.HTTPException) as error:  # URLError, time-outs and resets are OSError
            raise _Retry(f"no answer ({getattr(error, 'reason', None) or error or type(error).__name__})") from None


def _is_address(url: str) -> bool:
    try:
        address = urlsplit(url)
        (address.hostname or "").encode("idna")
        return address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:  # a port that is no number, a bracket that is not closed, a name with an empty part
        return False


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Proxies from the environment, but never for a server on this machine."""
    local = urlsplit(url).hostname in LOCAL_HOSTS
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))


def _http_failure(url: str, error: urllib.error.HTTPError) -> Exception:
    if error.code in PASSING or error.code >= 500:
        after = error.headers.get("Retry-After", "")
        return _Retry(f"HTTP {error.code}", float(after) if re.fullmatch(r"\d+(\.\d+)?", after) else None)
    try:
        detail = error.read(300).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException):
        detail = ""
    return JudgeError(f"{url}: HTTP {error.code} {error.reason} {detail}".strip())


def _reply_text(body: bytes) -> str:
    """choices[0].message.content of a chat completion; anything else is worth another attempt."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise _Retry(f"the body is no chat completion: {body[:80]!r}") from None
    if not isinstance(content, str):
        raise _Retry("the reply holds no text")
    return content


def strip_thinking(reply: str) -> str:
    """The reply without its <think>...</think> part; one that was cut off while thinking answers nothing."""
    # Chat templates often open the tag inside the prompt, so the closing tag alone decides.
    return reply.rpartition("</think>")[2].partition("<think>")[0].strip()


def picture_url(image: Picture) -> str:
    """data:image/png;base64,... of a file's own bytes (the type says png whatever it is), or of a picture as PNG."""
    return f"data:image/png;base64,{picture_base64(image)}"


def picture_base64(image: Picture) -> str:
    """Base64 of an image file (path or its bytes) as it is, or of a picture encoded as PNG."""
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        image = buffer.getvalue()
    elif not isinstance(image, bytes):
        try:
            image = Path(image).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the image {image!r}: {error.strerror}") from None
    return base64.b64encode(image).decode("ascii")


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
    on_done: Callable[[str], None] | None = None,
) -> Collected:
    """Asks what the store does not hold yet, `workers` requests at a time and no more messages in memory than that.

    accept(reply) says whether a reply can be parsed; one that cannot is stored too and asked again, up to `attempts`
    times (identical requests, as the official judges do). on_done(key) is called in this thread as each request ends.
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
            key = running.pop(future)
            collected.add(key, future)
            if on_done:
                on_done(key)


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
