"""The command line as written: which words belong to which flag, and how lists are cut."""

from __future__ import annotations

import pytest

from alpaca_lora.errors import ConfigError
from alpaca_lora.flags import Flag, parse_flags, split_list


def test_the_ways_to_write_a_flag() -> None:
    positional, flags = parse_flags(["word", "--lora-r", "8", "--a=b=c", "--many", "x", "y", "--bare", "--empty="])
    assert positional == ["word"]
    assert flags == {
        "lora_r": Flag("lora_r", ("8",)),
        "a": Flag("a", ("b=c",)),
        "many": Flag("many", ("x", "y")),
        "bare": Flag("bare", ()),
        "empty": Flag("empty", ("",)),
    }


def test_a_flag_given_twice_keeps_every_word() -> None:
    assert parse_flags(["--p", "a", "--q", "1", "--p=b"])[1]["p"] == Flag("p", ("a", "b"), times=2)


@pytest.mark.parametrize("word", ["-1", "-.5", "-1e-3", "-", "-inf"])
def test_negative_numbers_and_a_dash_are_values(word: str) -> None:
    assert parse_flags(["--key", word])[1]["key"].words == (word,)


@pytest.mark.parametrize("word", ["-x", "-rf", "--"])
def test_other_words_with_a_dash_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="unknown flag"):
        parse_flags(["--key", word])


@pytest.mark.parametrize(
    ("words", "items"),
    [
        (["q_proj,k_proj"], ["q_proj", "k_proj"]),
        (["[q_proj, k_proj]"], ["q_proj", "k_proj"]),
        (["[q_proj,", "k_proj]"], ["q_proj", "k_proj"]),
        (["['q_proj','k_proj']"], ["q_proj", "k_proj"]),
        (["q_proj", "k_proj"], ["q_proj", "k_proj"]),
        ([r"model\.layers\.\d{1,2}\.(q|k)_proj"], [r"model\.layers\.\d{1,2}\.(q|k)_proj"]),
        (["q_proj,"], ["q_proj"]),
        (["[]"], []),
        ([""], []),
    ],
)
def test_lists(words: list[str], items: list[str]) -> None:
    assert split_list(tuple(words), "key") == items


def test_lists_whose_values_may_hold_commas() -> None:
    assert split_list(("a,b.json", "c.json"), "key", commas=False) == ["a,b.json", "c.json"]
    assert split_list(('["a,b.json", c.json]',), "key", commas=False) == ["a,b.json", "c.json"]


def test_a_broken_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="--key: cannot be read as a list"):
        split_list(("[a, [b]",), "key")
