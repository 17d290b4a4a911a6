"""Input and output rails over HTTP: what is refused, what is changed, what the log says; and /v1/moderations."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from alpaca_lora.safety.verdict import Action, Finding, Released, Side, Verdict
from alpaca_lora.server.request_log import AUDIT_LOGGER, LOGGER
from tests.server.fake_engine import FakeEngine
from tests.server.open_server import BASE, OpenServer, open_server, until
from tests.tiny import CHATML, ByteTokenizer

ACTIONS: dict[str, Action] = {"bomb": "block", "card": "redact", "hm": "flag"}


class WordPolicy:
    """``bomb`` is blocked, ``card`` is redacted, ``hm`` is flagged; streams hold back the last three characters."""

    def check(self, text: str, side: Side) -> Verdict:
        for word, action in ACTIONS.items():
            if (start := text.find(word)) >= 0:
                found = (Finding(f"no-{word}", "violence" if word == "bomb" else "privacy", start, start + len(word)),)
                shown = {"block": text[:start], "redact": text.replace(word, "[...]")}.get(action, text)
                return Verdict(action, shown, found, f"We do not speak of {word}s.")
        return Verdict("allow", text)

    def stream(self, side: Side) -> WordStream:
        return WordStream(self, side)

    def categories(self) -> tuple[str, ...]:
        return ("privacy", "violence", "weapons")


class WordStream:
    def __init__(self, policy: WordPolicy, side: Side) -> None:
        self._policy, self._side, self._held = policy, side, ""

    def push(self, text: str) -> Released:
        self._held += text
        verdict = self._policy.check(self._held, self._side)
        if verdict.action != "allow":
            self._held = ""
            return Released(verdict.text, verdict)
        cut = max(0, len(self._held) - 3)
        certain, self._held = self._held[:cut], self._held[cut:]
        return Released(certain)

    def flush(self) -> Released:
        rest, self._held = self._held, ""
        return Released(rest)


@pytest.fixture(scope="module")
def railed() -> Iterator[OpenServer]:
    """The model repeats what it was asked; only ``chatty`` has no rails."""
    tokenizer = ByteTokenizer(chat_template=CHATML)

    def repeat(request: Any) -> str:
        text = bytes(i for i in request.prompt_ids if i < 256).decode()
        return text.split("user\n")[-1].split("\nassistant")[0].replace("#", "")

    def policy_of(adapter: str | None) -> WordPolicy | None:
        return None if adapter == "chatty" else WordPolicy()

    engine = FakeEngine(tokenizer, answer=repeat)
    with open_server(engine, tokenizer=tokenizer, app_options={"policy_of": policy_of}) as server:
        yield server
        until(lambda: server.is_idle)


def ask(server: OpenServer, text: str, **fields: Any) -> Any:
    answer = server.chat(messages=[{"role": "user", "content": text}], **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def streamed(server: OpenServer, text: str, **fields: Any) -> list[dict[str, Any]]:
    answer = server.chat(messages=[{"role": "user", "content": text}], stream=True, **fields)
    events = [line[6:] for line in answer.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event)["choices"][0] for event in events]


def test_a_refused_prompt_never_reaches_the_engine(railed: OpenServer) -> None:
    before = len(railed.engine.seen)
    choice = ask(railed, "build a bomb")
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"]["content"] == choice["message"]["refusal"] == "We do not speak of bombs."
    assert len(railed.engine.seen) == before
    last = streamed(railed, "build a bomb")[-1]
    assert last["finish_reason"] == "content_filter" and last["delta"]["refusal"]


@pytest.mark.parametrize("role", ["system", "assistant", "user"])
def test_every_turn_is_read(railed: OpenServer, role: str) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": role, "content": "a bomb"}, {"role": "user", "content": "y"}]
    choice = railed.chat(messages=messages).json()["choices"][0]
    assert choice["finish_reason"] == "content_filter"


def test_a_prompt_is_changed_before_the_model_sees_it(railed: OpenServer) -> None:
    assert ask(railed, "my card number")["message"]["content"] == "my [...] number"


def test_an_answer_is_stopped_where_it_goes_wrong(railed: OpenServer) -> None:
    # the model leaves out the #: the prompt passes, the answer does not
    choice = ask(railed, "how to build a bo#mb at home")
    assert (choice["message"]["content"], choice["finish_reason"]) == ("how to build a ", "content_filter")
    assert choice["message"]["refusal"] == "We do not speak of bombs."
    until(lambda: railed.is_idle)


def test_a_stream_never_shows_what_the_whole_does_not(railed: OpenServer) -> None:
    for text in ("how to build a bo#mb at home", "the ca#rd of my b#omb", "hm, fine", "plain"):
        whole = ask(railed, text)
        pieces = streamed(railed, text)
        assert "".join(piece["delta"].get("content") or "" for piece in pieces) == whole["message"]["content"]
        assert pieces[-1]["finish_reason"] == whole["finish_reason"]


def test_log_probabilities_do_not_tell_what_the_text_may_not(railed: OpenServer) -> None:
    changed = ask(railed, "the ca#rd", logprobs=True)
    assert changed["message"]["content"] == "the [...]"
    assert "".join(one["token"] for one in changed["logprobs"]["content"]) == "the "  # shown before the rule found it
    same = ask(railed, "plain", logprobs=True)
    assert "".join(one["token"] for one in same["logprobs"]["content"]) == "plain"
    pieces = streamed(railed, "plain", logprobs=True)
    said = shown = ""
    for piece in pieces:
        shown += piece["delta"].get("content", "")
        said += "".join(one["token"] for one in (piece["logprobs"] or {"content": ()})["content"])
        assert shown.startswith(said)
    assert said == "plain" and [bool(piece["logprobs"]) for piece in pieces] == [False, True, True, True]


def test_texts_and_ids_are_read_too(railed: OpenServer) -> None:
    for prompt in ("a bomb", list(b"a bomb"), [list(b"fine"), list(b"a bomb")]):
        answer = railed.post("/v1/completions", {"model": BASE, "prompt": prompt})
        choice = answer.json()["choices"][-1]
        assert (choice["finish_reason"], choice["text"]) == ("content_filter", "We do not speak of bombs.")
    answer = railed.post("/v1/completions", {"model": BASE, "prompt": list(b"user\nmy card")})
    assert answer.json()["choices"][0]["text"] == "my [...]"


def test_policies_are_of_adapters(railed: OpenServer) -> None:
    assert ask(railed, "build a bomb", model="chatty")["message"]["content"] == "build a bomb"


def test_the_audit_names_rules_and_no_words(railed: OpenServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for text in ("hm, a plan", "a bo#mb of a plan", "a bomb of a plan"):
        ask(railed, text)
    facts = [json.loads(record.getMessage()) for record in caplog.records if record.name == AUDIT_LOGGER]
    assert [(one["side"], one["action"], one["rules"]) for one in facts] == [
        ("input", "flag", {"no-hm": 1}), ("output", "flag", {"no-hm": 1}), ("output", "block", {"no-bomb": 1}),
        ("input", "block", {"no-bomb": 1}),
    ]  # fmt: skip

    def requests() -> list[str]:  # a request's line is written when its answer is away, which the client may see first
        return [json.loads(one.getMessage())["request_id"] for one in caplog.records if one.name == LOGGER]

    until(lambda: facts[-1]["request_id"] in requests())
    assert "plan" not in "".join(record.getMessage() for record in caplog.records)


# ---- moderations


def test_moderations(railed: OpenServer) -> None:
    done = railed.openai().moderations.create(input=["a bomb", "hello"])
    first, second = done.results
    assert (first.flagged, second.flagged) == (True, False)
    assert first.categories.model_dump()["violence"] is True and first.category_scores.model_dump()["violence"] == 1.0
    assert second.categories.model_dump()["violence"] is False
    assert done.id.startswith("modr-") and done.model == BASE
    parts = railed.openai().moderations.create(input=[{"type": "text", "text": "a bomb"}], model=BASE)
    assert parts.results[0].flagged


def test_moderations_that_cannot_be(railed: OpenServer, server: OpenServer) -> None:
    for body in (
        {},
        {"input": 5},
        {"input": []},
        {"input": "x", "more": 1},
        {"input": None},
        {"input": [{"type": "image_url"}]},
    ):
        assert railed.post("/v1/moderations", body).status_code == 400
    assert railed.post("/v1/moderations", {"input": "x", "model": "omni"}).status_code == 404
    assert server.post("/v1/moderations", {"input": "x"}).json()["error"]["code"] == "no_policy"
