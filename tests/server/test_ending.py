"""Clients that leave, read slowly or come too many at a time; answers that take too long; an engine that breaks."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from alpaca_lora.errors import AdapterError, AlpacaLoraError, NumericalError, UserError
from alpaca_lora.server import streaming, ticket
from tests.server.fake_engine import FakeEngine
from tests.server.open_server import BASE, KEY, OpenServer, chat_body, open_server, until
from tests.tiny import CHATML, ByteTokenizer

LONG = "word " * 400


def engine(**options: Any) -> FakeEngine:
    return FakeEngine(ByteTokenizer(chat_template=CHATML), **options)


@pytest.fixture
def slow() -> Iterator[OpenServer]:
    """An engine that says much and takes its time."""
    with open_server(
        engine(answer=lambda request: LONG, seconds=0.005, context_length=4096), max_running=4, max_queue=4
    ) as opened:
        yield opened


def lines(response: httpx.Response) -> Iterator[dict[str, Any] | str]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])


def connect(server: OpenServer, **fields: Any) -> socket.socket:
    """A request sent by hand, whose answer nobody reads yet."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    body = json.dumps(chat_body(**fields)).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((host, int(port)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


# ---- clients that leave


def test_leaving_in_the_middle_of_a_stream_ends_the_answer(slow: OpenServer) -> None:
    with slow.http() as client, client.stream(
        "POST", "/v1/chat/completions", json=chat_body(stream=True, n=2)
    ) as response:  # fmt: skip
        told = lines(response)
        for _ in range(5):
            next(told)
    until(lambda: slow.is_idle)
    assert len(slow.engine.cancelled) == 2


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_before_the_first_token_ends_the_answer(slow: OpenServer, stream: bool) -> None:
    slow.engine.gate.clear()
    connection = connect(slow, stream=stream)
    assert slow.engine.is_computing.wait(5)
    connection.close()
    until(lambda: not slow.service.lifecycle.num_active)  # although the engine is still busy
    slow.engine.gate.set()
    until(lambda: slow.is_idle)
    assert len(slow.engine.cancelled) == 1


def test_leaving_while_queued_ends_the_answer(slow: OpenServer) -> None:
    running = [connect(slow, stream=True) for _ in range(4)]
    until(lambda: slow.service.bridge.stats.num_running == 4)
    waiting = connect(slow)
    until(lambda: slow.service.bridge.num_open == 5)
    waiting.close()
    until(lambda: slow.service.bridge.num_open == 4)
    for connection in running:
        connection.close()
    until(lambda: slow.is_idle)


def cycle(server: OpenServer, count: int) -> None:
    for number in range(count):
        connection = connect(server, stream=number % 2 == 0, n=1 + number % 3)
        if number % 4 == 0:  # of a stream, so that something comes soon
            connection.recv(10 * (number % 7) or 1)
        connection.close()


def test_a_hundred_clients_that_leave_leave_nothing() -> None:
    with open_server(engine(answer=lambda request: LONG, seconds=0.001, context_length=4096)) as server:
        cycle(server, 100)
        until(lambda: server.is_idle)
        assert server.chat(max_tokens=3).status_code == 200


@pytest.mark.slow
def test_a_thousand_clients_that_leave_leave_nothing() -> None:
    with open_server(engine(answer=lambda request: LONG, seconds=0.001, context_length=4096)) as server:
        cycle(server, 50)
        until(lambda: server.is_idle)
        num_threads, owners = threading.active_count(), len(server.service.bridge._owners)
        for _ in range(20):
            cycle(server, 50)
            until(lambda: server.is_idle)
        assert (threading.active_count(), len(server.service.bridge._owners)) == (num_threads, owners)
        assert len(server.engine.cancelled) > 200  # they did come as far as that
        assert server.chat(max_tokens=3).status_code == 200


# ---- clients that read slowly


def test_a_slow_reader_is_given_up_and_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SEND_SECONDS", 1.0)
    monkeypatch.setattr(ticket, "MAX_BUFFERED", 64)
    answer = "x" * 200_000
    with (
        open_server(engine(answer=lambda request: answer, context_length=1_000_000)) as server,
        connect(server, stream=True) as unread,
    ):
        start = time.monotonic()
        quick = server.chat(stream=True, max_tokens=50)  # beside it
        assert quick.text.endswith("data: [DONE]\n\n") and time.monotonic() - start < 5
        until(lambda: server.is_idle, seconds=30)
        assert len(server.engine.cancelled) == 1
        unread.settimeout(10)
        # given up with its buffer full, which ends the response, or with the socket's, which ends the connection
        said = b""
        while not said.endswith(b"\r\n0\r\n\r\n") and (piece := unread.recv(1 << 20)):
            said += piece
        assert b"[DONE]" not in said and len(said) < 60_000_000


# ---- too many


