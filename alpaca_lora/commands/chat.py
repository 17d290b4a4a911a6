"""The chat of `generate`: turns, history, commands, interruption. Knows no model: a function that answers is given."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console

from alpaca_lora.commands.input_lines import waiting_lines
from alpaca_lora.errors import DataError, UserError
from alpaca_lora.text.messages import Conversation, Message

HELP = """\
/reset   forget the conversation
/help    this text
/quit    leave, as Ctrl-D does
Ctrl-C   stop the answer"""


class Chat:
    """Several turns about one thing.

    answer: writes the answer of a conversation and returns its text. fits: whether a conversation leaves room for an
    answer; the oldest turns are dropped, and it is said, until it does. interrupted: the text of an answer that Ctrl-C
    stopped.
    """

    def __init__(
        self, answer: Callable[[Conversation], str], fits: Callable[[Conversation], bool], console: Console,
        *, interactive: bool, interrupted: Callable[[], str],
    ) -> None:  # fmt: skip
        self._answer, self._fits, self._console = answer, fits, console
        self._interactive, self._interrupted = interactive, interrupted
        self.history: list[Message] = []

    def run(self, lines: TextIO) -> None:
        """Until /quit or the end of the input. DataError for a line of a pipe that is not UTF-8."""
        if self._interactive:
            self._say("/help lists the commands, Ctrl-D leaves")
        waiting = itertools.chain.from_iterable(waiting_lines(lines))
        while (line := self._read(waiting)) is not None:
            text = line.strip()
            if text == "/quit":
                return
            if text == "/reset":
                self.history.clear()
                self._say("the conversation is forgotten")
            elif text == "/help":
                self._say(HELP)
            elif text.startswith("/") and text[1:].isalpha():
                self._say(f"unknown command {text}; /help lists the commands")
            elif text:
                self._turn(text)

    def _read(self, waiting: Iterator[str]) -> str | None:
        """The next line; None at the end."""
        if not self._interactive:
            return next(waiting, None)
        return typed_line(self._console, leave="Ctrl-D or /quit leaves")

    def _turn(self, text: str) -> None:
        self.history.append(Message("user", text))
        try:
            said = self._answer(self._conversation())
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            said = self._interrupted()
            self._console.print()
            self._say("stopped")
        except (UserError, DataError) as error:
            self.history.pop()
            if not self._interactive:
                raise
            self._say(f"error: {error}")
            return
        self.history.append(Message("assistant", said))

    def _conversation(self) -> Conversation:
        """The history, without its oldest turns where it has become too long."""
        dropped = 0
        while len(self.history) > 1 and not self._fits(self._as_conversation()):
            del self.history[:2]
            dropped += 1
        if dropped:
            self._say(f"the context is full: the {dropped} oldest turns are forgotten")
        return self._as_conversation()

    def _as_conversation(self) -> Conversation:
        kind = "instruction" if len(self.history) == 1 else "chat"
        return Conversation(tuple(self.history), kind, "chat", 0)

    def _say(self, text: str) -> None:
        _say(self._console, text)


def typed_line(console: Console, *, leave: str) -> str | None:
    """The next line of the terminal; None at its end. Ctrl-C, or bytes that are no text, give a new prompt: an empty
    line; ``leave``: what to say of Ctrl-C.
    """
    try:
        return console.input("[bold]> [/]")
    except EOFError:
        console.print()
        return None
    except KeyboardInterrupt:
        console.print()
        _say(console, leave)
    except UnicodeDecodeError as error:
        _say(console, f"error: that was not {error.encoding}")
    return ""


def _say(console: Console, text: str) -> None:
    console.print(text, style="dim", markup=False, highlight=False)
