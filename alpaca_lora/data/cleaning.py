"""What is repaired in a row and which rows are dropped: one function per rule. Knows no tokens; never reorders rows.

| rule               | what it does                                                                              |
|--------------------|-------------------------------------------------------------------------------------------|
| broken_unicode     | joins surrogate pairs, replaces lone ones, mends UTF-8 that was read as Windows-1252      |
| control_characters | removes C0, C1, DEL, byte order marks, terminal colours; vertical tabs become newlines    |
| whitespace         | newlines become ``\\n``, blank edges go (code keeps the indent of its first line)         |
| noinput            | ``<noinput>``, ``No input`` and the like as input become empty; in front of an answer they |
|                    | are cut off; a row whose whole answer is ``<noinput>`` or ``<nooutput>`` is dropped       |
| empty_output       | drops rows without an answer, and texts to classify of which nothing is left              |
| merged_records     | drops rows whose answer runs on into the next numbered record                             |
| unanswered_turn    | removes the last turns of a chat that nobody answers                                      |
| duplicates         | drops rows equal to an earlier one after cleaning (over the whole set, in `prepare.py`)   |

Texts to classify are read by the first three, empty_output and duplicates.

On the 52,002 rows of Stanford Alpaca: noinput repairs 679 and drops 52, merged_records drops 37, empty_output 28,
control_characters repairs 2, whitespace 1, the others find nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from alpaca_lora.text.messages import Conversation, Message


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What became of a row. ``conversation`` is None when it was dropped, by the rule ``dropped``."""

    conversation: Conversation | None
    repaired: tuple[str, ...] = ()
    dropped: str | None = None


_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# first byte of a two- or three-byte UTF-8 character, then continuation bytes, all shown as Windows-1252 shows them
_CONTINUATION = (
    "[\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013\u2014\u2018-\u201e"
    "\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122]"
)
_MOJIBAKE = re.compile(f"\u00e2\u20ac{_CONTINUATION}|\u00c3[\u0080-\u00bf]")
_C1 = re.compile("[\u0080-\u0084\u0086-\u009f]")
_ANSI = re.compile("\x1b\\[[0-9;?]*[ -/]*[@-~]")
_LINE_CONTROLS = re.compile("[\x0b\x0c\x1c-\x1e\u0085]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x1f\x7f\u0080-\u0084\u0086-\u009f\ufeff\ufffe\uffff]")
_ANY_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\u009f\ufeff\ufffe\uffff]")
_OTHER_NEWLINES = re.compile("\r\n?|[\u2028\u2029]")


def _unbroken(text: str) -> str:
    if text.isascii():
        return text
    if _SURROGATE.search(text):
        text = _SURROGATE_PAIR.sub(lambda m: m[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
        text = _SURROGATE.sub("\ufffd", text)
    return (
        _C1.sub(_from_windows, _MOJIBAKE.sub(_redecoded, text)) if _MOJIBAKE.search(text) or _C1.search(text) else text
    )


def _redecoded(match: re.Match[str]) -> str:
    # the five bytes that Windows-1252 leaves open are shown as C1 characters
    data = b"".join(c.encode("latin-1") if ord(c) < 256 else c.encode("cp1252") for c in match[0])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return match[0]


def _from_windows(match: re.Match[str]) -> str:
    try:
        return match[0].encode("latin-1").decode("cp1252")
    except UnicodeDecodeError:
        return match[0]


def _without_controls(text: str) -> str:
    if not _ANY_CONTROL.search(text):
        return text
    return _CONTROLS.sub("", _LINE_CONTROLS.sub("\n", _ANSI.sub("", text)))


def _unix_newlines(text: str) -> str:
    if "\r" in text or not text.isascii():
        return _OTHER_NEWLINES.sub("\n", text)
    return text


def _trimmed(text: str) -> str:
    text = _unix_newlines(text).rstrip()
    if not text[:1].isspace():
        return text
    lines = text.split("\n")
    while lines and not lines[0].strip():
        lines.pop(0)
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())] if lines else ""
    follower = next((line for line in lines[1:] if line.strip()), "")
    if not (indent and follower.startswith(indent)):  # code keeps its shape
        lines[:1] = [lines[0].lstrip()] if lines else []
    return "\n".join(lines)


