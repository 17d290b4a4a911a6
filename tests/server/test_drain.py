"""SIGTERM: not ready at once, answers that run may end, the others are told, a second signal ends it all."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from alpaca_lora.server.listener import bind
from tests.package_files import CHECKOUT
from tests.server.open_server import KEY, chat_body, until

pytestmark = pytest.mark.slow  # a process of its own for each
PROGRAM = """
import sys
from tests.server import open_server as rooms
from tests.server.fake_engine import FakeEngine
from tests.tiny import CHATML, ByteTokenizer
from alpaca_lora.inference.prompts import PromptFormat
from alpaca_lora.server.app import create_app
from alpaca_lora.server.keys import KeyRing
from alpaca_lora.server.listener import Listener, bind
from alpaca_lora.server.options import ServeOptions
from alpaca_lora.text.templates import load_template

seconds, drain = map(float, sys.argv[1:])
tokenizer = ByteTokenizer(chat_template=CHATML)
engine = FakeEngine(tokenizer, answer=lambda request: "word " * 10, seconds=seconds)
prompts = PromptFormat.of(load_template(None, tokenizer), tokenizer)
options = ServeOptions(drain_timeout=drain)
app = create_app(
    engine, rooms.adapters(tokenizer), prompts, options, base_name=rooms.BASE, fingerprint="f" * 64,
    grammars=rooms.NoGrammars(), keys=KeyRing.from_text(rooms.KEYS, "keys"),
)
socket = bind("127.0.0.1", 0)
print(socket.getsockname()[1], flush=True)
listener = Listener(app, options)
listener.run(sockets=[socket])
print(listener.received, listener.was_drained, flush=True)
"""


@contextmanager
def process(seconds: float, drain: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own; seconds of a step, seconds to drain."""
    running = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(seconds), str(drain)], cwd=CHECKOUT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert running.stdout is not None
        url = f"http://127.0.0.1:{int(running.stdout.readline())}"
        until(lambda: is_open(url), seconds=30)
        yield running, url
    finally:
        running.kill()
        running.communicate()


def is_open(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


class Asked:
    """A stream that is read in a thread."""

    def __init__(self, url: str) -> None:
        self.lines: list[str] = []
        self._url = url
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        until(lambda: len(self.lines) > 2)

    def _read(self) -> None:
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.stream(
            "POST", f"{self._url}/v1/chat/completions", json=chat_body(stream=True), headers=headers, timeout=30
        ) as response:
            for line in response.iter_lines():
                if line:
                    self.lines.append(line)

    def last(self) -> str:
        self._thread.join(20)
        return self.lines[-1].removeprefix("data: ")


def test_running_answers_end_and_new_ones_are_refused() -> None:
    with process(0.05, 20) as (running, url):
        asked = Asked(url)
        running.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        assert httpx.get(f"{url}/health").status_code == 200
        refused = httpx.post(f"{url}/v1/chat/completions", json=chat_body(), headers={"authorization": f"Bearer {KEY}"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) >= 1
        assert asked.last() == "[DONE]"
        out, err = running.communicate(timeout=20)
        assert out.split() == ["15", "True"] and running.returncode == 0
        assert "SIGTERM" in err


def test_what_does_not_end_in_time_is_told() -> None:
    with process(0.1, 0.5) as (running, url):
        asked = Asked(url)
        running.send_signal(signal.SIGTERM)
        error = json.loads(asked.last())["error"]
        assert (error["code"], error["type"]) == ("shutting_down", "server_error")
        out, _ = running.communicate(timeout=20)
        assert out.split() == ["15", "False"]


def test_a_second_signal_ends_it_at_once() -> None:
    with process(60, 60) as (running, url):  # a step that takes a minute
        headers = {"authorization": f"Bearer {KEY}"}
        body = json.dumps(chat_body()).encode()
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {headers['authorization']}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            until(lambda: "num_requests_running" in httpx.get(f"{url}/metrics", headers=headers).text)
            running.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{url}/ready").status_code == 503)
            running.send_signal(signal.SIGTERM)
            assert running.wait(10) == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_quickly(number: signal.Signals) -> None:
    with process(0, 60) as (running, _):
        running.send_signal(number)
        out, _ = running.communicate(timeout=10)
        assert out.split() == [str(int(number)), "True"]


def test_a_killed_server_starts_again_on_its_port() -> None:
    with process(0, 1) as (running, url):
        running.kill()
        running.wait(10)
        port = int(url.rpartition(":")[2])
        bind("127.0.0.1", port).close()
