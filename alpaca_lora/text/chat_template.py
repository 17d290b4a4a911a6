"""The model's own chat template: renders turns, and finds in the rendered text what came from the row.

The template is somebody else's program; `text/sandbox.py` runs it. Spans are found by rendering the same roles once
with placeholders: the text between them is the template's, and the real text must be exactly that text with the row's
words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from alpaca_lora.errors import DataError, ModelFileError
from alpaca_lora.text.messages import TOOL_PREFIX, Conversation, Message
from alpaca_lora.text.rendered import Rendered, Span, answered_already, render_plain, turn_error
from alpaca_lora.text.sandbox import Sandbox
from alpaca_lora.text.tokenizer import Tokenizer

# private-use characters: a placeholder is 0xE000 number 0xE001, a mark begins and ends like it with the next ones
_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
_MARK = re.compile("[\ue002\ue004](\\d+)[\ue003\ue005]")


class _Turn(NamedTuple):
    """One message as the template sees it."""

    role: str
    content: str


class _Skeleton(NamedTuple):
    """``literals[0] turn[order[0]] literals[1] turn[order[1]] ... literals[-1]`` is the rendered text."""

    literals: tuple[str, ...]
    order: tuple[int, ...]


class ChatTemplate:
    """A Jinja chat template with the tokens of its model.

    A user turn's ``input`` follows its instruction after a blank line. Where the template knows no system role, the
    system message stands in front of the first user turn; where it knows no tools, a tool's turn is a user's with a
    prefix. A system message of the row itself goes before the option's.
    A response is the assistant's text and the end-of-turn token after it; it begins where a generation would begin.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, *, source: str, name: str = "chat") -> None:
        self.name, self.source, self.text = name, source, text
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self._sandbox = Sandbox()
        self._variables = tokenizer.special_strings()
        self._skeletons: dict[tuple[tuple[str, ...], bool], _Skeleton] = {}
        try:
            self._compiled = self._sandbox.compile_source(text)
            self._probe(tokenizer)
        except TemplateError as error:
            raise ModelFileError(
                f"cannot be used: {error.message}", file=source, field="chat_template",
                fix="choose another template with --prompt_template_name",
            ) from error  # fmt: skip

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        return () if self.end_of_turn is None else (self.end_of_turn,)

    def render(self, conversation: Conversation, *, system_prompt: str | None = None) -> Rendered:
        if conversation.kind == "text":
            return render_plain(conversation)
        if conversation.messages[-1].role != "assistant":
            raise turn_error(conversation, len(conversation.messages), "is not the assistant's: nothing to learn")
        turns = self._turns(conversation, system_prompt)
        text, spans = self._place(turns, conversation, generate=False)
        responses = [
            self._response(text, span) for turn, span in zip(turns, spans, strict=True) if turn.role == "assistant"
        ]
        end = responses[-1].end
        return Rendered(text[:end], _in_order(spans), tuple(responses), special=True, needs_eos=end == spans[-1].end)

    def render_prompt(self, conversation: Conversation, *, system_prompt: str | None = None) -> Rendered:
        if conversation.kind == "text":
            return render_plain(conversation, prompt=True)
        if conversation.messages[-1].role == "assistant":
            raise answered_already()
        turns = self._turns(conversation, system_prompt)
        if self._opening is None:
            opened = [*turns, _Turn("assistant", _placeholder(len(turns)))]
            text, spans = self._place(opened, conversation, generate=False)
            return Rendered(text[: spans[-1].start], _in_order(spans[:-1]), (), special=True, needs_eos=False)
        text, spans = self._place(turns, conversation, generate=True)
        return Rendered(text + self._opening, _in_order(spans), (), special=True, needs_eos=False)

    def render_text(self, messages: Sequence[dict[str, Any]], *, generate: bool = False) -> str:
        """What the template itself makes of messages, unchanged. Raises TemplateError."""
        return self._sandbox.render(
            self._compiled, messages=list(messages), add_generation_prompt=generate, tools=None, documents=None,
            **self._variables,
        )  # fmt: skip

    def to_record(self) -> dict[str, Any]:
        return {
            "kind": "chat", "name": self.name, "source": self.source, "sha256": self.digest, "chat_template": self.text,
        }  # fmt: skip

    # --- what the template does, learned from it once ---

    def _probe(self, tokenizer: Tokenizer) -> None:
        full = self._skeleton(("user", "assistant"), generate=False)
        before = full.literals[0] + _placeholder(0) + full.literals[1]
        opened = self.render_text([{"role": "user", "content": _placeholder(0)}], generate=True)
        gap = before[len(opened) :] if before.startswith(opened) else None
        # white space after the opening belongs to the answer; other text has to be written before the answer begins
        self._lead = gap if gap is not None and not gap.strip() else ""
        self._opening = gap if gap is None or gap.strip() else ""
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        found = re.match(rf"\s*({'|'.join(map(re.escape, names))})", full.literals[2]) if names else None
        self.end_of_turn: str | None = found.group(1) if found else None
        self._end = re.compile(rf"\s*{re.escape(found.group(1))}") if found else None
        self._knows_system = self._knows(("system", "user", "assistant"))
        self._knows_tools = self._knows(("user", "assistant", "tool", "assistant"))

    def _knows(self, roles: tuple[str, ...]) -> bool:
        try:
            self._skeleton(roles, generate=False)
        except TemplateError:
            return False
        return True

    def _skeleton(self, roles: tuple[str, ...], *, generate: bool) -> _Skeleton:
        key = (roles, generate)
        if key not in self._skeletons:
            messages = [{"role": role, "content": _placeholder(i)} for i, role in enumerate(roles)]
            parts = _PLACEHOLDER.split(self.render_text(messages, generate=generate))
            order = tuple(int(number) for number in parts[1::2])
            if sorted(order) != list(range(len(roles))):
                wrong = next(i for i in range(len(roles)) if order.count(i) != 1)
                raise TemplateError(f"it writes turn {wrong + 1} ({roles[wrong]}) {order.count(wrong)} times, not once")
            self._skeletons[key] = _Skeleton(tuple(parts[::2]), order)
        return self._skeletons[key]

    # --- one row ---

    def _turns(self, conversation: Conversation, system_prompt: str | None) -> list[_Turn]:
        messages = conversation.messages
        if system_prompt and not any(m.role == "system" for m in messages):
            messages = (Message("system", system_prompt), *messages)
        turns: list[_Turn] = []
        waiting = ""  # a system message for the next user turn
        for message in messages:
            role, content = message.role, message.content
            if role == "system" and not content:
                continue
            if role == "system" and not self._knows_system:
                waiting += f"{content}\n\n"
                continue
            if role == "tool" and not self._knows_tools:
                role, content = "user", TOOL_PREFIX + content
            if message.context:
                content = f"{content}\n\n{message.context}"
            if role == "user" and waiting:
                content, waiting = waiting + content, ""
            turns.append(_Turn(role, content))
        return turns

    def _place(self, turns: Sequence[_Turn], conversation: Conversation, *, generate: bool) -> tuple[str, list[Span]]:
        """The rendered text and the span of each turn's content in it."""
        try:
            messages = [{"role": turn.role, "content": turn.content} for turn in turns]
            text = self.render_text(messages, generate=generate)
            skeleton = self._skeleton(tuple(turn.role for turn in turns), generate=generate)
            spans = _fit(text, skeleton, turns) or self._marked(text, turns, generate=generate)
        except TemplateError as error:
            raise DataError(
                f"the chat template refuses the row: {error.message}", file=conversation.file or None,
                line=conversation.line or None, field="messages",
            ) from error  # fmt: skip
        if spans is None:
            raise DataError(
                "the chat template changes the text of a turn, so what to learn cannot be found in it",
                file=conversation.file or None, line=conversation.line or None, field="messages",
                fix="choose another template with --prompt_template_name",
            )  # fmt: skip
        return text, spans

    def _marked(self, text: str, turns: Sequence[_Turn], *, generate: bool) -> list[Span] | None:
        """For templates that look into the content: render with marks around each content and take them out again."""
        if any("\ue002" <= char <= "\ue005" for turn in turns for char in turn.content):
            return None
        messages = []
        for number, (role, content) in enumerate(turns):
            core = content.strip()
            head, tail = content[: content.find(core)], content[content.find(core) + len(core) :]
            marked = f"{head}\ue002{number}\ue003{core}\ue004{number}\ue005{tail}"
            messages.append({"role": role, "content": marked})
        parts = _MARK.split(self.render_text(messages, generate=generate))
        if "".join(parts[::2]) != text or sorted(parts[1::2]) != sorted(
            str(i) for i in range(len(turns)) for _ in "be"
        ):
            return None
        edges: dict[int, list[int]] = {}
        at = 0
        for literal, number in zip(parts[::2], parts[1::2], strict=False):
            at += len(literal)
            edges.setdefault(int(number), []).append(at)
        return [_widened(text, Span(*edges[number]), turn.content) for number, turn in enumerate(turns)]

    def _response(self, text: str, span: Span) -> Span:
        start = span.start - len(self._lead) if text.endswith(self._lead, 0, span.start) else span.start
        end = self._end.match(text, span.end) if self._end is not None else None
        return Span(start, span.end if end is None else end.end())


