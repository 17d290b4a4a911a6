"""Fields that are no numbers, with values that nobody would send by accident: biases, stops, prompts, schemas."""

from __future__ import annotations

from typing import Any

import pytest

from alpaca_lora.errors import UserError
from alpaca_lora.server.protocol import MAX_BIASED_TOKENS, MAX_STOPS
from tests.server.open_server import BASE, NoGrammars, OpenServer, open_server
from tests.tiny import CHATML, ByteTokenizer


def refused(answer: Any, param: str) -> bool:
    assert answer.status_code == 400, answer.text
    found = answer.json()["error"]["param"]
    assert found is not None and found.split("[")[0].split(".")[0] == param, answer.text
    return True


def complete(server: OpenServer, prompt: Any, **fields: Any) -> Any:
    return server.post("/v1/completions", {"model": BASE, "prompt": prompt, **fields})


# ---- logit_bias


@pytest.mark.parametrize(
    "bias",
    [
        {"-1": 1}, {"1000": 1}, {str(2**31): 1}, {str(10**30): 1}, {"x": 1}, {"": 1}, {"1.5": 1}, {" 1": 1}, {"01": 1},
        {"٣": 1}, {"1": 101}, {"1": -101}, {"1": True}, {"1": "5"}, {"1": None}, {"1": [1]}, {"1\n": 1}, [], "1", 5,
        {str(i): 1 for i in range(MAX_BIASED_TOKENS + 1)},
    ],
)  # fmt: skip
def test_biases_that_cannot_be(server: OpenServer, bias: Any) -> None:
    assert refused(server.chat(logit_bias=bias), "logit_bias")


def test_a_hundred_thousand_biases_are_refused_quickly(server: OpenServer) -> None:
    answer = server.chat(logit_bias={str(i): 1 for i in range(100_000)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json") and len(answer.content) < 2000
    assert answer.elapsed.total_seconds() < 5


def test_biases_that_can_be(server: OpenServer) -> None:
    for bias in ({}, None, {"0": 100}, {str(i): -100 for i in range(261)}):
        assert server.chat(logit_bias=bias).status_code == 200


def test_biases_that_are_not_finite(server: OpenServer) -> None:
    for value in ("1e999", "-1e999", "NaN", "-Infinity"):
        text = (
            f'{{"model": "{BASE}", "messages": [{{"role": "user", "content": "x"}}], "logit_bias": {{"1": {value}}}}}'
        )
        with server.http() as client:
            answer = client.post(
                "/v1/chat/completions", content=text, headers={"content-type": "application/json"}
            )  # fmt: skip
        assert answer.status_code == 400 and "could not parse" in answer.json()["error"]["message"]


# ---- stop


@pytest.mark.parametrize(
    "stop",
    [["a"] * 10_000, "", [""], ["a", ""], "x" * (1 << 20), [1], 1, True, {}, [["a"]], [None], ["a"] * (MAX_STOPS + 1)],
)
def test_stops_that_cannot_be(server: OpenServer, stop: Any) -> None:
    assert refused(server.chat(stop=stop), "stop")


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (None, "base heard 18 characters"), ([], "base heard 18 characters"), ("b", ""), (["rd 1", "heard"], "base "),
        (["characters", "chara"], "base heard 18 "), ("hi", "base heard 18 characters"), (["zzz"],
        "base heard 18 characters"),
    ],
)  # fmt: skip
def test_stops_end_the_answer_wherever_they_are(server: OpenServer, stop: Any, text: str) -> None:
    assert server.chat(stop=stop).json()["choices"][0]["message"]["content"] == text


# ---- prompts


@pytest.mark.parametrize(
    "prompt",
    [
        [261], [264], [2**31], [2**63], [-1], [1.5], [True], ["a", 1], [1, "a"], [[1], ["a"]], [[1], 2], [[]], [],
        None,
        {}, 5, [None], [[1]] * 17, ["a"] * 17, [[[1]]], "",
    ],
)  # fmt: skip
def test_prompts_that_cannot_be(server: OpenServer, prompt: Any) -> None:
    answer = complete(server, prompt)
    if prompt == "":  # only BOS: it has a token, so the model can go on from it
        assert answer.status_code == 200
    else:
        assert refused(answer, "prompt")


