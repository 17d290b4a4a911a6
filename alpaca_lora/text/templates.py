"""The instruction templates, the table of their names, and the choice between them and the model's chat template.

Knows text, not tokens. An instruction template is two strings with slots; several turns stand one after the other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from alpaca_lora.errors import AdapterError, ConfigError, nearest
from alpaca_lora.text.chat_template import ChatTemplate
from alpaca_lora.text.messages import TOOL_PREFIX, Conversation, Message
from alpaca_lora.text.rendered import Rendered, Span, Template, answered_already, render_plain, turn_error
from alpaca_lora.text.template_file import read_template_file
from alpaca_lora.text.tokenizer import Tokenizer

__all__ = [
    "INSTRUCTION_TEMPLATES", "InstructionTemplate", "Rendered", "Span", "Template", "load_template",
    "template_from_record",
]  # fmt: skip

_BETWEEN_TURNS = "\n\n"


class _Part(NamedTuple):
    """Literal text, then a slot (or none at the end)."""

    literal: str
    slot: str | None


@dataclass(frozen=True)
class InstructionTemplate:
    """Preamble and blocks of the alpaca format; the answer follows the prompt directly, and EOS ends it.

    Slots are ``{instruction}`` and ``{input}`` as in Python's format strings (``{{`` is a brace). A system message (the
    row's own goes before the option's) stands as a paragraph of its own in front of the preamble. Later turns repeat
    the blocks without the preamble, one blank line after the answer before them. The preamble is the text up to the
    first blank line, where more text (a heading) follows before the first slot. A row without input takes
    ``prompt_no_input``. ``response_split`` is recorded and not used.
    """

    name: str
    prompt_input: str
    prompt_no_input: str
    response_split: str
    description: str = ""
    source: str = "built in"
    stop_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field, slots in (("prompt_input", {"instruction", "input"}), ("prompt_no_input", {"instruction"})):
            self._check_slots(field, slots)

    def _check_slots(self, field: str, wanted: set[str]) -> None:
        try:
            found = {slot for _, slot, spec, conversion in Formatter().parse(getattr(self, field)) if slot is not None}
        except ValueError as error:
            raise ConfigError(
                str(error), file=self.source, field=field, fix="write {{ and }} for braces that are no slots"
            ) from error
        if found != wanted:
            names = ", ".join(f"{{{slot}}}" for slot in sorted(found)) or "none"
            raise ConfigError(
                f"has the slots {names}", file=self.source, field=field,
                expected=" and ".join(f"{{{slot}}}" for slot in sorted(wanted, reverse=True)),
            )  # fmt: skip

    @property
    def digest(self) -> str:
        """sha256 over both prompts, in hexadecimal."""
        return hashlib.sha256(json.dumps([self.prompt_input, self.prompt_no_input]).encode()).hexdigest()

    def render(self, conversation: Conversation, *, system_prompt: str | None = None) -> Rendered:
        if conversation.kind == "text":
            return render_plain(conversation)
        if conversation.messages[-1].role != "assistant":
            raise turn_error(
                conversation, len(conversation.messages), "is not the assistant's, so nothing can be learned"
            )
        writer = self._write(conversation, system_prompt)
        return Rendered(
            "".join(writer.parts), tuple(writer.user), tuple(writer.responses), special=False, needs_eos=True
        )

    def render_prompt(self, conversation: Conversation, *, system_prompt: str | None = None) -> Rendered:
        if conversation.kind == "text":
            return render_plain(conversation, prompt=True)
        if conversation.messages[-1].role == "assistant":
            raise answered_already()
        writer = self._write(conversation, system_prompt)
        return Rendered("".join(writer.parts), tuple(writer.user), (), special=False, needs_eos=False)

    def to_record(self) -> dict[str, Any]:
        return {
            "kind": "instruction", "name": self.name, "source": self.source, "sha256": self.digest,
            "description": self.description, "prompt_input": self.prompt_input, "prompt_no_input": self.prompt_no_input,
            "response_split": self.response_split,
        }  # fmt: skip

    def _write(self, conversation: Conversation, system_prompt: str | None) -> _Writer:
        writer = _Writer()
        messages = conversation.messages
        if system_prompt and not any(m.role == "system" for m in messages):
            messages = (Message("system", system_prompt), *messages)
        first_block, waiting = True, False
        for number, message in enumerate(messages, start=1):
            if message.role == "assistant":
                if not waiting:
                    raise turn_error(conversation, number, "is an assistant's without a user's before it")
                writer.response(message.content)
                waiting = False
                continue
            if writer.length:
                writer.literal(_BETWEEN_TURNS)
            if message.role == "system":
                writer.user_text(message.content)
                continue
            prefix = TOOL_PREFIX if message.role == "tool" else ""
            for part in self._blocks(has_input=bool(message.context), preamble=first_block):
                writer.literal(part.literal)
                if part.slot == "instruction":
                    writer.literal(prefix)
                    writer.user_text(message.content)
                elif part.slot == "input":
                    writer.user_text(message.context)
            first_block, waiting = False, True
        return writer

    def _blocks(self, *, has_input: bool, preamble: bool) -> list[_Part]:
        prompt = self.prompt_input if has_input else self.prompt_no_input
        parts = [_Part(literal, slot) for literal, slot, _, _ in Formatter().parse(prompt)]
        if preamble:
            return parts
        first = next(number for number, part in enumerate(parts) if part.slot is not None)
        lead = "".join(part.literal for part in parts[: first + 1])  # an escaped brace cuts a literal in two
        return [_Part(_without_preamble(lead), parts[first].slot), *parts[first + 1 :]]


def _without_preamble(lead: str) -> str:
    """The text before the first slot from its heading on; the heading may have a blank line of its own after it."""
    if "\n\n" not in lead:
        return lead
    lead = lead.lstrip("\n")
    heading = lead.partition("\n\n")[2].lstrip("\n")
    return heading if heading.strip() else lead


class _Writer:
    """Text under construction, with the spans that are the row's and those that are answers."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.user: list[Span] = []
        self.responses: list[Span] = []
        self.length = 0

    def literal(self, text: str) -> None:
        self.parts.append(text)
        self.length += len(text)

    def user_text(self, text: str) -> None:
        start = self.length
        self.literal(text)
        if text:
            self.user.append(Span(start, self.length))

    def response(self, text: str) -> None:
        start = self.length
        self.user_text(text)
        self.responses.append(Span(start, self.length))