def _placeholder(number: int) -> str:
    return f"\ue000{number}\ue001"


def _in_order(spans: Sequence[Span]) -> tuple[Span, ...]:
    return tuple(sorted((span for span in spans if len(span)), key=lambda span: span.start))


def _fit(text: str, skeleton: _Skeleton, turns: Sequence[_Turn]) -> list[Span] | None:
    """Where each content stands, if ``text`` is the skeleton with the contents, as they are or stripped."""
    at = len(skeleton.literals[0])
    if not text.startswith(skeleton.literals[0]):
        return None
    spans: dict[int, Span] = {}
    for number, literal in zip(skeleton.order, skeleton.literals[1:], strict=True):
        content = turns[number].content
        for form in (content, content.strip(), content.rstrip(), content.lstrip(), content.strip("\n")):
            if text.startswith(form, at) and text.startswith(literal, at + len(form)):
                spans[number] = Span(at, at + len(form))
                at += len(form) + len(literal)
                break
        else:
            return None
    return [spans[number] for number in range(len(turns))] if at == len(text) else None


def _widened(text: str, core: Span, content: str) -> Span:
    """The span with the white space around the content that the template kept."""
    stripped = content.strip()
    head, tail = content[: content.find(stripped)], content[content.find(stripped) + len(stripped) :]
    start = core.start - len(head) if text.endswith(head, 0, core.start) else core.start
    return Span(start, core.end + len(tail) if text.startswith(tail, core.end) else core.end)
