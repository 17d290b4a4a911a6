"""A tiny server that speaks the service's interface without a model, so that the page can be tried and tested.

    python -m tests.server.static.stand_in 8123    # serves the page to look at by hand

Answers are told beforehand (`StandIn.on`); what was asked is kept (`StandIn.asked`).
"""

from __future__ import annotations

import json
import math
import select
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

STATIC = Path(__file__).resolve().parents[3] / "alpaca_lora" / "server" / "static"
# the service's policy, and one thing more: no text may ever become script or markup
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
BASE = {"id": "smollm2-135m", "object": "model", "kind": "base", "template": "chatml"}
SHOP = {"id": "shop", "object": "model", "kind": "adapter", "method": "lora", "rank": 16, "template": "alpaca"}
MOOD = {"id": "mood", "object": "model", "kind": "classifier", "labels": ["bad", "good"]}
POET = {"id": "poet", "object": "model", "kind": "adapter", "method": "dora", "rank": 8, "template": "chatml"}


@dataclass
class Answer:
    """What a chat is answered with.

    pieces: texts, one event each. gate: waited for behind the first ``before_gate`` pieces. delay: seconds between
    pieces. finish: None leaves the stream without an end. status and headers: an error instead of a stream. raw: the
    body as it is. cut: the connection is dropped at the end.
    """

    pieces: Sequence[str] = ()
    finish: str | None = "stop"
    gate: threading.Event | None = None
    before_gate: int = 1
    delay: float = 0.0
    status: int = 200
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    cut: bool = False
    prompt_tokens: int = 12
    cached_tokens: int = 0


class StandIn:
    """Serves on 127.0.0.1 at ``url`` until `close`. ``keys`` are let in; while there are none, everybody is."""

    def __init__(self, port: int = 0) -> None:
        self.models: list[Any] = [BASE, SHOP, POET, MOOD]
        self.reports: dict[str, dict[str, Any]] = {}
        self.labels: dict[str, dict[str, float]] = {}  # of a text -> probabilities, the likeliest first
        self.keys: set[str] = set()
        self.asked: list[dict[str, Any]] = []
        self.given_up: list[str] = []
        self._answers: dict[tuple[str, str | None], Answer] = {}
        stand_in = self

        class Handler(_Handler):
            server_state = stand_in

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/"

    def on(self, prompt: str, answer: Answer | str, model: str | None = None) -> None:
        """Answer the prompt so, from whichever model or from one."""
        self._answers[prompt, model] = Answer([answer]) if isinstance(answer, str) else answer

    def answer(self, prompt: str, model: str) -> Answer:
        told = self._answers.get((prompt, model)) or self._answers.get((prompt, None))
        return told or Answer([f"{model} heard: ", prompt])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_state: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read what was asked, not a log."""

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def do_GET(self) -> None:
        name = "index.html" if self.path == "/" else self.path[1:]
        if "/" not in name and (STATIC / name).is_file():
            self._send(200, (STATIC / name).read_bytes(), MEDIA_TYPES[Path(name).suffix])
        elif not self._is_known():
            self._refuse(401, "Incorrect API key provided")
        elif self.path == "/v1/models":
            self._send_json(200, {"object": "list", "data": self.server_state.models})
        elif self.path.startswith("/v1/adapters/") and self.path.endswith("/report"):
            name = unquote(self.path.removeprefix("/v1/adapters/").removesuffix("/report"))
            if name in self.server_state.reports:
                self._send_json(200, self.server_state.reports[name])
            else:
                self._refuse(404, f"{name} has no report")
        else:
            self._refuse(404, "no such path")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_known():
            self._refuse(401, "Incorrect API key provided")
            return
        self.server_state.asked.append(body)
        if self.path == "/v1/classify":
            self._classify(body)
            return
        answer = self.server_state.answer(body["messages"][-1]["content"], body["model"])
        if answer.status != 200:
            self._refuse(answer.status, answer.message, answer.headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._stream(answer, body["model"])
        except ConnectionError:
            self.server_state.given_up.append(body["model"])
            self.close_connection = True

    def _classify(self, body: dict[str, Any]) -> None:
        shares = self.server_state.labels.get(body["input"])
        if shares is None:
            self._refuse(400, "There is no text to classify")
            return
        label, is_long = max(shares, key=lambda name: shares[name]), len(body["input"]) > 1000
        found = {"index": 0, "label": label, "probabilities": shares, "truncated": is_long}
        self._send_json(200, {"object": "list", "model": body["model"], "data": [found]})

    def _stream(self, answer: Answer, model: str) -> None:
        if answer.raw is not None:
            self._chunk(answer.raw)
        for index, piece in enumerate(answer.pieces):
            if answer.gate is not None and index == answer.before_gate:
                self._wait(answer.gate)
            if answer.delay:
                time.sleep(answer.delay)
            self._event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
        if answer.cut:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if answer.raw is None and answer.finish is not None:
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": answer.finish}]})
            self._event({"choices": [], "usage": {
                "prompt_tokens": answer.prompt_tokens, "completion_tokens": len(answer.pieces),
                "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
            }})  # fmt: skip
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _wait(self, gate: threading.Event) -> None:
        """ConnectionError when the client goes away meanwhile."""
        while not gate.wait(0.02):
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and self.connection.recv(1, socket.MSG_PEEK) == b"":
                raise ConnectionResetError

    def _event(self, value: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _is_known(self) -> bool:
        keys = self.server_state.keys
        return not keys or self.headers.get("Authorization", "").removeprefix("Bearer ") in keys

    def _refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self._send_json(status, {"error": {"message": message, "type": "error", "code": None}}, headers)

    def _send_json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", headers)

    def _send(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def training_report(steps: int = 120) -> dict[str, Any]:
    """A run that goes well: the loss falls, a little unevenly; evaluated every twentieth step."""
    metrics: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        wobble = 0.12 * math.sin(step * 1.7) * math.sin(step * 0.61)
        rate = 3e-4 * min(step / 10, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        metrics.append({"step": step, "train_loss": 1.1 + 1.6 * math.exp(-step / 28) + wobble, "learning_rate": rate})
        if step % 20 == 0:
            metrics.append({"step": step, "val_loss": 1.16 + 1.5 * math.exp(-step / 30)})
    summary = {"steps": steps, "train_loss": 1.112, "val_loss": 1.187, "best_val_loss": 1.187, "tokens": 481_203}
    return {"metrics": metrics, "summary": summary}


def main() -> None:
    stand_in = StandIn(int(sys.argv[1]) if len(sys.argv) > 1 else 8123)
    stand_in.reports["shop"] = training_report()
    print(stand_in.url)
    threading.Event().wait()


if __name__ == "__main__":
    main()
