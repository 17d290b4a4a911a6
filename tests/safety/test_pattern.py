"""Expressions taken apart: their length, and the expression of all beginnings, against a search by hand."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_lora.errors import ConfigError
from alpaca_lora.safety.pattern import any_of, parse_pattern


@pytest.mark.parametrize(
    ("source", "least", "most"),
    [
        ("abc", 3, 3),
        ("a?b", 1, 2),
        ("a{2,5}", 2, 5),
        (r"\bfoo|ba{1,3}r", 3, 5),
        (r"(?:[a-z]{1,63}\.){1,4}x", 3, 257),
        (r"[^\]a]\x{4e2d}\p{Han}.", 4, 4),
        (r"a(?:b|cd)?(?P<n>e){3}", 4, 6),
        (r"[[:alpha:]\d]{2}\|", 3, 3),
        ("^a$", 1, 1),
    ],
)
def test_lengths(source: str, least: int, most: int) -> None:
    pattern = parse_pattern(source)
    assert (pattern.least, pattern.most) == (least, most)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("a*", "without an upper bound"),
        ("a+", "without an upper bound"),
        ("a{3,}", "without an upper bound"),
        ("(a+)+", "without an upper bound"),
        ("a?", "no characters"),
        (r"\b", "no characters"),
        ("[a-z]{513}", "at most 512"),
        ("(?:[a-z]{100}){6}", "can take 600"),
        ("(a", "without its )"),
        ("a)", "without its ("),
        ("[a", "without its ]"),
        ("(?=a)b", "look-around"),
        ("(?i)a", "flags"),
        (r"(a)\1", "escape"),
        ("a{", "brace"),
        ("{2}a", "repetition of nothing"),
        ("a{0}b", "repetition of 0"),
        ("a{5,2}", "repetition of 5"),
        ("(" * 60 + "a" + ")" * 60, "50 groups"),
        ("a" * 30_000, "characters"),
        ("a\\", "escape"),
    ],
)
def test_what_cannot_be_bounded_is_refused(source: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_pattern(source)


parts = st.recursive(
    st.sampled_from(["a", "b", "[ab]", "[^a]", r"\d", "."]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        inner.map(lambda one: f"(?:{one})?"),
        st.tuples(inner, st.integers(0, 2), st.integers(1, 2)).map(lambda x: f"(?:{x[0]}){{{x[1]},{x[1] + x[2]}}}"),
    ),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(parts, st.text(st.sampled_from("ab1c"), max_size=8))
def test_every_beginning_of_a_match_is_one(source: str, text: str) -> None:
    try:
        pattern = parse_pattern(source)
    except ConfigError:
        return
    beginnings = re.compile(pattern.beginnings)
    if (found := re.compile(source).match(text)) is not None:
        assert pattern.least <= found.end() <= pattern.most
        assert all(beginnings.fullmatch(text[:end]) for end in range(found.end() + 1))


@settings(max_examples=200, deadline=None)
@given(parts, st.text(st.sampled_from("ab1"), max_size=4))
def test_no_other_text_is_a_beginning(source: str, text: str) -> None:
    """What is called a beginning can be completed, by one of all texts of a small alphabet."""
    try:
        pattern = parse_pattern(source)
    except ConfigError:
        return
    if pattern.most > 6 or not re.compile(pattern.beginnings).fullmatch(text):
        return
    endings = [""]
    for _ in range(6 - len(text)):
        endings += [ending + letter for ending in endings for letter in "ab1" if len(ending) == len(endings[-1])]
    assert any(re.compile(source).fullmatch(text + ending) for ending in endings)


def test_the_first_of_several_wins() -> None:
    pattern = any_of([parse_pattern("ab"), parse_pattern("abc|d")])
    assert (pattern.source, pattern.least, pattern.most) == ("ab|abc|d", 1, 3)
