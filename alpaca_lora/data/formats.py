"""A data file -> `Conversation`s. Knows the field names of every format; nothing of tokens, templates or cleaning.

| format     | a row                                                                    |
|------------|--------------------------------------------------------------------------|
| alpaca     | ``{instruction, input?, output}``                                        |
| messages   | ``{messages: [{role, content}, ...]}``                                   |
| sharegpt   | ``{conversations: [{from, value}, ...], system?}``                       |
| completion | ``{prompt, completion}``, and the like; ``{question, answer}``           |
| keys       | the fields that prompt_key, input_key and response_key name              |
| text       | a plain-text file, or ``{text}``: no template, all of it is learned      |

The first readable row of a file decides; JSON arrays and JSON lines are told apart by their first character.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpaca_lora.data.chats import messages_row, sharegpt_row, unread_turn_fields
from alpaca_lora.data.files import COMPRESSED_SUFFIXES, OnBytes, inner_suffix, read_chunks
from alpaca_lora.data.records import Record, not_utf8, read_json_lines, read_json_values, read_lines
from alpaca_lora.errors import DataError, nearest
from alpaca_lora.text.messages import Conversation, Message, instruction

TEXT_SUFFIXES = (".txt", ".md", ".text")
LINE_SUFFIXES = (".jsonl", ".ndjson")
TEXT_BLOCK = 1 << 20  # bytes of a plain-text file that make one row: bounds the memory of tokenizing it
FIELD_PAIRS = (  # (prompt, response) in the order they are looked for
    ("instruction", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("question", "answer"),
    ("query", "response"),
)
MAX_UNREAD = 12  # names of fields that are not read: bounds what is kept and told
_KNOWN = "instruction/output, messages, conversations, prompt/completion, question/answer or text"

RowReader = Callable[[dict[str, Any], str, int], Conversation]
OnNote = Callable[[str], None]  # something to tell the user about a file


@dataclass(frozen=True)
class Keys:
    """Explicit field names; None: detected. ``input`` may be missing from a row, the others may not."""

    prompt: str | None = None
    input: str | None = None
    response: str | None = None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not be read: what to tell, and its text (shortened) for the rejects file."""

    error: DataError
    line: int
    raw: str


def read_conversations(path: Path, keys: Keys | None = None, on_bytes: OnBytes | None = None) -> Iterator[Conversation]:
    """Every row of the file; raises the DataError of the first bad one."""
    for row in read_rows(path, keys, on_bytes):
        if isinstance(row, BadRow):
            raise row.error
        yield row


def read_rows(
    path: Path, keys: Keys | None = None, on_bytes: OnBytes | None = None, on_note: OnNote | None = None
) -> Iterator[Conversation | BadRow]:
    """Every row of the file, bad ones in place. Raises DataError where nothing more can be read: damaged compression,
    a broken JSON array, a file without rows, a format that is not known. Blank lines are not rows."""
    if inner_suffix(path) in TEXT_SUFFIXES:
        yield from _read_text(_filled(path, on_bytes)[1], path)
        return
    records = json_records(path, f"JSON, JSON lines, or text named {', '.join(TEXT_SUFFIXES)}", on_bytes)
    yield from _read_records(records, path, keys or Keys(), on_note)


def json_records(path: Path, expected: str, on_bytes: OnBytes | None = None) -> Iterator[Record]:
    """The file's JSON values, lines and arrays told apart by their beginning. Raises DataError for an empty file and
    for one that is no JSON; ``expected``: the formats, for its message.
    """
    first, chunks = _filled(path, on_bytes)
    opening = first.lstrip()[:1]
    if inner_suffix(path) in LINE_SUFFIXES or (opening == b"{" and _first_line_is_whole(first)):
        return read_json_lines(chunks, path)
    if opening in (b"[", b"{"):
        return read_json_values(chunks, path)
    start = first[:40].decode("utf-8", "replace")
    raise DataError(
        f"the format is not known, it begins {start!r}",
        file=path,
        line=1,
        expected=f"{expected}, each also {' or '.join(COMPRESSED_SUFFIXES)}",
    )


def _filled(path: Path, on_bytes: OnBytes | None) -> tuple[bytes, Iterator[bytes]]:
    """(the first chunk that is not blank, the chunks from it on); DataError for an empty file."""
    chunks = read_chunks(path, on_bytes)
    first = next(chunks, b"")
    if not first.strip():
        first = next((chunk for chunk in chunks if chunk.strip()), b"")
        if not first:
            raise DataError("the file is empty", file=path, expected="at least one row")
    return first, itertools.chain((first,), chunks)


def _first_line_is_whole(first: bytes) -> bool:
    """Whether the first line that is not blank closes its braces: then each line is a row of its own."""
    line = first.lstrip().split(b"\n", 1)[0].rstrip()
    return not line.endswith((b"{", b"[", b",", b":")) and line != b"{"


def _read_records(
    records: Iterator[Record], path: Path, keys: Keys, on_note: OnNote | None
) -> Iterator[Conversation | BadRow]:
    name, reader, fields, count = str(path), None, (), 0
    unread: dict[str, None] = {}  # a set in the order of the file
    for record in records:
        count += 1
        if record.error is not None:
            yield BadRow(record.error, record.line, record.raw)
            continue
        try:
            if not isinstance(record.value, dict):
                raise DataError(
                    f"the row is {kind_of(record.value)}",
                    file=name,
                    line=record.line,
                    expected="an object with named fields",
                )
            if reader is None:
                reader, fields = pick_reader(record.value, keys, name, record.line)
            conversation = reader(record.value, name, record.line)
            note_unread(record.value, fields, unread)
            yield conversation
        except DataError as error:
            yield BadRow(error, record.line, str(record.value))
    if not count:
        raise DataError("the file holds no rows", file=path, expected="at least one")
    if unread and on_note:
        on_note(f"of each row {', '.join(map(repr, fields))} are read, not {shown_fields(unread)}")


