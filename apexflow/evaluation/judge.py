"""A judge over an OpenAI-compatible HTTP API (vLLM, SGLang, llama.cpp, hosted).

A `Judge` sends one conversation and retries what may pass (time-outs, closed connections, 408/409/429/5xx, a body
that is no answer). `replies.py` asks many at a time and keeps what they answer.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
                "the judge's API key holds a line break or another invalid character: set OPENAI_API_KEY again"
            )
        if self.attempts < 1:
            raise UserError(f"judge attempts is {self.attempts}: allow at least one")

    def __call__(self, messages: Sequence[Message]) -> str:
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
        raise _Retry(f"the body is not a chat completion: {body[:80]!r}") from None
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
