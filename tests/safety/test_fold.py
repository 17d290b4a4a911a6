"""What rules see of a text: disguises fold away, places lead back, and the pieces it came in leave no trace."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_lora.safety.fold import BREAK, MOST_DROPPED, PLAIN, Fold, Folded, Folder, fold_word

LOOSE = Fold(case=True, lookalikes=True, whitespace=True)
LOOSEST = Fold(case=True, lookalikes=True, whitespace=True, leet=True, spacing=True)
FOLDS = [PLAIN, Fold(case=True), LOOSE, LOOSEST, Fold(spacing=True), Fold(whitespace=True)]
AWKWARD = "ab .\n\t-e\u0301\u00e9\u200b\ufeff\u0430ｂ4@\u4e2d\u6587\u3000\u1161\u1100\u11a8ß\ud800"
AWKWARD += "\U0001f1e6\U000e0061\ufe0fﬁ\x00İ"


def folded(text: str, fold: Fold) -> Folded:
    return Folder(fold).push(text, final=True)


@pytest.mark.parametrize(
    "disguise",
    [
        "BOMB", "ｂｏｍｂ", "𝐛𝒐𝓶𝖇", "b\u200bo\u200cm\u2060b", "bо\u043cb", "ƅοmƅ", "ⓑⓞⓜⓑ", "🅱🅾🅼🅱",
        "b\u0301ö\u0327m\u0308b", "b\u00adomb", "\ufeffbomb", "ʙᴏᴍʙ", "".join(chr(0xE0000 + ord(c)) for c in "bomb"),
        "b\x00o\x08mb", "ｂ\u200dｏｍ\ufe0fｂ",
    ],
)  # fmt: skip
def test_disguises_fold_away(disguise: str) -> None:
    assert folded(disguise, LOOSE).text == "bomb"


@pytest.mark.parametrize(
    "disguise", ["b0mb", "B O M B", "b.o.m.b", "b - o - m - b", "b*0*m*b", "b_o\u200b_m_b", "b\no\nm\nb"]
)
def test_spacing_and_leet_fold_away_where_asked(disguise: str) -> None:
    assert folded(disguise, LOOSEST).text == "bomb"
    assert folded(disguise, LOOSE).text != "bomb"


def test_words_are_not_joined() -> None:
    assert folded("I am a man with 2 cats", LOOSEST).text == "i am a man with 2 cats"
    assert folded("go to bed", LOOSEST).text == "go to bed"
    assert folded("a b.o.m.b a", LOOSEST).text == "a bomb a"
    assert folded("炸 弹", LOOSEST).text == "炸弹"
    assert folded("买枪，支持", LOOSEST).text == "买枪,支持"


def test_the_plain_fold_keeps_what_people_read() -> None:
    assert folded("Ab\u0430\n  É e\u0301 “x”", PLAIN).text == 'Ab\u0430\n  É é "x"'


def test_places_lead_back_to_the_text() -> None:
    text = "x\u200b\u200bＢ\u0301o ﬁ"
    result = folded(text, LOOSE)
    assert result.text == "xbo fi"
    spans = [text[start:end] for start, end in zip(result.starts, result.ends, strict=True)]
    assert spans == ["x", "Ｂ\u0301", "o", " ", "ﬁ", "ﬁ"]


def test_a_flood_of_invisible_characters_parts_words() -> None:
    assert folded("bo" + "\u200b" * MOST_DROPPED + "mb", LOOSE).text == "bomb"
    assert folded("bo" + "\u200b" * (MOST_DROPPED + 1) + "mb", LOOSE).text == f"bo{BREAK}mb"
    assert folded("a" + " " * 1000 + "b", LOOSE).text.count(BREAK) == 999 // (MOST_DROPPED + 1)
    assert folded("\ufdd0", PLAIN).text == ""  # a text cannot write the break itself


def test_marks_on_one_letter_are_counted() -> None:
    text = "a" + "\u0301" * 100_000  # sorting so many takes minutes
    assert folded(text, LOOSE).text.replace(BREAK, "") == "a"


def test_plain_folding_is_nfkc() -> None:
    for text in ("ｶﾞ", "각", "e\u0301\u0327", "½", "Å", "㌖", "ﷻ"):
        assert folded(text, PLAIN).text == unicodedata.normalize("NFKC", text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.sampled_from(AWKWARD), max_size=12), max_size=8), st.sampled_from(FOLDS))
def test_the_pieces_leave_no_trace(pieces: list[str], fold: Fold) -> None:
    folder, whole = Folder(fold), folded("".join(pieces), fold)
    parts = Folded()
    for piece in pieces:
        parts.extend(folder.push(piece))
    parts.extend(folder.push("", final=True))
    assert (parts.text, parts.starts, parts.ends, parts.flags) == (whole.text, whole.starts, whole.ends, whole.flags)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.sampled_from(FOLDS))
def test_places_are_in_order_and_inside(text: str, fold: Fold) -> None:
    result = folded(text, fold)
    assert list(result.starts) == sorted(result.starts) and list(result.ends) == sorted(result.ends)
    assert all(0 <= start < end <= len(text) for start, end in zip(result.starts, result.ends, strict=True))
    assert len(result.text) == len(result.starts) == len(result.ends) == len(result.flags)
    result.text.encode()  # no half pairs


def test_one_character_does_not_become_a_long_text() -> None:
    assert folded("ﷺ", PLAIN).text == unicodedata.normalize("NFKC", "ﷺ")[:8]


def test_words_of_a_list_fold_like_the_text() -> None:
    assert fold_word("Naïve  Café", LOOSE) == "naive cafe"