def test_a_full_queue_says_when_to_come_back(slow: OpenServer) -> None:
    slow.engine.gate.clear()
    waiting = [connect(slow) for _ in range(8)]
    until(lambda: slow.service.bridge.num_open == 8)
    answer = slow.chat()
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError):
        slow.openai().chat.completions.create(model=BASE, messages=[{"role": "user", "content": "x"}])
    assert slow.get("/health").status_code == 200
    for connection in waiting:
        connection.close()
    slow.engine.gate.set()
    until(lambda: slow.is_idle)
    assert slow.chat(max_tokens=2).status_code == 200


def test_one_key_cannot_have_all_at_once() -> None:
    with open_server(engine(), max_concurrency=2) as server:
        server.engine.gate.clear()
        waiting = [connect(server) for _ in range(2)]
        until(lambda: server.service.bridge.num_open == 2)
        answer = server.chat()
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "concurrency_exceeded")
        for connection in waiting:
            connection.close()
        server.engine.gate.set()
        until(lambda: server.is_idle)
        assert server.chat().status_code == 200


# ---- too late


@pytest.mark.parametrize("stream", [True, False])
def test_a_deadline_ends_what_runs(stream: bool) -> None:
    with open_server(
        engine(answer=lambda request: LONG, seconds=0.01, context_length=4096), request_timeout=2
    ) as server:
        answer = server.chat(stream=stream)
        assert answer.status_code == (200 if stream else 504)
        error = json.loads(answer.text.strip().split("data: ")[-1]) if stream else answer.json()
        assert error["error"]["code"] == "deadline_exceeded"
        until(lambda: server.is_idle)
        assert len(server.engine.cancelled) == 1


def test_a_deadline_ends_what_waits() -> None:
    with open_server(engine(), request_timeout=0.3) as server:
        server.engine.gate.clear()
        answer = server.chat(stream=True)  # not accepted before the deadline: no stream has begun
        assert answer.status_code in (200, 504) and "deadline_exceeded" in answer.text
        server.engine.gate.set()
        until(lambda: server.is_idle)


# ---- an engine that computes long, or breaks


def test_the_loop_answers_while_the_engine_computes() -> None:
    with open_server(engine()) as server:
        server.engine.gate.clear()
        waiting = connect(server, stream=True)
        assert server.engine.is_computing.wait(5)
        with server.http() as client:
            times = [client.get(path).elapsed.total_seconds() for path in ("/health", "/ready", "/metrics") * 5]
        assert max(times) < 1.0
        waiting.close()


def test_a_megabyte_is_answered_beside_health() -> None:
    with open_server() as server:
        slowest = 0.0
        done = threading.Event()

        def watch() -> None:
            nonlocal slowest
            with server.http() as client:
                while not done.is_set():
                    slowest = max(slowest, client.get("/health").elapsed.total_seconds())

        watcher = threading.Thread(target=watch)
        watcher.start()
        for text in ("x" * 1_000_000, "a b" * 330_000, "你" * 330_000, "'" * 1_000_000, "x" * 6_000):
            start = time.monotonic()
            answer = server.chat(messages=[{"role": "user", "content": text}])
            assert answer.json()["error"]["code"] == "context_length_exceeded"
            assert time.monotonic() - start < 10
        done.set()
        watcher.join()
        assert slowest < 1.0


def test_an_adapter_that_goes_in_this_moment_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(request: Any) -> int:
        raise AdapterError("is not loaded", field="name")

    with open_server(engine()) as server:
        monkeypatch.setattr(server.engine, "add", gone)
        answer = server.chat(model="shop")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert server.is_idle


def test_an_engine_that_raises_fails_what_runs_and_goes_on() -> None:
    with open_server(engine()) as server:
        server.engine.poison = RuntimeError("secret words of a prompt")
        answer = server.chat()
        assert answer.status_code == 500 and "secret" not in answer.text
        server.engine.poison = None
        until(lambda: server.is_idle)
        assert server.chat().status_code == 200 and server.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("failure", "status", "words"),
    [
        (UserError("no token can come next", field="grammar", fix="look for parts that contradict"), 400, "look for"),
        (NumericalError("the model's logits are not finite"), 500, "not finite"),
    ],
)
def test_an_answer_that_fails_says_whose_fault_it_is(failure: AlpacaLoraError, status: int, words: str) -> None:
    with open_server(engine()) as server:
        server.engine.failure = failure
        answer = server.chat(response_format={"type": "json_object"})
        error = answer.json()["error"]
        assert answer.status_code == status and words in error["message"], answer.text
        assert error["param"] == ("response_format" if status == 400 else None)
        streamed = server.chat(stream=True).text.strip().split("data: ")
        assert json.loads(streamed[-1])["error"]["type"] == error["type"]
        until(lambda: server.is_idle)


def test_an_engine_that_only_raises_is_not_healthy() -> None:
    with open_server(engine()) as server:
        server.engine.poison = RuntimeError("broken")
        for _ in range(3):
            with pytest.raises(openai.InternalServerError):
                server.openai().chat.completions.create(model=BASE, messages=[{"role": "user", "content": "x"}])
        until(lambda: server.service.bridge.failure is not None)
        with server.http() as client:
            assert client.get("/health").status_code == client.get("/ready").status_code == 503
        answer = server.chat()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_failed")
        assert server.service.bridge.num_open == 0