def _alpaca_like(name: str, description: str, preambles: tuple[str, str], headings: tuple[str, str, str], end: str):
    """The alpaca layout: preamble, blank line, then blocks of heading, newline, text."""
    instruction, context, response = headings
    with_input, without = (f"{text}\n\n" if text else "" for text in preambles)
    return InstructionTemplate(
        name,
        f"{with_input}{instruction}\n{{instruction}}\n\n{context}\n{{input}}\n\n{response}{end}",
        f"{without}{instruction}\n{{instruction}}\n\n{response}{end}",
        response_split=response, description=description,
    )  # fmt: skip


# format constants: byte for byte what published adapters were trained with; a test holds their hashes
_ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
)
_VIGOGNE = (
    "Ci-dessous se trouve une instruction qui décrit une tâche, associée à une entrée qui fournit un contexte "
    "supplémentaire. Écrivez une réponse qui complète correctement la demande.",
    "Ci-dessous se trouve une instruction qui décrit une tâche. "
    "Écrivez une réponse qui complète correctement la demande.",
)
_ALPACA_ZH = (
    "以下是一条描述任务的指令，并附有提供更多背景的输入。请写出恰当完成该请求的回答。",
    "以下是一条描述任务的指令。请写出恰当完成该请求的回答。",
)
_ENGLISH = ("### Instruction:", "### Input:", "### Response:")
INSTRUCTION_TEMPLATES: Mapping[str, InstructionTemplate] = {
    template.name: template
    for template in (
        _alpaca_like("alpaca", "The format of Alpaca-LoRA.", _ALPACA, _ENGLISH, "\n"),
        _alpaca_like("alpaca_short", "alpaca without a preamble.", ("", ""), _ENGLISH, "\n"),
        _alpaca_like("alpaca_legacy", "Stanford Alpaca: no newline before the answer.", _ALPACA, _ENGLISH, ""),
        _alpaca_like(
            "vigogne", "alpaca in French.", _VIGOGNE, ("### Instruction:", "### Entrée:", "### Réponse:"), "\n"
        ),
        _alpaca_like("alpaca_zh", "alpaca in Chinese.", _ALPACA_ZH, ("### 指令:", "### 输入:", "### 回答:"), "\n"),
    )
}


