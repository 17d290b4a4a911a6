"""From tokens to shown text: stop texts over token borders, characters of several tokens, and the last word."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from alpaca_lora.errors import NumericalError
from alpaca_lora.inference.block_pool import BlockPool
from alpaca_lora.inference.block_table import VIRTUAL, BlockTable
from alpaca_lora.inference.request import Completion, Request, SamplingParams, TokenLogprob
from alpaca_lora.inference.sequence import Sequence
from tests.tiny import ByteTokenizer

TOKENIZER: Any = ByteTokenizer()
EOS = TOKENIZER.eos_id


def new_sequence(max_tokens: int = 200, *, num_virtual: int = 0, **params: Any) -> Sequence:
    request = Request((1, 2, 3), SamplingParams(**{"max_new_tokens": 200, "stop_ids": (EOS,), **params}))
    return Sequence(
        0, request, TOKENIZER, BlockTable(BlockPool(1)), max_tokens=max_tokens, device=torch.device("cpu"),
        num_virtual=num_virtual,
    )  # fmt: skip


def say(
    text: bytes, *, end: tuple[int, ...] = (), max_tokens: int = 200, **params: Any
) -> tuple[list[str], Completion | None]:
    """Push the bytes of `text` as one token each; the events' texts and the completion."""
    sequence = new_sequence(max_tokens, **params)
    events = []
    for token in (*text, *end):
        events.append(sequence.push(token))
        if events[-1].completion is not None:
            break
    return [event.text for event in events], events[-1].completion


@pytest.mark.parametrize("text", ["你好,世界", "🦙 llama 👩‍👩‍👧", "naïve", "plain"])
def test_characters_are_shown_whole_and_the_stream_is_the_text(text: str) -> None:
    shown, completion = say(text.encode(), end=(EOS,))
    assert completion is not None and completion.finish_reason == "stop"
    assert "".join(shown) == completion.text == text
    assert not any("\ufffd" in piece for piece in shown)
    assert completion.token_ids == (*text.encode(), EOS) and completion.prompt_tokens == 3


def test_a_stop_text_over_token_borders_never_shows_a_part_of_itself() -> None:
    shown, completion = say(b"Sure.\n### Instruction: more", stop=("### Instruction",))
    assert completion is not None and completion.finish_reason == "stop"
    assert "".join(shown) == completion.text == "Sure.\n"
    assert completion.token_ids == tuple(b"Sure.\n### Instruction")


def test_a_stop_text_of_characters_of_several_tokens() -> None:
    shown, completion = say("好的。### 指令:下一个".encode(), stop=("### 指令",))
    assert completion is not None and "".join(shown) == completion.text == "好的。"


def test_what_was_held_back_is_shown_when_the_answer_ends_otherwise() -> None:
    shown, completion = say(b"a ##", end=(EOS,), stop=("###",))
    assert completion is not None and "".join(shown) == completion.text == "a ##"
    assert shown == ["a", " ", "", "", "##"]


def test_length_ends_and_shows_an_incomplete_character_once() -> None:
    shown, completion = say("ab🦙".encode(), max_tokens=4)
    assert completion is not None and completion.finish_reason == "length"
    assert len(completion.token_ids) == 4
    assert "".join(shown) == completion.text
    assert completion.text.startswith("ab") and completion.text.strip("\ufffd") == "ab"


def test_a_stop_text_found_in_the_last_token_counts_as_stop() -> None:
    _, completion = say(b"xyEND", stop=("END",), max_tokens=5)
    assert completion is not None and (completion.text, completion.finish_reason) == ("xy", "stop")


def test_places_are_virtual_tokens_prompt_and_answer() -> None:
    sequence = new_sequence(num_virtual=2)
    assert sequence.ids == [VIRTUAL, VIRTUAL, 1, 2, 3] and sequence.num_pending == 5
    event = sequence.push(65)
    assert (event.text, event.token_ids, event.logprobs) == ("A", (65,), ())
    assert sequence.ids[-1] == 65 and sequence.token_ids == (65,) and sequence.num_tokens == 1


def test_logprobs_come_with_their_tokens_and_all_of_them_at_the_end() -> None:
    sequence = new_sequence(2, logprobs=0)
    first, second = TokenLogprob(65, -0.5), TokenLogprob(66, -0.25)
    assert sequence.push(65, first).logprobs == (first,)
    completion = sequence.push(66, second).completion
    assert completion is not None and completion.logprobs == (first, second)
    assert say(b"ab", max_tokens=2)[1].logprobs is None  # pyright: ignore


def test_a_cancelled_answer_keeps_all_it_said() -> None:
    sequence = new_sequence(stop=("##",))
    shown = [sequence.push(token).text for token in b"ab#"]
    event = sequence.cancel()
    assert event.completion is not None and event.completion.finish_reason == "cancelled"
    assert "".join(shown) + event.text == event.completion.text == "ab#"
    assert event.token_ids == () and event.completion.token_ids == tuple(b"ab#")


def test_a_failed_answer_says_why() -> None:
    sequence = new_sequence()
    sequence.push(65)
    error = NumericalError("not finite")
    try:
        raise error
    except NumericalError:
        completion = sequence.fail(error).completion
    assert completion is not None
    assert (completion.finish_reason, completion.error, completion.text) == ("error", error, "A")
    assert error.__traceback__ is None  # it would keep a step's tensors alive


def test_an_answer_tells_where_its_time_went() -> None:
    sequence = new_sequence(2)
    time.sleep(0.03)
    sequence.begin(0)
    time.sleep(0.02)
    sequence.push(65)
    time.sleep(0.01)
    done = sequence.push(66).completion
    assert done is not None
    for seconds, least in zip(done.times, (0.03, 0.02, 0.01), strict=True):
        assert least <= seconds < least + 5
    never = new_sequence().cancel().completion  # cancelled while it waited
    assert never is not None and never.times.queue >= 0 and never.times[1:] == (0, 0)


def test_an_answer_ends_with_its_grammar() -> None:
    class Two:
        """A grammar of two tokens, whatever they are."""

        def __init__(self) -> None:
            self.left = 2

        def start(self, stop_ids: Any) -> Two:
            return Two()

        @property
        def is_done(self) -> bool:
            return self.left == 0

        def mask_(self, logits_V: torch.Tensor) -> None:
            pass

        def accept(self, token_id: int) -> None:
            self.left -= 1

    sequence = new_sequence(grammar=Two())
    logits_V = torch.zeros(300).index_fill_(0, torch.tensor([65]), 1.0)
    assert sequence.push(sequence.sampler.choose(logits_V).token_id).completion is None
    completion = sequence.push(sequence.sampler.choose(logits_V).token_id).completion
    assert completion is not None and (completion.text, completion.finish_reason) == ("AA", "stop")
