"""Rows that hold a list of turns: OpenAI's ``messages`` and ShareGPT's ``conversations``. Knows roles and the order
they may have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from alpaca_lora.errors import DataError, nearest
from alpaca_lora.text.messages import Conversation, Message, Role

ROLES: Mapping[str, Role] = MappingProxyType(
    {
        "system": "system",
        "developer": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "bing": "assistant",
        "assistant": "assistant",
        "model": "assistant",
        "function_call": "assistant",  # the turn's text is the call
        "observation": "tool",
        "tool": "tool",
        "function": "tool",
    }
)
TURN_FIELDS = ("role", "from", "content", "value", "tool_calls", "function_call", "weight")
_FOLLOWS: Mapping[Role | None, tuple[Role, ...]] = MappingProxyType(
    {
        None: ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("assistant", "tool"),
    }
)


def messages_row(row: dict[str, Any], file: str, line: int) -> Conversation:
    """OpenAI: ``{messages: [{role, content}, ...]}``; an assistant's ``tool_calls`` stand behind its text."""
    return _conversation(row, "messages", file, line)


def sharegpt_row(row: dict[str, Any], file: str, line: int) -> Conversation:
    """ShareGPT: ``{conversations: [{from, value}, ...]}``, with ``system`` beside it or as the first turn."""
    return _conversation(row, "conversations" if "conversations" in row else "conversation", file, line)


def unread_turn_fields(row: dict[str, Any], fields: tuple[str, ...]) -> Iterator[str]:
    """``messages[].name`` and alike for each field of a turn that is not read; ``fields``: the row's that are."""
    for field in fields:
        turns = row.get(field)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                yield from (f"{field}[].{key}" for key in turn if key not in TURN_FIELDS)


def _conversation(row: dict[str, Any], field: str, file: str, line: int) -> Conversation:
    turns = row.get(field)
    if not isinstance(turns, list) or not turns:
        what = "is missing" if field not in row else "is an empty list" if turns == [] else "is not a list"
        raise DataError(what, file=file, line=line, field=field, expected="a list of turns")
    messages = [_message(turn, f"{field}[{index}]", file, line) for index, turn in enumerate(turns)]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0].role != "system":
        messages.insert(0, Message("system", system))
        _check_order(messages, field, file, line, first=-1)
    else:
        _check_order(messages, field, file, line, first=0)
    return Conversation(tuple(messages), "chat", file, line)


def _message(turn: Any, where: str, file: str, line: int) -> Message:
    if not isinstance(turn, dict):
        raise DataError(
            "is not an object", file=file, line=line, field=where, expected="a turn with a role and its text"
        )
    role_field = "role" if "role" in turn else "from"
    name = turn.get(role_field)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        hint = nearest(str(name), ROLES)
        raise DataError(
            "has no role" if role_field not in turn else f"the role {name!r} is not known",
            file=file,
            line=line,
            field=f"{where}.{role_field}",
            expected="system, user, assistant or tool",
            fix=f"did you mean {hint[0]!r}?" if hint else None,
        )
    weight = turn.get("weight")
    if weight is not None and weight != 1:
        raise DataError(
            f"weight {str(weight)[:60]} is not supported",
            file=file,
            line=line,
            field=f"{where}.weight",
            expected="1",
            fix="remove the row or the field",
        )
    text = _content(turn, role, where, file, line)
    if role == "assistant" and not text.strip():
        raise DataError(
            "the assistant says nothing", file=file, line=line, field=where, fix="remove the turn or the row"
        )
    return Message(role, text)


def _content(turn: dict[str, Any], role: Role, where: str, file: str, line: int) -> str:
    field = "content" if "content" in turn else "value"
    value = turn.get(field)
    calls = turn.get("tool_calls") or turn.get("function_call")
    called = json.dumps(calls, ensure_ascii=False) if role == "assistant" and calls else ""
    text = None
    if isinstance(value, str):
        text = value
    elif isinstance(value, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        text = "".join(part["text"] for part in value)  # OpenAI's content parts, when all of them are text
    if called and (not value or (text is not None and not text.strip())):
        return called
    if text is not None:
        return f"{text}\n{called}" if called else text
    what = "is missing" if field not in turn else "is null" if value is None else "is not text"
    raise DataError(what, file=file, line=line, field=f"{where}.{field}", expected="text")


def _check_order(messages: list[Message], field: str, file: str, line: int, *, first: int) -> None:
    before: Role | None = None
    for index, message in enumerate(messages, first):
        if message.role not in _FOLLOWS[before]:
            what = (
                "a system turn comes late"
                if message.role == "system"
                else f"{_with_article(message.role)} turn follows {_with_article(before)} turn"
                if before
                else f"the first turn is {_with_article(message.role)}'s"
            )
            expected = " or ".join(_FOLLOWS[before])
            raise DataError(what, file=file, line=line, field=f"{field}[{index}]", expected=expected)
        before = message.role
    if all(message.role != "assistant" for message in messages):
        raise DataError("no turn is the assistant's", file=file, line=line, field=field, expected="something to learn")


def _with_article(role: Role) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"
