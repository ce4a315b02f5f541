"""A chat endpoint on this machine that falls ill when it is told to."""

from __future__ import annotations

import json
import random
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from parrot_edge.jsonl import read_lines
from parrot_edge.seeds import builtin_path

ILLNESSES = ("silent", "stalled", "dropping", "busy", "babbling")
"""silent    takes requests and does not answer
stalled   stops in the middle of an answer
dropping  closes the connection
busy      503, to be asked again at an hour of its own clock
babbling  answers what is no JSON
"""

_WORDS = sorted(
    {word for line in read_lines(builtin_path()) for word in line.row().get("prompt", "").split()}
)


class Endpoint(ThreadingHTTPServer):
    """Invented answers at `url`; `fall_ill` makes them fail until `recover`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1#invented"
        self.illness: str | None = None
        self.answered = self.failed = 0
        self._healthy = threading.Event()
        self._healthy.set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fall_ill(self, illness: str) -> None:
        self.illness = illness
        self._healthy.clear()

    def recover(self) -> None:
        self.illness = None
        self._healthy.set()

    def wait_for_health(self) -> None:
        self._healthy.wait()

    def handle_error(self, *_: object) -> None:
        """Clients that went away are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        illness = self.server.illness
        if illness is None:
            time.sleep(0.2)
            self.server.answered += 1
            return self._send(200, _completion(body))
        self.server.failed += 1
        if illness == "busy":
            soon = formatdate(time.time() + 2, usegmt=True)
            return self._send(503, b'{"error": {"message": "overloaded"}}', {"Retry-After": soon})
        if illness == "babbling":
            return self._send(200, b'{"choices": [{"mess')
        if illness == "stalled":
            self._send_head(200, 1000, {})
            self.wfile.write(b'{"choices": [')
            self.wfile.flush()
        if illness in ("silent", "stalled"):
            self.server.wait_for_health()
        self.close_connection = True

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._send_head(status, len(body), headers or {})
        self.wfile.write(body)

    def _send_head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)  # sends Date as well
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(length)} | headers
        ).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


def _completion(request: dict[str, Any]) -> bytes:
    """An answer that depends on the conversation alone."""
    dice = random.Random(json.dumps(request["messages"]))
    text = " ".join(dice.choices(_WORDS, k=dice.randint(5, 30))) + "."
    message = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return json.dumps({"id": "0", "object": "chat.completion", "choices": [message], "usage": usage}).encode()
