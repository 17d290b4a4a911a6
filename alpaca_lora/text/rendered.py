"""What a template makes of a conversation: one text, which of it the row brought, which of it is to be learned.

Knows nothing of tokens; `text/tokenizer.py` reads it, `text/templates.py` and `text/chat_template.py` write it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from alpaca_lora.errors import DataError, UserError
from alpaca_lora.text.messages import Conversation


@dataclass(frozen=True, slots=True)
class Span:
    """Characters ``start`` to ``end`` (exclusive) of `Rendered.text`."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Rendered:
    """One text ready to be tokenized.

    text: ends with the last response (training) or where the assistant begins (generation).
    user_spans: what came from the row, in order: special-token strings in it are plain text.
    responses: one per assistant turn, with the end-of-turn marker of a chat template.
    special: text outside of user_spans may hold special tokens (chat templates).
    needs_eos: the text does not end the turn itself; EOS is to be appended to the ids.
    """

    text: str
    user_spans: tuple[Span, ...]
    responses: tuple[Span, ...]
    special: bool
    needs_eos: bool


class Template(Protocol):
    """``source``: where it came from. ``digest``: sha256 of its content. ``stop_tokens``: they end a turn."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def stop_tokens(self) -> tuple[str, ...]: ...

    def render(self, conversation: Conversation, *, system_prompt: str | None = None) -> Rendered:
        """All turns, for training. Raises DataError with the row's file and line when the turns do not fit."""
        ...

    def render_prompt(self, conversation: Conversation, *, system_prompt: str | None = None) -> Rendered:
        """All turns and the opening of the assistant's answer, for generation; ``responses`` is empty."""
        ...

    def to_record(self) -> dict[str, Any]:
        """JSON from which `template_from_record` rebuilds the same template."""
        ...


def render_plain(conversation: Conversation, *, prompt: bool = False) -> Rendered:
    """A row of kind ``text``: no template; in training all of it is the response, and EOS ends it."""
    text = "".join(message.content for message in conversation.messages)
    span = (Span(0, len(text)),)
    return Rendered(text, span, () if prompt else span, special=False, needs_eos=not prompt)


def turn_error(conversation: Conversation, number: int, what: str) -> DataError:
    """The error of turn ``number`` (1-based) of a row."""
    return DataError(
        f"turn {number} {what}", file=conversation.file or None, line=conversation.line or None, field="messages",
        expected="user and assistant in turns, the assistant last",
    )  # fmt: skip


def answered_already() -> UserError:
    """The error of a prompt that ends with an answer."""
    return UserError("the last turn is the assistant's already", expected="a conversation that waits for an answer")