def load_template(name: str | None, tokenizer: Tokenizer) -> Template:
    """The template of that name, of that file, or by default ``chat`` where the model brings one and else ``alpaca``.

    Raises ConfigError for an unknown name and for ``chat`` when the model brings no chat template.
    """
    if name is None:
        name = "chat" if tokenizer.chat_template else "alpaca"
    if name == "chat":
        if not tokenizer.chat_template:
            raise ConfigError(
                "the model brings no chat template", field="prompt_template_name",
                expected=f"one of {', '.join(INSTRUCTION_TEMPLATES)}, or a template file",
            )  # fmt: skip
        return ChatTemplate(tokenizer.chat_template, tokenizer, source=tokenizer.source)
    if name in INSTRUCTION_TEMPLATES:
        return INSTRUCTION_TEMPLATES[name]
    path = Path(name)
    if path.suffix in (".json", ".yaml", ".yml", ".jinja") or os.path.isfile(path):
        return _from_file(path, tokenizer)
    hint = nearest(name, (*INSTRUCTION_TEMPLATES, "chat"))
    raise ConfigError(
        f"unknown template {name!r}", field="prompt_template_name",
        expected=f"one of {', '.join(INSTRUCTION_TEMPLATES)}, chat, or a template file",
        fix=f"did you mean {hint[0]!r}?" if hint else None,
    )  # fmt: skip


def _from_file(path: Path, tokenizer: Tokenizer) -> Template:
    if path.suffix == ".jinja":
        return ChatTemplate(read_template_file(path)["chat_template"], tokenizer, source=str(path), name=path.stem)
    content = read_template_file(path)
    return InstructionTemplate(
        path.stem, content["prompt_input"], content["prompt_no_input"], content["response_split"],
        content.get("description", ""), source=str(path),
    )  # fmt: skip


def template_from_record(
    record: dict[str, Any], tokenizer: Tokenizer, *, file: str | os.PathLike[str] | None = None
) -> Template:
    """The template that `to_record` described. AdapterError, naming ``file``, when the record is not one or was
    changed.
    """
    again = "take the adapter from its source again"
    for key, value in record.items():
        if not isinstance(value, str):
            raise AdapterError(f"is {value!r}", file=file, field=f"template.{key}", expected="text", fix=again)
    try:
        kind = record["kind"]
        if kind == "instruction":
            template: Template = InstructionTemplate(
                record["name"], record["prompt_input"], record["prompt_no_input"], record["response_split"],
                record.get("description", ""), source=record["source"],
            )  # fmt: skip
            digest = template.digest
        elif kind == "chat":
            digest = hashlib.sha256(record["chat_template"].encode()).hexdigest()
        else:
            raise AdapterError(
                f"unknown kind {kind!r}", file=file, field="template.kind", expected="instruction or chat"
            )
        if digest != record["sha256"]:
            raise AdapterError("does not match its sha256", file=file, field="template", fix=again)
        if kind == "chat":  # a program: compiled and tried only when it is the one that was saved
            template = ChatTemplate(record["chat_template"], tokenizer, source=record["source"], name=record["name"])
    except KeyError as error:
        raise AdapterError(f"lacks {error}", file=file, field="template", fix=again) from error
    return template
