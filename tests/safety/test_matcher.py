"""Expressions in a view: what RE2 finds in a text is found in its pieces, candidates are judged, tails stretch."""

from __future__ import annotations

import re

import pytest

from alpaca_lora.errors import ConfigError, MachineError
from alpaca_lora.safety import expression as expression_module
from alpaca_lora.safety import words as words_module
from alpaca_lora.safety.fold import PLAIN, Fold
from alpaca_lora.safety.matcher import MAX_TAIL, PatternMatcher
from alpaca_lora.safety.pattern import parse_pattern
from alpaca_lora.safety.words import WordMatcher
from tests.safety.matching import every_way, found


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"\bcat\b", "cat cats cat 中cat中 concat cat"),
        ("a{1,3}b|a", "aaaab aab aaa b"),
        ("ab|abc", "abc ab abcd"),
        ("abc|ab", "abc ab abcd"),
        (r"[\x{4e00}-\x{9fff}]{2}x?", "中文x字x你好"),
        (r"^a|b$", "ab ab"),
        (r"(?:ab){1,3}c", "ababababc abc abab"),
    ],
)
def test_matches_are_those_of_a_search(pattern: str, text: str) -> None:
    plain = re.compile(pattern.replace(r"\x{4e00}-\x{9fff}", "\u4e00-\u9fff"), re.ASCII)
    assert every_way(PatternMatcher(parse_pattern(pattern)), text) == [match.group() for match in plain.finditer(text)]


def test_a_refused_candidate_is_passed_by_one_character() -> None:
    pattern = parse_pattern(r"[0-9](?: ?[0-9]){2}")
    accept = PatternMatcher(pattern, accept=lambda digits: 3 if digits.startswith("345") else 0)
    assert every_way(accept, "12345 x 345 6") == ["345", "345"]


def test_a_tail_stretches_a_match() -> None:
    matcher = PatternMatcher(parse_pattern("k-[a-z]{2}"), tail=parse_pattern("[a-z]|-[0-9]"))
    assert every_way(matcher, "k-abc-1d-- k-ab k-a k-zz-9") == ["k-abc-1d", "k-ab", "k-zz-9"]
    assert [len(one) for one in found(matcher, "k-" + "a" * 20_000, "b")] == [4 + MAX_TAIL]


def test_case() -> None:
    assert found(PatternMatcher(parse_pattern("Ab"), Fold(case=True)), "AB ab") == ["AB", "ab"]
    assert found(PatternMatcher(parse_pattern("Ab")), "AB Ab") == ["Ab"]


def test_what_re2_does_not_take_is_said() -> None:
    with pytest.raises(ConfigError, match="RE2 does not take"):
        PatternMatcher(parse_pattern(r"\p{Klingon}"))


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        (["cat"], "cat cats concat cat2 _cat_ CAT", ["cat", "cat", "cat", "CAT"]),
        (["ab", "abc", "abcd"], "ab abc abcd abcde", ["ab", "abc", "abcd"]),
        (["black cat", "cat"], "black  cat black\ncat cat", ["black  cat", "black\ncat", "cat"]),
        (["炸弹", "弹药"], "炸弹药 我炸弹", ["炸弹", "炸弹"]),
        (["c4"], "c4 c45 xc4 C4!", ["c4", "C4"]),
        (["a.b"], "a.b xa.b a.bc", ["a.b"]),
    ],
)
def test_words(words: list[str], text: str, expected: list[str]) -> None:
    assert every_way(WordMatcher(words, Fold(case=True, lookalikes=True, whitespace=True)), text) == expected


@pytest.mark.parametrize("text", ["k1ll", "K I L L", "ki11", "k.i.1.l", "k\u200b1\u200b1\u200bl", "a k i l l", "kill2"])
def test_words_in_disguise(text: str) -> None:
    fold = Fold(case=True, lookalikes=True, whitespace=True, leet=True, spacing=True)
    assert len(every_way(WordMatcher(["kill"], fold), text)) == 1
    assert every_way(WordMatcher(["kill"], fold), "skill skil l killer k i l o") == []


@pytest.mark.parametrize("word", ["", "  ", "\u200b", "x" * 600])
def test_what_is_no_word_is_refused(word: str) -> None:
    with pytest.raises(ConfigError):
        WordMatcher([word], PLAIN)


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expression_module, "re2", None)
    with pytest.raises(MachineError, match=r"google-re2 .*alpaca-lora\[serve\]"):
        PatternMatcher(parse_pattern("a"))
    monkeypatch.setattr(words_module, "ahocorasick", None)
    with pytest.raises(MachineError, match=r"pyahocorasick .*alpaca-lora\[serve\]"):
        WordMatcher(["a"], PLAIN)
