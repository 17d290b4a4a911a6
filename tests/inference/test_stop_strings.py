"""No part of a stop text is ever let through, however the text is cut into pieces."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from alpaca_lora.inference.stop_strings import StopStrings


def feed(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    shown = "".join(matcher.push(piece) for piece in pieces)
    found = matcher.found
    return shown + matcher.flush(), found


def test_every_cut_of_a_text_gives_the_same_answer() -> None:
    text, stops = "say ab\n###aab end", ["aab", "\n####"]
    for cuts in itertools.combinations(range(1, len(text)), 3):
        pieces = [text[a:b] for a, b in itertools.pairwise((0, *cuts, len(text)))]
        assert feed(stops, pieces) == ("say ab\n###", True), pieces


def test_nothing_of_the_stop_text_is_shown_before_it_is_found() -> None:
    matcher = StopStrings(["### End"])
    assert [matcher.push(c) for c in "ok ### En"] == ["o", "k", " ", *[""] * 6]
    assert matcher.push("d") == "" and matcher.found
    assert matcher.push("more") == "" and matcher.flush() == ""


def test_a_false_start_is_shown_when_it_is_over() -> None:
    matcher = StopStrings(["aab"])
    assert [matcher.push(c) for c in "aaac"] == ["", "", "a", "aac"]
    assert not matcher.found


def test_text_held_back_at_the_end_is_not_lost() -> None:
    assert feed(["END"], ["the EN"]) == ("the EN", False)


def test_leftmost_stop_wins_and_no_stops_pass_everything() -> None:
    assert feed(["later", "soon"], ["x soon later"]) == ("x ", True)
    assert feed([], ["a", "b"]) == ("ab", False)


def naive(stops: list[str], text: str) -> tuple[str, bool]:
    """The first end of a stop text, of those the longest: by looking at every beginning of the text."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@pytest.mark.parametrize("seed", range(5))
def test_random_texts_match_a_search_in_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))]
        pieces = ["".join(rng.choices("aabc", k=rng.randint(0, 4))) for _ in range(8)]
        assert feed(stops, pieces) == naive(stops, "".join(pieces)), (stops, pieces)


def test_stop_texts_inside_of_each_other_do_not_depend_on_the_cut() -> None:
    for pieces in (["xabcd"], list("xabcd"), ["xab", "cd"], ["xabc", "d"]):
        assert feed(["abcd", "bc"], pieces) == ("xa", True)
    assert feed(["bc", "abc"], ["xabc"]) == ("x", True)


def test_a_million_characters_of_stop_text_take_linear_time() -> None:
    stop = "a" * 1_000_000 + "b"
    matcher = StopStrings([stop])
    started = time.perf_counter()
    shown = "".join(matcher.push("a" * 50) for _ in range(20_000)) + matcher.push("aab")
    # by comparing ends of the text with beginnings of the stop text this takes minutes
    assert time.perf_counter() - started < 20
    assert shown == "aa" and matcher.found