def test_an_empty_prompt_without_bos_is_refused() -> None:
    with open_server(tokenizer=ByteTokenizer(add_bos=False, chat_template=CHATML)) as server:
        assert refused(complete(server, ""), "prompt")
        assert complete(server, "x").status_code == 200


def test_prompts_of_nothing_but_space_or_special_names(server: OpenServer) -> None:
    for text in (" ", "\n\t", "</s>", "<|im_end|>", "\u200b", "\x00"):
        assert complete(server, text).status_code == 200
        ids = server.engine.seen[-1].prompt_ids
        assert ids[0] == 256 and bytes(ids[1:]).decode() == text
    for text in ("", " ", "</s>"):
        assert server.chat(messages=[{"role": "user", "content": text}]).status_code == 200


def test_lengths_around_the_context(server: OpenServer) -> None:
    room = 512 - 1  # BOS
    assert complete(server, "x" * (room - 1), max_tokens=1).status_code == 200
    for length in (room, room + 1, 10 * room):
        answer = complete(server, "x" * length, max_tokens=1)
        assert refused(answer, "prompt") and answer.json()["error"]["code"] == "context_length_exceeded"
    assert complete(server, [65] * 511, max_tokens=1).status_code == 200
    assert refused(complete(server, [65] * 512, max_tokens=1), "prompt")
    assert refused(complete(server, "xx", max_tokens=510), "prompt")


# ---- messages


@pytest.mark.parametrize(
    "messages",
    [
        [], None, "hi", {}, [None], ["hi"], [{}], [{"role": "user"}], [{"content": "x"}],
        [{"role": "tool", "content": "x"}], [{"role": "developer", "content": "x"}],
        [{"role": "function", "content": "x"}],
        [{"role": "USER", "content": "x"}], [{"role": "user", "content": None}], [{"role": "user", "content": 5}],
        [{"role": "user", "content": []}], [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": "x", "more": 1}]}],
        [{"role": "user", "content": "x", "name": "bob"}], [{"role": "user", "content": "x", "tool_calls": []}],
        [{"role": "assistant", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        [{"role": "user", "content": "x"}] * 1025,
    ],
)  # fmt: skip
def test_messages_that_cannot_be(server: OpenServer, messages: Any) -> None:
    assert refused(server.chat(messages=messages), "messages")


def test_turns_that_the_template_cannot_render(server: OpenServer) -> None:
    turns = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
    answer = server.chat(model="shop", messages=turns)
    assert refused(answer, "messages") and "turn" in answer.json()["error"]["message"]


def test_unknown_fields_are_refused_with_a_hint(server: OpenServer) -> None:
    answer = server.chat(temprature=1)
    assert refused(answer, "temprature") and "temperature" in answer.json()["error"]["message"]
    for field in ("chat_template", "chat_template_kwargs", "add_generation_prompt", "tokenize", "prompt_logprobs"):
        assert refused(server.chat(**{field: 1}), field)
    assert refused(server.chat(messages=[{"role": "user", "content": "x", "template": "{{ x }}"}]), "messages")


@pytest.mark.parametrize("model", [None, "", 5, ["shop"], {}, "x" * 300])
def test_names_of_models_that_cannot_be(server: OpenServer, model: Any) -> None:
    assert refused(server.chat(model=model), "model")


# ---- response_format


@pytest.mark.parametrize(
    "shape",
    [
        5, "json_object", [], {"type": "xml"}, {"type": "json_schema"}, {}, {"type": "json_schema", "json_schema": {}},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": 5}},
        {"type": "json_schema", "json_schema": {"name": "n n", "schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": 1}},
        {"type": "json_object", "json_schema": {"name": "n", "schema": {}}},
        {"type": "grammar", "grammar": "root ::= x"}, {"type": "text", "more": 1},
    ],
)  # fmt: skip
def test_response_formats_that_cannot_be(server: OpenServer, shape: Any) -> None:
    assert refused(server.chat(response_format=shape), "response_format")


def test_a_schema_that_the_library_refuses_is_the_clients_fault() -> None:
    class Refusing(NoGrammars):
        def json_schema(self, schema: object) -> Any:
            raise UserError("is too deep", field="schema #")

    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}
    with open_server(app_options={"grammars": Refusing()}) as server:
        answer = server.chat(response_format=shape)
        assert refused(answer, "response_format") and "is too deep" in answer.json()["error"]["message"]
