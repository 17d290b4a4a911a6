"""The chat's turns, commands and interruptions, with a function in the model's place."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console

from alpaca_lora.commands.chat import Chat
from alpaca_lora.errors import DataError, UserError
from alpaca_lora.text.messages import Conversation


class Talk:
    """A chat whose answers are `re: <question>`; keeps every conversation that was asked."""

    def __init__(self, *, interactive: bool = False, max_turns: int = 100) -> None:
        self.asked: list[list[str]] = []
        self.console = Console(file=io.StringIO(), width=200)
        self.max_messages = 2 * max_turns - 1
        self.chat = Chat(
            self.answer, lambda c: len(c.messages) <= self.max_messages, self.console,
            interactive=interactive, interrupted=lambda: "half an ans",
        )  # fmt: skip

    def answer(self, conversation: Conversation) -> str:
        self.asked.append([message.content for message in conversation.messages])
        question = conversation.messages[-1].content
        if question == "stop me":
            raise KeyboardInterrupt
        if question == "too long":
            raise UserError("has 9999 tokens")
        return f"re: {question}"

    def says(self) -> str:
        return self.console.file.getvalue()  # pyright: ignore


def test_lines_are_turns_of_one_conversation() -> None:
    talk = Talk()
    talk.chat.run(io.StringIO("one\n\n  two  \n"))
    assert talk.asked == [["one"], ["one", "re: one", "two"]]


def test_reset_quit_help_and_unknown_commands() -> None:
    talk = Talk()
    talk.chat.run(io.StringIO("one\n/reset\n/help\n/rest\n/etc/hosts is what?\n/quit\nnever\n"))
    assert talk.asked == [["one"], ["/etc/hosts is what?"]]
    assert "unknown command /rest" in talk.says() and "/reset   forget" in talk.says()


def test_the_oldest_turns_are_forgotten_aloud_when_the_context_is_full() -> None:
    talk = Talk(max_turns=2)
    talk.chat.run(io.StringIO("one\ntwo\nthree\nfour\n"))
    assert talk.asked[2:] == [["two", "re: two", "three"], ["three", "re: three", "four"]]
    assert talk.says().count("forgotten") == 2


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Any]], None]:
    """What the user types: lines, or exceptions for Ctrl-C and Ctrl-D."""

    def type_(keys: list[Any]) -> None:
        waiting: Iterator[Any] = iter(keys)

        def read(*_: object, **__: object) -> str:
            key = next(waiting)
            if isinstance(key, type):
                raise key
            return key

        monkeypatch.setattr(Console, "input", read)

    return type_


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(keyboard: Callable[[list[Any]], None]) -> None:
    talk = Talk(interactive=True)
    keyboard(["stop me", "go on", KeyboardInterrupt, "and on", EOFError])
    talk.chat.run(io.StringIO())
    assert talk.asked[1] == ["stop me", "half an ans", "go on"]
    assert talk.asked[2][-1] == "and on"
    assert "Ctrl-D or /quit leaves" in talk.says()


def test_an_error_does_not_end_the_chat_but_ends_a_script(keyboard: Callable[[list[Any]], None]) -> None:
    talk = Talk(interactive=True)
    keyboard(["too long", "short", EOFError])
    talk.chat.run(io.StringIO())
    assert talk.asked[1] == ["short"] and "9999" in talk.says()
    with pytest.raises(UserError, match="9999"):
        Talk().chat.run(io.StringIO("too long\n"))


def test_ctrl_c_ends_a_script() -> None:
    with pytest.raises(KeyboardInterrupt):
        Talk().chat.run(io.StringIO("stop me\n"))


def test_a_line_that_is_not_utf8_is_named_and_those_before_it_are_answered() -> None:
    talk = Talk()
    with pytest.raises(DataError, match=r"standard input:3: byte 10 \(0xe9\) is not UTF-8, near 'caf"):
        talk.chat.run(io.TextIOWrapper(io.BytesIO(b"one\n\xc3\xa9\ncaf\xe9\nfour\n"), encoding="latin-1"))
    assert talk.asked == [["one"], ["one", "re: one", "é"]]


def test_bytes_typed_that_are_no_text_do_not_end_the_chat(keyboard: Callable[[list[Any]], None]) -> None:
    class NotText(UnicodeDecodeError):
        def __init__(self) -> None:
            super().__init__("utf-8", b"\xe9", 0, 1, "invalid")

    talk = Talk(interactive=True)
    keyboard([NotText, "go on", EOFError])
    talk.chat.run(io.StringIO())
    assert talk.asked == [["go on"]] and "error: that was not utf-8" in talk.says()
