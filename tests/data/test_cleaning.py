"""Each cleaning rule: what it catches, and what it must leave alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from alpaca_lora.data.cleaning import RULE_NAMES, Cleaner, active_rules
from alpaca_lora.data.formats import read_conversations
from alpaca_lora.text.messages import Conversation, Message, instruction


def only(rule: str) -> Cleaner:
    return Cleaner([name for name in RULE_NAMES if name != rule])


def answer(cleaner: Cleaner, text: str) -> str | None:
    cleaned = cleaner.clean(instruction("p", "", text)).conversation
    return None if cleaned is None else cleaned.messages[1].content


def context(cleaner: Cleaner, text: str) -> str:
    cleaned = cleaner.clean(instruction("p", text, "r")).conversation
    assert cleaned is not None
    return cleaned.messages[0].context


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a\x00b\x07c\x7f", "abc"),
        ("one\x0btwo\x0cthree", "one\ntwo\nthree"),
        ("\ufeffstart", "start"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("tab\tand\nnewline", "tab\tand\nnewline"),
        (
            "👩\u200d👩\u200d👧 \u200e中文\u200b",
            "👩\u200d👩\u200d👧 \u200e中文\u200b",
        ),  # joiners and marks carry meaning
    ],
)
def test_control_characters(before: str, after: str) -> None:
    assert answer(only("control_characters"), before) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("\ud83d\ude00", "😀"),
        ("lone \ud83d end", "lone \ufffd end"),
        ("it\u00e2\u20ac\u2122s \u00e2\u20ac\u0153so\u00e2\u20ac\u009d", "it’s “so”"),
        ("caf\u00c3\u00a9", "café"),
        ("it\u0092s", "it’s"),
        ("SÃO PAULO, château, 3 â 4, Ã", "SÃO PAULO, château, 3 â 4, Ã"),
        ("π ≈ 3,14 “ok” – naïve", "π ≈ 3,14 “ok” – naïve"),
    ],
)
def test_broken_unicode(before: str, after: str) -> None:
    assert answer(only("broken_unicode"), before) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("  padded \n\n", "padded"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("\n\n    if x:\n        y", "    if x:\n        y"),  # code
        ("    Paris\nis it", "Paris\nis it"),
        ("two  spaces  \nmarkdown", "two  spaces  \nmarkdown"),
        (" \n ", ""),
    ],
)
def test_whitespace(before: str, after: str) -> None:
    assert answer(only("whitespace"), before) == after


NO_INPUT = [
    "<noinput>", "No input", "Noinput", "No Input.", "No input required.", "<no input>",
    "no input needed", '"<noinput>"',
    "`<noinput>`", "< noinput >", "(no input)", "[noinput]", "<noinput", "<noinput?", "<noinputs>", "<noinpute>",
    "<noinput> 8", "<noinput>\n11", "N/A", "<N/A>", "<none>", "{\\noinput}", "No input is given",
]  # fmt: skip
INPUTS = [
    "No lemon", "No one will do", "no", "None", "NA", "none of the students", "input", "No input file?",
    "A daisy wheel printer is a type of <noinput>", "0", "-", "NaCl", "Name: John", "No inputs were harmed", "<image>",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_INPUT)
def test_noinput_becomes_empty(text: str) -> None:
    assert context(only("noinput"), text) == ""


@pytest.mark.parametrize("text", INPUTS)
def test_inputs_that_look_like_it_stay(text: str) -> None:
    assert context(only("noinput"), text) == text


def test_noinput_in_answers() -> None:
    cleaner = only("noinput")
    assert answer(cleaner, '<noinput>\n"A Leap of Faith"') == '"A Leap of Faith"'
    assert answer(cleaner, "<NOINPUT>\nOutput:\nB A G") == "B A G"
    assert [answer(cleaner, text) for text in ("<noinput>", "<nooutput>", "<No Output>")] == [None, None, None]
    kept = ["No input", "No output", "N/A", "No.", "New YorkTime: <noinput>", "<no> and more"]
    assert [answer(cleaner, text) for text in kept] == kept


def test_empty_output() -> None:
    cleaned = Cleaner().clean(instruction("p", "i", " \n\t"))
    assert cleaned.conversation is None and cleaned.dropped == "empty_output"
    assert Cleaner(["empty_output"]).clean(instruction("p", "i", "")).conversation is not None


def test_merged_records() -> None:
    merged = "Roses are red.\n##\n11. Instruction: Define a tree.\n11. Input:\n<noinput>\n11. Output:\nA plant."
    cleaner = only("merged_records")
    assert answer(cleaner, merged) is None
    kept = [
        "1. Instruction: Define a tree.\n1. Input: none\n1. Output: A plant.",  # a task that was asked for
        "Steps:\n4. Instruction: read\n5. Input: the number\n6. Output: its square",
        "Instruction: do it.\nInput: x\nOutput: y",
        "3. Divide by three.\n4. Output the average.",
    ]
    assert [answer(cleaner, text) for text in kept] == kept


def test_turns_that_nobody_answers_are_removed() -> None:
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "thanks"))
    cleaned = Cleaner().clean(Conversation(turns, "chat", "f", 1))
    assert cleaned.conversation is not None and cleaned.conversation.messages == turns[:2]
    assert cleaned.repaired == ("unanswered_turn",)


def test_a_text_keeps_its_edges() -> None:
    row = Conversation((Message("assistant", "\n  verse\r\n  two\n\n"),), "text", "f", 1)
    cleaned = Cleaner().clean(row)
    assert cleaned.conversation is not None and cleaned.conversation.messages[0].content == "\n  verse\n  two\n\n"


def test_a_clean_row_is_the_same_object() -> None:
    row = instruction("Write “x”.", "given\tthis", "def f():\n    return 1")
    assert Cleaner().clean(row).conversation is row


def test_every_rule_can_be_left_out() -> None:
    row = instruction("p\x00 ", "<noinput>", " \ud83d r\r\n2. Instruction: x\n2. Output: y")
    assert Cleaner(["all"]).clean(row).conversation is row
    for rule in RULE_NAMES:
        assert rule not in active_rules([rule])
        assert rule not in Cleaner([rule]).clean(row).repaired
    assert Cleaner(["merged_records"]).clean(row).repaired == (
        "broken_unicode", "control_characters", "whitespace", "noinput",
    )  # fmt: skip


def test_the_real_alpaca_rows(shared_data: Path) -> None:
    cleaner = Cleaner()
    repaired: Counter[str] = Counter()
    dropped: Counter[str | None] = Counter()
    num_rows = num_blank = 0
    for row in read_conversations(shared_data / "alpaca_data.json"):
        num_rows += 1
        num_blank += not row.messages[1].content.strip()
        cleaned = cleaner.clean(row)
        repaired.update(cleaned.repaired)
        dropped[cleaned.dropped] += 1
    assert (num_rows, num_blank) == (52_002, 28)
    assert dropped == {None: 51_885, "empty_output": 28, "noinput": 52, "merged_records": 37}
    assert repaired == {"noinput": 679, "control_characters": 2, "whitespace": 1}
