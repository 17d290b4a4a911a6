"""The prompt of a request is the prompt of training: same template, one BOS, and the record's stops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from alpaca_lora.adapters.record import AdapterRecord
from alpaca_lora.data.encode import EncodePolicy, Encoder
from alpaca_lora.errors import AlpacaLoraError
from alpaca_lora.inference.prompts import PromptFormat
from alpaca_lora.inference.request import SamplingParams
from alpaca_lora.text.messages import Conversation, Message, instruction
from alpaca_lora.text.templates import load_template
from tests.tiny import CHATML, SPECIAL, ByteTokenizer

BOS_CHATML = "{{ bos_token }}" + CHATML
ASKED = Conversation((Message("user", "Sum <s> up.", "1 2 3"),), "instruction", "", 0)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize(("name", "chat_template"), [("alpaca", None), ("chat", CHATML), ("chat", BOS_CHATML)])
def test_the_prompt_is_the_beginning_of_what_was_trained(name: str, chat_template: str | None, add_bos: bool) -> None:
    tokenizer = ByteTokenizer(add_bos=add_bos, chat_template=chat_template)
    template = load_template(name, tokenizer)
    ids = PromptFormat.of(template, tokenizer, system_prompt="Be brief.").prompt_ids(ASKED)
    encoder = Encoder(tokenizer, template, EncodePolicy(512, train_on_inputs=False), system_prompt="Be brief.")
    (row,) = encoder.encode_many([instruction("Sum <s> up.", "1 2 3", "Six.")])
    ids_T, supervised_T = row.pieces[0]
    first = int(supervised_T.argmax())
    assert ids == tuple(ids_T[:first].tolist())
    assert ids.count(SPECIAL["<s>"]) == (add_bos or chat_template == BOS_CHATML)  # the user's <s> is plain text


def test_stops_of_a_model_without_adapter() -> None:
    tokenizer = ByteTokenizer(chat_template=CHATML)
    chat = PromptFormat.of(load_template("chat", tokenizer), tokenizer)
    assert {SPECIAL["</s>"], SPECIAL["<|im_end|>"]} <= set(chat.stop_ids) and chat.stop == ()
    request = chat.request(ASKED, SamplingParams(stop=("x",), stop_ids=(7,)))
    assert request.params.stop == ("x",) and set(request.params.stop_ids) == {7, *chat.stop_ids}
    assert request.prompt_ids == chat.prompt_ids(ASKED)


def record(template: Any, **fields: Any) -> AdapterRecord:
    return AdapterRecord(**{"base_model": "m", "base_fingerprint": "f", "template": template.to_record(), **fields})


def test_what_was_trained_is_what_is_served() -> None:
    tokenizer = ByteTokenizer(chat_template=CHATML)  # whose default would be chat, with BOS
    template = load_template("alpaca_zh", tokenizer)
    trained = record(template, system_prompt="简短", stop_ids=[33], stop_strings=["###"], add_bos=False)
    served = PromptFormat.from_record(trained, tokenizer)
    by_hand = replace(PromptFormat.of(template, tokenizer, system_prompt="简短"), add_bos=False)
    assert served.prompt_ids(ASKED) == by_hand.prompt_ids(ASKED)
    assert served.prompt_ids(ASKED)[0] != SPECIAL["<s>"]
    assert {33, SPECIAL["</s>"]} <= set(served.stop_ids) and served.stop == ("###",)


def test_a_record_that_cannot_be_used_is_refused() -> None:
    tokenizer = ByteTokenizer()
    with pytest.raises(AlpacaLoraError, match="no template"):
        PromptFormat.from_record(AdapterRecord(base_model="m", base_fingerprint="f"), tokenizer)
    changed = {**load_template("alpaca", tokenizer).to_record(), "prompt_no_input": "{instruction}?"}
    with pytest.raises(AlpacaLoraError, match="sha256"):
        PromptFormat.from_record(AdapterRecord(base_model="m", base_fingerprint="f", template=changed), tokenizer)
