"""Many answers at once are the answers one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from alpaca_lora.inference.answer import answer_many
from alpaca_lora.inference.request import SamplingParams
from alpaca_lora.models.load import Base
from alpaca_lora.text.messages import Conversation, Message
from alpaca_lora.text.templates import load_template
from tests.tiny import ByteTokenizer, tiny_model


def test_many_answers_are_those_of_one_by_one() -> None:
    model, tokenizer = tiny_model(), ByteTokenizer()
    base = Base(model, model.config, tokenizer, "f", "tiny", Path("tiny"), "tiny")
    template = load_template("alpaca", tokenizer)
    asked = [Conversation((Message("user", text),), "instruction", "", 0) for text in ("Hi?", "你好", "Name a fruit.")]
    params = SamplingParams(max_new_tokens=12, temperature=0.9, seed=4)
    together = answer_many(base, template, asked, params)
    alone = [answer_many(base, template, [one], params)[0] for one in asked]
    # the template's beginning is computed once for all of them
    assert [answer.cached_tokens > 0 for answer in together] == [False, True, True]
    assert [replace(answer, cached_tokens=0) for answer in together] == alone
    assert len({answer.token_ids for answer in together}) == 3
    assert answer_many(base, template, asked[:1], params, system_prompt="x")[0].prompt_tokens > alone[0].prompt_tokens
