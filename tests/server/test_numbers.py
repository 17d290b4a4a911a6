"""Every numeric field with every value that is none, or none that fits: 400 and the field's name, never 500, never
another number.
"""

from __future__ import annotations

import json

import pytest

from tests.server.fake_engine import FakeEngine
from tests.server.open_server import BASE, OpenServer, chat_body, open_server
from tests.tiny import CHATML, ByteTokenizer

BIG = (2**31, 2**63, 2**64)
NOT_FINITE = ("NaN", "Infinity", "-Infinity", "1e999")
NO_NUMBER = (True, False, "1", "", None, [], {}, [1])

INTEGERS = {
    # field: what passes
    "n": (1, 16),
    "max_tokens": (1, 100),
    "max_completion_tokens": (1, 100),
    "top_k": (0, 1_000_000),
    "seed": (0, 2**31, 2**63 - 1),
    "top_logprobs": (0, 20),
    "best_of": (1,),
    "logprobs": (0, 20),
}
FLOATS = {
    "temperature": (0, 1, 2, 0.5),
    "top_p": (1, 0.001),
    "min_p": (0, 1, 0.5),
    "presence_penalty": (-2, 2, 0),
    "frequency_penalty": (-2, 2, 0),
    "repetition_penalty": (0.01, 1, 100),
}
OF_COMPLETIONS = {"best_of", "logprobs"}
WRONG = {
    "n": (0, -1, 17, *BIG),
    "max_tokens": (0, -1, *BIG),
    "max_completion_tokens": (0, -1, *BIG),
    "top_k": (-1, 1_000_001, *BIG),
    "seed": (-1, 2**63, 2**64),
    "top_logprobs": (-1, 21, *BIG),
    "best_of": (0, -1, 2, *BIG),
    "logprobs": (-1, 21, *BIG),
    "temperature": (-1, -0.001, 2.001, *BIG, 1e308),
    "top_p": (0, -1, 1.001, *BIG, 1e308),
    "min_p": (-1, 1.001, *BIG, 1e308),
    "presence_penalty": (-2.001, 2.001, *BIG, 1e308, -1e308),
    "frequency_penalty": (-2.001, 2.001, *BIG, 1e308, -1e308),
    "repetition_penalty": (0, -1, 100.1, *BIG, 1e308),
}


def send(server: OpenServer, field: str, value: str):  # type: ignore[no-untyped-def]
    """``value`` as it stands in JSON."""
    if field in OF_COMPLETIONS:
        path, body = "/v1/completions", {"model": BASE, "prompt": "hi"}
    else:
        path, body = "/v1/chat/completions", chat_body()
    if field == "top_logprobs":
        body["logprobs"] = True
    text = json.dumps(body)[:-1] + f', "{field}": {value}}}'
    with server.http() as client:
        return client.post(path, content=text, headers={"content-type": "application/json"})


@pytest.mark.parametrize("field", sorted({**INTEGERS, **FLOATS}))
def test_impossible_values_are_refused(server: OpenServer, field: str) -> None:
    values = [json.dumps(value) for value in (*WRONG[field], *NO_NUMBER)]
    values += NOT_FINITE
    values += ["1.0", "1.5", "1e0"] if field in INTEGERS else []
    for value in values:
        answer = send(server, field, value)
        assert answer.status_code == 400, f"{field} = {value}: {answer.status_code} {answer.text}"
        error = answer.json()["error"]
        expected = None if value in NOT_FINITE else field
        assert error["param"] == expected, f"{field} = {value}: {error}"
        assert error["type"] == "invalid_request_error" and error["message"] and error["code"]


@pytest.mark.parametrize("field", sorted({**INTEGERS, **FLOATS}))
def test_possible_values_pass(server: OpenServer, field: str) -> None:
    for value in {**INTEGERS, **FLOATS}[field]:
        answer = send(server, field, json.dumps(value))
        assert answer.status_code == 200, f"{field} = {value}: {answer.text}"


@pytest.mark.parametrize("field", ["stream", "logprobs"])
def test_booleans_are_true_or_false(server: OpenServer, field: str) -> None:
    for value in (0, 1, "true", "", [], {}):
        answer = server.chat(**{field: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), value


def test_an_answer_that_does_not_fit_is_refused(server: OpenServer) -> None:
    answer = server.chat(max_tokens=512 - 22 + 1)
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert server.chat(max_tokens=512 - 22).status_code == 200


def test_an_answer_keeps_to_what_the_cache_has_room_for() -> None:
    engine = FakeEngine(ByteTokenizer(chat_template=CHATML))
    engine.num_blocks = 4
    with open_server(engine) as server:
        assert server.chat().status_code == 200  # as many tokens as fit: 64 places, 22 of them the prompt's
        assert engine.seen[-1].params.max_new_tokens == 42
        assert server.chat(max_tokens=43).json()["error"]["code"] == "context_length_exceeded"


def test_differing_limits_are_refused(server: OpenServer) -> None:
    assert server.chat(max_tokens=5, max_completion_tokens=6).json()["error"]["param"] == "max_tokens"
    assert server.chat(max_tokens=5, max_completion_tokens=5).status_code == 200
    assert server.chat(top_logprobs=2).json()["error"]["param"] == "top_logprobs"
    assert server.chat(stream_options={"include_usage": True}).json()["error"]["param"] == "stream_options"
    too_many = server.post("/v1/completions", {"model": BASE, "prompt": ["a"] * 4, "n": 5})
    assert too_many.json()["error"]["param"] == "n"
