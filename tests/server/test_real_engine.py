"""The service on the real engine, bank, grammars and bundled policy, with the tiny model: what is served is what is
computed alone.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alpaca_lora.adapters.record import read_record
from alpaca_lora.inference.engine import Engine
from alpaca_lora.inference.grammar import GrammarCompiler
from alpaca_lora.inference.prompts import PromptFormat
from alpaca_lora.inference.request import SamplingParams
from alpaca_lora.safety.policy import Policy
from alpaca_lora.server.classify_api import Classifier
from alpaca_lora.server.rail_classifiers import RailClassifiers
from alpaca_lora.text.messages import Conversation, Message
from alpaca_lora.text.templates import load_template
from tests.inference.adapter_folders import LABELS, make_bank, make_folder, record
from tests.server.open_server import KEY, OpenServer, open_server, until
from tests.tiny import CHATML, ByteTokenizer

TOKENIZER = ByteTokenizer(chat_template=CHATML)
ADAPTERS = {"lora": "alpaca_short", "dora": "chat", "prefix": "alpaca"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for kind, template in ADAPTERS.items():
        note = record(template=load_template(template, TOKENIZER).to_record(), stop_ids=[257], add_bos=True)
        make_folder(root / kind, kind, note=note, seed=len(kind))
    make_folder(root / "colour", "lora", labels=LABELS)
    return root


@pytest.fixture(scope="module")
def real(folders: Path) -> Iterator[OpenServer]:
    model, bank = make_bank()
    for kind in (*ADAPTERS, "colour"):
        bank.load(kind, folders / kind)
    engine = Engine(model, TOKENIZER, bank=bank, max_running=8, step_tokens=64, keep_prefixes=True)
    grammars = GrammarCompiler(TOKENIZER)
    with open_server(
        engine, bank=bank, tokenizer=TOKENIZER, adapter_dir=str(folders), app_options={"grammars": grammars}
    ) as opened:
        yield opened
        until(lambda: opened.is_idle)


def alone(folders: Path, kind: str | None, question: str, **params: Any) -> tuple[str, int]:
    """The answer of an engine that has nothing else to do, and the tokens of the prompt."""
    model, bank = make_bank()
    if kind is not None:
        bank.load(kind, folders / kind)
    engine = Engine(model, TOKENIZER, bank=bank, max_running=1)
    prompts = PromptFormat.of(load_template(None, TOKENIZER), TOKENIZER)
    note = read_record(folders / kind) if kind is not None else None
    if note is not None:
        prompts = PromptFormat.from_record(note, TOKENIZER)
    asked = Conversation((Message("user", question),), "instruction", "", 0)
    request = prompts.request(asked, SamplingParams(**{"max_new_tokens": 24, **params}))
    index = engine.add(type(request)(request.prompt_ids, request.params, kind))
    while True:
        for event in engine.step():
            if event.completion is not None and event.index == index:
                return event.completion.text, event.completion.prompt_tokens


def test_adapters_that_stream_together_say_what_they_say_alone(real: OpenServer, folders: Path) -> None:
    asked = [(kind, f"question {number}") for number in range(3) for kind in ("tiny-base", *ADAPTERS)]

    async def ask(client: Any, model: str, question: str) -> str:
        turns = [{"role": "user", "content": question}]
        stream = await client.chat.completions.create(
            model=model, messages=turns, stream=True, temperature=0, max_tokens=24
        )  # fmt: skip
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with real.async_openai() as client:
            return await asyncio.gather(*(ask(client, *one) for one in asked))

    for (kind, question), text in zip(asked, asyncio.run(ask_all()), strict=True):
        expected, _ = alone(folders, None if kind == "tiny-base" else kind, question)
        assert text == expected, (kind, question)


def test_a_seed_gives_the_same_whoever_else_asks(real: OpenServer, folders: Path) -> None:
    fields: dict[str, Any] = {"model": "lora", "temperature": 1.5, "seed": 11, "max_tokens": 24, "n": 2}
    first, second = (real.chat(**fields).json() for _ in range(2))
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert texts == [choice["message"]["content"] for choice in second["choices"]] and texts[0] != texts[1]
    expected, num_tokens = alone(folders, "lora", "hi", temperature=1.5, seed=11)
    assert (texts[0], first["usage"]["prompt_tokens"]) == (expected, num_tokens)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16  # what the first one had computed


def test_what_one_key_asked_makes_nobody_else_quicker(real: OpenServer) -> None:
    """Case 28: the time of an answer, and its usage, would tell what another tenant had asked."""
    body = {"model": "lora", "messages": [{"role": "user", "content": "a secret of alice, of many words"}]}
    body |= {"max_tokens": 2, "temperature": 0}
    cached = [
        real.post("/v1/chat/completions", body, key).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        for key in (KEY, KEY, "bobs-key-of-16-chars", "bobs-key-of-16-chars")
    ]
    assert cached[2] == 0 and cached[1] == cached[3] >= 32  # alice's own, and bob's own; none of each other's


def test_log_probabilities_are_those_of_the_model(real: OpenServer) -> None:
    choice = real.chat(temperature=0, max_tokens=6, logprobs=True, top_logprobs=3).json()["choices"][0]
    for one in choice["logprobs"]["content"]:
        assert one["logprob"] == max(top["logprob"] for top in one["top_logprobs"]) <= 0
        assert len(one["top_logprobs"]) == 3


def test_an_answer_keeps_to_its_schema(real: OpenServer) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": LABELS}}, "required": ["colour"],
              "additionalProperties": False}  # fmt: skip
    shape = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = real.chat(response_format=shape, max_tokens=200, seed=seed, temperature=0.1)
        choice = answer.json()["choices"][0]
        if choice["finish_reason"] == "stop":
            assert json.loads(choice["message"]["content"])["colour"] in LABELS
    refused = real.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"nope": 1}}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"}, {"enum": list(range(10_001))}, {"type": "string", "pattern": "("},
        {"type": "string", "pattern": "(a*)*" * 200},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"oneOf": [{"type": "integer"}] * 1001}, {"not": {}}, {"type": "object", "patternProperties": {".*": {}}},
    ],
)  # fmt: skip
def test_hostile_schemas_are_refused_or_harmless(real: OpenServer, schema: Any) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = real.chat(response_format=shape, max_tokens=5)
    assert answer.status_code in (200, 400) and answer.elapsed.total_seconds() < 20, answer.text


def test_a_classifier_through_the_same_engine(real: OpenServer) -> None:
    data = real.post("/v1/classify", {"model": "colour", "input": ["roses", "grass and leaves"]}).json()["data"]
    assert all(set(one["probabilities"]) == set(LABELS) for one in data)
    assert all(math.isclose(sum(one["probabilities"].values()), 1, rel_tol=1e-6) for one in data)
    assert data[0]["probabilities"] != data[1]["probabilities"]


def test_an_adapter_comes_and_goes_while_others_answer(real: OpenServer) -> None:
    admin = "admin-key-of-16-chars"
    assert real.post("/v1/adapters", {"name": "late", "path": "lora"}, admin).status_code == 201
    late, early = (
        real.chat(model=name, temperature=0, max_tokens=12).json()["choices"][0]["message"] for name in ("late", "lora")
    )
    assert late == early
    with real.http(admin) as client:
        assert client.delete("/v1/adapters/late").status_code == 200
    assert real.chat(model="late").status_code == 404


def test_the_bundled_policy_refuses_and_a_classifier_judges(folders: Path, tmp_path: Path) -> None:
    model, bank = make_bank()
    bank.load("colour", folders / "colour")
    judges = RailClassifiers(["colour"])
    rules = tmp_path / "policy.yml"
    rules.write_text(
        "rules:\n  - id: everything\n    kind: classifier\n    classifier: colour\n    label: red\n"
        "    threshold: 1.0e-9\n    action: block\n    category: colours\n    side: input\n    message: no colours\n"
    )
    policy = Policy.from_file(rules, judges)
    engine = Engine(model, TOKENIZER, bank=bank, max_running=4)
    with open_server(
        engine, bank=bank, tokenizer=TOKENIZER, app_options={"policy_of": lambda adapter: policy}
    ) as server:
        judges.bind(server.service)
        answers = [server.chat() for _ in range(8)]
        assert {answer.json()["choices"][0]["finish_reason"] for answer in answers} == {"content_filter"}
        assert answers[0].json()["choices"][0]["message"]["refusal"] == "no colours"
        assert isinstance(Classifier(server.service), Classifier)
    with open_server(app_options={"policy_of": lambda adapter: Policy.bundled()}) as server:
        assert server.chat().json()["choices"][0]["finish_reason"] == "stop"
        flagged = server.post("/v1/moderations", {"input": "my card is 4111 1111 1111 1111"}).json()["results"][0]
        assert flagged["flagged"] and any(flagged["categories"].values())
