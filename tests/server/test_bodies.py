"""Bodies that are too large, too deep, no JSON, no UTF-8; and HTTP that is not what it should be."""

from __future__ import annotations

import gzip
import json
import re
import socket
import time
from typing import Any

import httpx
import pytest

from alpaca_lora.server import http_guard
from alpaca_lora.server.errors import ApiError
from alpaca_lora.server.json_body import MAX_DEPTH, MAX_KEYS, MAX_VALUES, parse
from tests.server.open_server import BASE, KEY, OpenServer, chat_body, open_server, until

GOOD = json.dumps(chat_body()).encode()
JSON = {"content-type": "application/json"}


def send(server: OpenServer, body: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
    with server.http() as client:
        return client.post("/v1/chat/completions", content=body, headers=JSON if headers is None else headers)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"   ", b"[]", b"5", b'"x"', b"null", b"{", b"{}}", GOOD + b"x", GOOD[:-1], b"\xef\xbb\xbf" + GOOD,
        b"\xff\xfe",
        GOOD.replace(b"hi", b"\xff"), GOOD.replace(b"hi", b"\xed\xa0\x80"), GOOD.replace(b"hi", b"\\ud800"),
        GOOD.replace(b"hi", b"\\udfff \\ud800x"), GOOD.replace(b'"role"', b'"\\udc00": 1, "role"'),
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"a": ' + b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b'{"model": "a", "model": "b"}',
        b'{"messages": [{"role": "user", "role": "system", "content": "x"}]}', b'{"a": 01}', b'{"a": 0x10}',
        b"{'a': 1}",
        b'{"a": 1' + b"0" * 5000 + b"}", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": "\x01"}',
    ],
)  # fmt: skip
def test_what_is_no_json_is_refused(server: OpenServer, body: bytes) -> None:
    answer = send(server, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error" and len(answer.content) < 2000


def test_depth_has_a_limit_and_not_below_it() -> None:
    deep = {"a": json.loads("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1))}
    assert parse(json.dumps(deep).encode()) == deep
    with pytest.raises(ApiError, match="nested"):
        parse(json.dumps({"a": deep["a"], "b": [deep["a"]]}).encode())


def test_numbers_of_values_have_limits() -> None:
    for body, what in (
        ({str(number): 1 for number in range(MAX_KEYS + 1)}, "keys"),
        ({"prompt": [1] * MAX_VALUES}, "values"),
        ({"prompt": [[1, 2]] * (MAX_VALUES // 3 + 1)}, "values"),
    ):
        with pytest.raises(ApiError, match=what):
            parse(json.dumps(body).encode())
    parse(json.dumps({"prompt": [1] * (MAX_VALUES - 1)}).encode())


def test_escapes_of_whole_pairs_are_text() -> None:
    assert parse(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


def test_a_body_over_the_limit_is_refused_before_it_is_read() -> None:
    with open_server(max_body_mb=0.01) as server:
        assert send(server, json.dumps(chat_body(user="x" * 9_000)).encode()).status_code == 400  # user's own limit
        assert send(server, b"x" * 10_001).status_code == 413

        def pieces() -> Any:  # no content-length: the size is only known as it comes
            for _ in range(100):
                yield b"x" * 1000

        with server.http() as client:
            answer = client.post("/v1/chat/completions", content=pieces(), headers=JSON)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=utf-16"}, {"content-type": "application/jsonx"},
        {**JSON, "content-encoding": "gzip"}, {**JSON, "content-encoding": "br"},
    ],
)  # fmt: skip
def test_other_kinds_of_bodies_are_not_read(server: OpenServer, headers: dict[str, str]) -> None:
    body = gzip.compress(b"0" * 10_000_000) if "content-encoding" in headers else GOOD
    assert send(server, body, headers).status_code == 415


def test_utf8_may_be_named(server: OpenServer) -> None:
    assert send(server, GOOD, {"content-type": 'Application/JSON; charset="UTF-8"'}).status_code == 200


# ---- HTTP


def raw(server: OpenServer, *parts: bytes, seconds: float = 10.0) -> bytes:
    """What the server says to bytes, until it closes or nothing comes any more."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        for part in parts:
            connection.sendall(part)
        said = b""
        try:
            while piece := connection.recv(65536):
                said += piece
        except (TimeoutError, ConnectionResetError):
            pass
        return said


def head(*lines: str) -> bytes:
    return "\r\n".join(("POST /v1/chat/completions HTTP/1.1", f"Authorization: Bearer {KEY}", *lines, "", "")).encode()


def statuses(said: bytes) -> list[int]:
    return [int(number) for number in re.findall(rb"HTTP/1\.1 (\d+) ", said)]


def test_two_ways_to_say_the_length_are_refused(server: OpenServer) -> None:
    smuggled = head("Host: x", "Content-Type: application/json", "Content-Length: 5", "Transfer-Encoding: chunked")
    assert statuses(raw(server, smuggled + b"0\r\n\r\n", seconds=1)) == [400]
    twice = head("Host: x", "Content-Type: application/json", "Content-Length: 5", "Content-Length: 6")
    assert statuses(raw(server, twice + b"00000", seconds=1)) == [400]


def test_broken_heads_and_chunks_are_refused(server: OpenServer) -> None:
    huge = head("Host: x", "X-Big: " + "a" * 100_000)
    assert statuses(raw(server, huge, seconds=1)) in ([400], [431])
    chunked = head("Host: x", "Content-Type: application/json", "Transfer-Encoding: chunked")
    for chunk in (b"ffffffffffffffffffffff\r\n", b"-1\r\n\r\n", b"zz\r\n"):
        assert set(statuses(raw(server, chunked + chunk, seconds=1))) <= {400}
    assert statuses(raw(server, b"NONSENSE\r\n\r\n", seconds=1)) == [400]


def test_pipelined_requests_are_answered_in_turn(server: OpenServer) -> None:
    one = head("Host: x", "Content-Type: application/json", f"Content-Length: {len(GOOD)}") + GOOD
    bad = head("Host: x", "Content-Type: application/json", "Content-Length: 2") + b"[]"
    assert statuses(raw(server, one + bad + one, seconds=2)) == [200, 400, 200]


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "TRACE", "OPTIONS", "GET", "BREW"])
def test_odd_methods_are_not_allowed(server: OpenServer, method: str) -> None:
    with server.http() as client:
        answer = client.request(method, "/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")


def test_ranges_are_not_a_way_to_anything(server: OpenServer) -> None:
    with server.http() as client:
        ranges = "bytes=" + ",".join(f"{i}-{i + 1}" for i in range(1000))
        answer = client.get("/v1/models", headers={"range": ranges})
    assert answer.status_code == 200 and "content-range" not in answer.headers


def test_a_head_that_comes_byte_by_byte_is_cut_off(server: OpenServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "HEAD_SECONDS", 0.5)
    host, _, port = server.url.removeprefix("http://").partition(":")
    start = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=10) as connection, pytest.raises(OSError):
        for byte in head("Host: x") * 100:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
            if time.monotonic() - start > 8:
                pytest.fail("the connection was kept")
    silent = raw(server, b"", seconds=5)
    assert silent == b""


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alpaca_lora.server.service.BODY_SECONDS", 0.3)
    with open_server() as server:
        said = raw(server, head("Host: x", "Content-Type: application/json", "Content-Length: 50") + b"{", seconds=5)
        assert statuses(said) == [408]
        until(lambda: server.is_idle)


def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing(server: OpenServer) -> None:
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head("Host: x", "Content-Type: application/json", "Content-Length: 50") + b'{"model": "')
    until(lambda: server.is_idle)
    assert server.post("/v1/chat/completions", chat_body(model=BASE)).status_code == 200
