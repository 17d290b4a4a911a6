"""From tokens to shown text: stop texts over token borders, characters of several tokens, and the last word."""

from __future__ import annotations

import pytest
import torch

from alpaca_lora.inference.request import Completion, Request, SamplingParams
from alpaca_lora.inference.sequence import Sequence
from tests.tiny import ByteTokenizer

EOS = ByteTokenizer().eos_id


def say(text: bytes, *, end: tuple[int, ...] = (), **params: object) -> tuple[list[str], Completion | None]:
    """Push the bytes of `text` as one token each; the events' texts and the completion."""
    request = Request((1, 2, 3), SamplingParams(**{"max_new_tokens": 200, "stop_ids": (EOS,), **params}))  # pyright: ignore
    sequence = Sequence(0, request, ByteTokenizer(), context_length=500, device=torch.device("cpu"))  # pyright: ignore
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
    shown, completion = say("ab🦙".encode(), max_new_tokens=4)
    assert completion is not None and completion.finish_reason == "length"
    assert len(completion.token_ids) == 4
    assert "".join(shown) == completion.text
    assert completion.text.startswith("ab") and completion.text.strip("\ufffd") == "ab"


def test_a_stop_text_found_in_the_last_token_counts_as_stop() -> None:
    _, completion = say(b"xyEND", stop=("END",), max_new_tokens=5)
    assert completion is not None and (completion.text, completion.finish_reason) == ("xy", "stop")


def test_the_context_bounds_the_answer() -> None:
    request = Request((1,) * 6, SamplingParams(max_new_tokens=50))
    sequence = Sequence(0, request, ByteTokenizer(), context_length=8, device=torch.device("cpu"))  # pyright: ignore
    assert sequence.push(65).completion is None
    completion = sequence.push(66).completion
    assert completion is not None and completion.finish_reason == "length"
