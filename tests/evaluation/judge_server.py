"""A real local HTTP server that answers as a judge, or misbehaves by script."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Step = Callable[[BaseHTTPRequestHandler], None]


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def answer(text: object) -> Step:
    body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
    return lambda handler: send(handler, 200, body)


def status(code: int, **headers: str) -> Step:
    return lambda handler: send(handler, code, b'{"error": "told so"}', **headers)


def raw(body: bytes) -> Step:
    return lambda handler: send(handler, 200, body)


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.close()


def half_a_body(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 200, b'{"choices', Content_Length="500")
    handler.close_connection = True


def stall(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.6)


class Server:
    """Plays its script one step a request, then answers 2; keeps what it was asked."""

    def __init__(self) -> None:
        self.script: list[Step] = []
        self.asked: list[dict] = []
        self.headers: list[dict[str, str]] = []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.asked.append({**body, "path": self.path})
                    outer.headers.append(dict(self.headers))
                    step = outer.script.pop(0) if outer.script else answer("2")
                step(self)

            def log_message(self, *arguments: object) -> None:
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *arguments: None  # clients that gave up are expected here
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
