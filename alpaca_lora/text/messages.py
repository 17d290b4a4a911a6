"""What a row of data means, before any template: the nouns of the text room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]

TOOL_PREFIX = "Tool result:\n"  # in front of a tool's turn where a template knows no tools


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``context`` is the alpaca format's ``input``; only a user turn has one, and it may be empty."""

    role: Role
    content: str
    context: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a data file.

    ``kind``: ``instruction`` (one user turn, one assistant turn), ``chat`` (any number of turns), ``text``
    (one assistant message that is the whole text: no template is applied, every token is supervised) or ``labelled``
    (a user message that is a text to classify, an assistant message that is its label: no template either).
    ``file`` and ``line`` (1-based; for a JSON array the line where the row begins, or its index + 1 when only that is
    known) lead back to the row.
    """

    messages: tuple[Message, ...]
    kind: Literal["instruction", "chat", "text", "labelled"]
    file: str
    line: int


def instruction(prompt: str, context: str, response: str, *, file: str = "", line: int = 0) -> Conversation:
    """The alpaca row ``{instruction: prompt, input: context, output: response}``."""
    return Conversation((Message("user", prompt, context), Message("assistant", response)), "instruction", file, line)


def labelled(text: str, label: str, *, file: str = "", line: int = 0) -> Conversation:
    """A text to classify and its label."""
    return Conversation((Message("user", text), Message("assistant", label)), "labelled", file, line)
