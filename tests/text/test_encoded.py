"""Boundaries by character offset: what a span's tokens are, whatever the tokenizer made of the text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_lora.text.encoded import Boundary, Encoded
from alpaca_lora.text.rendered import Rendered, Span
from alpaca_lora.text.sentencepiece_tokenizer import definition_from_model
from alpaca_lora.text.tokenizer import Tokenizer
from tests.text.tiny_tokenizers import byte_level, of_family, sentencepiece_file

TEXT = st.text(
    alphabet=st.one_of(
        st.sampled_from("ab 12\n\t.</s>灯价是多少😀🏽é"), st.characters(exclude_categories=["Cs"])
    ), max_size=60,
)  # fmt: skip


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    path: Path = sentencepiece_file(tmp_path_factory.mktemp("spm"))
    return {"bytes": byte_level(), "pieces": Tokenizer(definition_from_model(path)), "chat": of_family("llama3")}


def plain(text: str) -> Rendered:
    return Rendered(text, (Span(0, len(text)),), (), special=False, needs_eos=True)


def offsets(encoded: Encoded) -> list[tuple[int, int]]:
    """Every token's characters, the slow way."""
    found = []
    for segment in encoded._segments:
        if segment.encoding is None:
            found.append((segment.start, segment.end))
        else:
            found.extend((segment.start + s, segment.start + e) for s, e in segment.encoding.offsets)
    return found


@settings(max_examples=200, deadline=None)
@given(text=TEXT, char=st.integers(0, 60), kind=st.sampled_from(["bytes", "pieces"]))
def test_boundary_is_the_first_token_at_or_after(
    text: str, char: int, kind: str, tokenizers: dict[str, Tokenizer]
) -> None:
    char = min(char, len(text))
    encoded = tokenizers[kind].encode(plain(text))
    spans = offsets(encoded)
    token, straddles = encoded.token_at(char)
    assert all(start < char for start, _ in spans[:token])
    assert char == 0 or all(start >= char for start, _ in spans[token:])
    assert straddles == any(start < char < end for start, end in spans)


@settings(max_examples=100, deadline=None)
@given(text=TEXT, kind=st.sampled_from(["bytes", "pieces"]), cuts=st.tuples(st.integers(0, 60), st.integers(0, 60)))
def test_a_spans_tokens_lie_in_it_and_no_token_is_lost(
    text: str, kind: str, cuts: tuple[int, int], tokenizers: dict[str, Tokenizer]
) -> None:
    first, second = sorted(min(cut, len(text)) for cut in cuts)
    encoded = tokenizers[kind].encode(plain(text))
    spans = offsets(encoded)
    start, end, straddling = encoded.span_tokens(Span(first, second))
    assert all(first <= s and e <= second for s, e in spans[start:end])
    assert encoded.token_at(0) == Boundary(0, False) and encoded.token_at(len(text)) == Boundary(
        len(encoded.ids), False
    )
    pieces = [encoded.span_tokens(Span(a, b)) for a, b in ((0, first), (first, second), (second, len(text)))]
    missing = len(encoded.ids) - sum(piece.end - piece.start for piece in pieces)
    assert missing == 0 or any(piece.num_straddling for piece in pieces)
    assert straddling <= 2


def test_a_character_of_several_tokens_counts_once() -> None:
    encoded = byte_level().encode(plain("a😀b"))
    assert len(encoded.ids) == 6
    assert encoded.token_at(1) == Boundary(1, False)
    assert encoded.token_at(2) == Boundary(5, False)


def test_a_token_over_the_border_is_not_in_the_span() -> None:
    tokenizer = byte_level()
    text = "the response"
    encoded = tokenizer.encode(plain(text))
    assert tokenizer.token_bytes(encoded.ids[-1]) == b" response"
    assert encoded.token_at(4) == Boundary(len(encoded.ids), True)
    assert encoded.span_tokens(Span(4, len(text))) == (len(encoded.ids), len(encoded.ids), 1)
    assert encoded.span_tokens(Span(3, len(text))) == (len(encoded.ids) - 1, len(encoded.ids), 0)


def test_boundaries_around_special_tokens() -> None:
    tokenizer = of_family("chatml")
    text = "<|im_start|>user\nhi<|im_end|>"
    encoded = tokenizer.encode(Rendered(text, (Span(17, 19),), (), special=True, needs_eos=False))
    assert encoded.token_at(0) == Boundary(0, False)
    assert encoded.token_at(5) == Boundary(1, True)
    assert encoded.token_at(19) == Boundary(len(encoded.ids) - 1, False)
    assert encoded.span_tokens(Span(17, len(text))).end == len(encoded.ids)
