"""Log probabilities come with their text, and never before it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from alpaca_lora.inference.request import TokenLogprob
from alpaca_lora.server.held_logprobs import HeldLogprobs
from alpaca_lora.text.detokenizer import Detokenizer
from tests.tiny import ByteTokenizer

TOKENIZER = ByteTokenizer()


def tokens(ids: bytes) -> list[TokenLogprob]:
    return [TokenLogprob(token_id, -1.0) for token_id in ids]


def test_a_character_of_several_tokens_is_told_when_it_is_shown() -> None:
    held = HeldLogprobs(TOKENIZER)
    first, *rest = tokens("a茶b".encode())
    assert held.advance([first, *rest[:2]], "a", is_changed=False, is_last=False) == (first,)
    assert held.advance(rest[2:], "", is_changed=False, is_last=False) == ()
    assert held.advance([], "茶", is_changed=False, is_last=False) == tuple(rest[:3])
    assert held.advance([], "b", is_changed=False, is_last=True) == tuple(rest[3:])


def test_nothing_is_told_from_a_change_on() -> None:
    held = HeldLogprobs(TOKENIZER)
    one, two, three = tokens(b"abc")
    assert held.advance([one, two], "a", is_changed=False, is_last=False) == (one,)
    assert held.advance([three], "[x]", is_changed=True, is_last=False) == ()
    assert held.advance(tokens(b"d"), "d", is_changed=False, is_last=True) == ()


@given(st.binary(max_size=30), st.lists(st.integers(0, 4), max_size=40))
def test_what_is_told_is_never_ahead_of_what_is_shown(ids: bytes, pauses: list[int]) -> None:
    """Whatever bytes a model makes, and however far behind the rail shows them."""
    held, said, shown, told = HeldLogprobs(TOKENIZER), Detokenizer(TOKENIZER), "", []
    waiting = ""
    for place, token in enumerate(tokens(ids)):
        waiting += said.push(token.token_id)
        cut = max(0, len(waiting) - (pauses[place] if place < len(pauses) else 0))
        piece, waiting = waiting[:cut], waiting[cut:]
        shown += piece
        told += held.advance([token], piece, is_changed=False, is_last=False)
        again = Detokenizer(TOKENIZER)
        text = "".join(again.push(one.token_id) for one in told)
        assert shown.startswith(text)
        assert not again.is_inside or len(shown) > len(text)
    told += held.advance([], waiting + said.flush(), is_changed=False, is_last=True)
    assert told == tokens(ids)