def shown_fields(names: Iterable[str]) -> str:
    """The first MAX_UNREAD of the names."""
    shown = [repr(name) for name in itertools.islice(names, MAX_UNREAD + 1)]
    return ", ".join(shown[:MAX_UNREAD]) + (" and more" if len(shown) > MAX_UNREAD else "")


def note_unread(row: dict[str, Any], fields: tuple[str, ...], unread: dict[str, None]) -> None:
    """Add the row's fields, and its turns', that are not read; one above MAX_UNREAD says that there are more."""
    turns = unread_turn_fields(row, fields) if "messages" in fields or "conversations" in fields else ()
    for field in itertools.chain((field for field in row if field not in fields), turns):
        if len(unread) > MAX_UNREAD:
            return
        unread[field[:60]] = None


def pick_reader(row: dict[str, Any], keys: Keys, file: str, line: int) -> tuple[RowReader, tuple[str, ...]]:
    """(how rows like this one are read, the fields that are). Raises DataError for fields that no format has."""
    if keys.prompt or keys.response:
        return _keyed(row, keys, file, line)
    if "messages" in row:
        return messages_row, ("messages", "system")
    if "conversations" in row or "conversation" in row:
        return sharegpt_row, ("conversations", "conversation", "system")
    for prompt, response in FIELD_PAIRS:
        if prompt in row and response in row:
            return _pair_reader(prompt, "input", response)
    if "text" in row:
        return _text_row, ("text",)
    for prompt, response in FIELD_PAIRS:  # one field of a pair is there: say which one is missing
        if prompt in row:
            raise DataError(
                "is missing",
                file=file,
                line=line,
                field=response,
                expected=f"text beside {prompt!r}",
                fix=f"or give response_key, one of {', '.join(map(repr, row))}",
            )
    fields = ", ".join(map(repr, list(row)[:12])) or "none"
    raise DataError(
        f"the fields are not known: {fields}",
        file=file,
        line=line,
        expected=_KNOWN,
        fix="or name them with prompt_key and response_key",
    )


def _keyed(row: dict[str, Any], keys: Keys, file: str, line: int) -> tuple[RowReader, tuple[str, ...]]:
    prompt = keys.prompt or next((p for p, _ in FIELD_PAIRS if p in row), "instruction")
    response = keys.response or next((r for _, r in FIELD_PAIRS if r in row), "output")
    for key, name in (("prompt_key", prompt), ("response_key", response)):
        if name not in row:
            alike = nearest(name, map(str, row))
            fix = f"did you mean {alike[0]!r}?" if alike else f"the row has {', '.join(map(repr, row))}"
            raise DataError(
                "is missing", file=file, line=line, field=name, expected=f"the field that {key} names", fix=fix
            )
    return _pair_reader(prompt, keys.input or "input", response)


def _pair_reader(prompt: str, context: str, response: str) -> tuple[RowReader, tuple[str, ...]]:
    def read(row: dict[str, Any], file: str, line: int) -> Conversation:
        given = text_field(row, context, file, line) if row.get(context) is not None else ""
        return instruction(
            text_field(row, prompt, file, line), given, text_field(row, response, file, line), file=file, line=line
        )

    return read, (prompt, context, response)


def _text_row(row: dict[str, Any], file: str, line: int) -> Conversation:
    return Conversation((Message("assistant", text_field(row, "text", file, line)),), "text", file, line)


def text_field(row: dict[str, Any], name: str, file: str, line: int, *, field: str | None = None) -> str:
    """``row[name]``, which must be text. Raises DataError naming ``field`` (default: the name)."""
    value = row.get(name)
    if isinstance(value, str):
        return value
    what = "is missing" if name not in row else f"is {kind_of(value)}"
    raise DataError(what, file=file, line=line, field=field or name, expected="text")


def kind_of(value: Any) -> str:
    """The JSON word for the value's type, with its article."""
    names = {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def _read_text(chunks: Iterator[bytes], path: Path) -> Iterator[Conversation | BadRow]:
    """Rows of about TEXT_BLOCK bytes that end at a line's end; encoding cuts them into pieces of cutoff_len tokens."""
    lines: list[str] = []
    size, first = 0, 1
    for number, offset, data in read_lines(chunks):
        if data is None:
            raise DataError("the line is too long for a text file", file=path, line=number, fix="break it into lines")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            yield BadRow(not_utf8(error, data, offset, path, number), number, data.decode("utf-8", "replace"))
            continue
        for start in range(0, len(text), TEXT_BLOCK) or (0,):
            if size and size + len(data) > TEXT_BLOCK:
                yield _block(lines, path, first)
                lines, size, first = [], 0, number
            piece = text[start : start + TEXT_BLOCK]
            lines.append(piece)
            size += len(piece) + 1
    if any(line.strip() for line in lines):
        yield _block(lines, path, first)


def _block(lines: list[str], path: Path, first: int) -> Conversation:
    return Conversation((Message("assistant", "\n".join(lines)),), "text", str(path), first)