# the word in any spelling and wrapping, alone: <noinput>, "No input.", (no input), No input required, <NO INPUT>,
# <noinputs>
_NOINPUT = re.compile(
    r"\W*no[\s_-]*inputs?e?(?:\s+(?:is\s+)?(?:required|needed|necessary|given|provided|available))?\W*"
    r"|<\s*no\s*inputs?\s*>[\s\d.,]*|\W*n/a\W*|<\s*(?:none|noput|ninput)\s*>",
    re.IGNORECASE,
)
_PLACEHOLDER_ANSWER = re.compile(r"[`\"']?<\s*no\s*(?:in|out)put\s*>[`\"'.]?", re.IGNORECASE)
_NOINPUT_BEFORE_ANSWER = re.compile(r"<\s*no\s*input\s*>[ \t]*\n\s*(?:output:\s*)?(?=\S)", re.IGNORECASE)
# "7. Instruction: ..." and then "7. Input:" or "7. Output:" behind an answer. Numbers from 2: the first record cannot
# follow one.
_MERGED = re.compile(
    r"\S\s*\n\s*([2-9]|[1-9]\d+)\.\s*Instruction\s*:.*?\n\s*\1\.\s*(?:Input|Output)\s*:", re.IGNORECASE | re.DOTALL
)

TextRule = Callable[[str], str]
RowRule = Callable[[Conversation], "Conversation | None"]  # None: the row is dropped


def _clean_noinput(row: Conversation) -> Conversation | None:
    if row.kind != "instruction":
        return row
    prompt, answer = row.messages
    if prompt.context and len(prompt.context) < 60 and _NOINPUT.fullmatch(prompt.context.strip()):
        prompt = Message("user", prompt.content)
    if "<" in answer.content[:2]:
        if _PLACEHOLDER_ANSWER.fullmatch(answer.content.strip()):
            return None
        if match := _NOINPUT_BEFORE_ANSWER.match(answer.content):
            answer = Message("assistant", answer.content[match.end() :])
    if prompt is row.messages[0] and answer is row.messages[1]:
        return row
    return replace(row, messages=(prompt, answer))


def _drop_empty(row: Conversation) -> Conversation | None:
    if row.kind == "chat":  # an empty turn in a chat is an error that formats raises; cleaning may have emptied one
        return row if all(m.content.strip() for m in row.messages if m.role == "assistant") else None
    wanted = row.messages if row.kind == "labelled" else row.messages[-1:]
    return row if all(message.content.strip() for message in wanted) else None


def _drop_merged(row: Conversation) -> Conversation | None:
    if row.kind != "instruction":
        return row
    answer = row.messages[-1].content
    return None if ". Instruction" in answer and _MERGED.search(answer) else row


def _drop_unanswered(row: Conversation) -> Conversation | None:
    if row.kind != "chat" or row.messages[-1].role == "assistant":
        return row
    last = max(i for i, message in enumerate(row.messages) if message.role == "assistant")
    return replace(row, messages=row.messages[: last + 1])


_TEXT_RULES: Mapping[str, TextRule] = MappingProxyType(
    {"broken_unicode": _unbroken, "control_characters": _without_controls, "whitespace": _trimmed}
)
_ROW_RULES: Mapping[str, RowRule] = MappingProxyType(
    {
        "noinput": _clean_noinput,
        "empty_output": _drop_empty,
        "merged_records": _drop_merged,
        "unanswered_turn": _drop_unanswered,
    }
)
DUPLICATES = "duplicates"
RULE_NAMES: tuple[str, ...] = (*_TEXT_RULES, *_ROW_RULES, DUPLICATES)


def active_rules(skip: Collection[str]) -> tuple[str, ...]:
    """The rules that run, in order, when ``skip`` (rule names or ``all``) are left out."""
    return () if "all" in skip else tuple(name for name in RULE_NAMES if name not in skip)


class Cleaner:
    """Applies the active rules to one row after the other."""

    def __init__(self, skip: Collection[str] = ()) -> None:
        active = active_rules(skip)
        self._text_rules = tuple((name, rule) for name, rule in _TEXT_RULES.items() if name in active)
        self._row_rules = tuple((name, rule) for name, rule in _ROW_RULES.items() if name in active)

    def clean(self, row: Conversation) -> Cleaned:
        """The row repaired, or dropped by the first rule that rejects it. The row itself is not changed."""
        repaired: list[str] = []
        messages = row.messages
        for name, rule in self._text_rules:
            if row.kind == "text" and rule is _trimmed:
                rule = _unix_newlines  # a text's own blank lines and indents are part of it
            changed = tuple([_apply(rule, message) for message in messages])
            if any(a is not b for a, b in zip(changed, messages, strict=True)):
                repaired.append(name)
                messages = changed
        current = row if messages is row.messages else replace(row, messages=messages)
        for name, rule in self._row_rules:
            result = rule(current)
            if result is None:
                return Cleaned(None, tuple(repaired), name)
            if result is not current:
                repaired.append(name)
                current = result
        return Cleaned(current, tuple(repaired))


def _apply(rule: TextRule, message: Message) -> Message:
    content = rule(message.content)
    context = rule(message.context) if message.context else ""
    if content == message.content and context == message.context:
        return message
    return Message(message.role, content, context)
