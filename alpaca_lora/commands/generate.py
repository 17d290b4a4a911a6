"""`alpaca-lora generate`: one answer to --prompt, or a chat in the terminal.

Puts base, adapter, template and engine together. The answer goes to standard output, everything about it to the
console (standard error).
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from alpaca_lora.adapters.peft_format import load_adapter
from alpaca_lora.adapters.record import RECORD_NAME, AdapterRecord, read_record
from alpaca_lora.commands.base_model import open_base, trained_for
from alpaca_lora.commands.chat import Chat
from alpaca_lora.commands.label import Labeller, label_texts
from alpaca_lora.commands.schemas import GenerateConfig
from alpaca_lora.config import Resolved
from alpaca_lora.device import pick_compute
from alpaca_lora.errors import UserError
from alpaca_lora.inference.engine import Engine
from alpaca_lora.inference.prompts import PromptFormat
from alpaca_lora.inference.request import Completion, SamplingParams
from alpaca_lora.models.load import Base
from alpaca_lora.quantization.qat import fold
from alpaca_lora.text.messages import Conversation, Message
from alpaca_lora.text.templates import load_template

# escape sequences of an answer must not steer the reader's terminal
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion and the seconds it took, prompt included, loading not."""

    completion: Completion
    seconds: float

    def to_json(self) -> dict[str, Any]:
        done = self.completion
        return {
            "text": done.text,
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": done.completion_tokens,
            "tokens_per_second": round(done.completion_tokens / max(self.seconds, 1e-9), 2),
            "finish_reason": done.finish_reason,
        }


class Speaker:
    """Asks the engine and writes the answer as it comes."""

    def __init__(self, engine: Engine, prompts: PromptFormat, params: SamplingParams, *, stream: bool) -> None:
        self.engine, self.prompts, self.params, self.stream = engine, prompts, params, stream
        self.partial = ""  # what the last answer has said so far; all there is of it when it was interrupted

    def answer(self, conversation: Conversation, out: TextIO) -> Answer:
        """Answer the conversation's last turn and write the text to `out`, with a newline at its end."""
        self.partial = ""
        request = self.prompts.request(conversation, self.params)
        completion, start = None, time.perf_counter()
        for event in self.engine.stream([request]):
            self.partial += event.text
            completion = event.completion
            if self.stream and event.text:
                out.write(_shown(event.text, out))
                out.flush()
        seconds = time.perf_counter() - start
        assert completion is not None
        out.write("\n" if self.stream else f"{_shown(completion.text, out)}\n")
        out.flush()
        return Answer(completion, seconds)

    def fits(self, conversation: Conversation) -> bool:
        """Whether the conversation leaves room for a full answer in the model's context."""
        num_tokens = len(self.prompts.prompt_ids(conversation))
        return num_tokens + self.params.max_new_tokens <= self.engine.context_length


def run(config: GenerateConfig, *, resolved: Resolved[GenerateConfig], console: Console) -> dict[str, Any]:
    """Returns the last answer as JSON: text prompt_tokens completion_tokens tokens_per_second finish_reason, or of a
    classifier what `label.label_texts` returns.
    """
    compute = pick_compute(config.device, config.dtype, config.num_threads)
    base = open_base(config, compute, lora_weights=config.lora_weights, say=lambda text: _note(console, text))
    _note(console, f"base model: {base.name}: {base.description} ({compute.reason})")
    for notice in base.notices:
        _note(console, notice)
    record = _record(config, base, console)
    if base.model.score is not None:
        return label_texts(Labeller.of(base, record), resolved, console, lambda text: _note(console, text))
    prompts = _prompt_format(config, base, record, console)
    _note(
        console, f"template: {prompts.template.name} ({prompts.template.source}, sha256 {prompts.template.digest[:12]})"
    )
    if prompts.system_prompt:
        _note(console, f"system prompt: {prompts.system_prompt}")
    # a chat asks with all that was said before, which the engine has computed already
    engine = Engine(base.model, base.tokenizer, keep_prefixes=True)
    speaker = Speaker(engine, prompts, sampling_params(config), stream=config.stream)
    if config.prompt is None:
        return _chat(speaker, console)
    question = Conversation((Message("user", config.prompt, config.input),), "instruction", "--prompt", 0)
    answer = speaker.answer(question, sys.stdout)
    _report(answer, console)
    return answer.to_json()


def sampling_params(config: GenerateConfig) -> SamplingParams:
    """The part of the configuration that says how tokens are chosen."""
    return SamplingParams(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
        min_p=config.min_p, repetition_penalty=config.repetition_penalty, seed=config.generation_seed,
        stop=tuple(config.stop),
    )  # fmt: skip


def _record(config: GenerateConfig, base: Base, console: Console) -> AdapterRecord | None:
    """Put the adapter on the model. Its record; a merged folder holds that of the adapter that went into it."""
    if config.lora_weights is not None:
        return _load_adapter(config.lora_weights, base, console)
    return read_record(base.path) if base.path.is_dir() else None


def _prompt_format(config: GenerateConfig, base: Base, record: AdapterRecord | None, console: Console) -> PromptFormat:
    """The template of the adapter's record, unless another one was asked for."""
    source = base.path if config.lora_weights is None else Path(config.lora_weights)
    if record is None or not record.template:
        template = load_template(config.prompt_template_name, base.tokenizer)
        return PromptFormat.of(template, base.tokenizer, system_prompt=config.system_prompt)
    trained = PromptFormat.from_record(record, base.tokenizer, file=source / RECORD_NAME)
    if record.tokenizer_fingerprint and record.tokenizer_fingerprint != base.tokenizer.fingerprint:
        _warn(console, "the adapter was trained with another tokenizer than this base model has")
    if config.system_prompt is not None and config.system_prompt != trained.system_prompt:
        _warn(console, f"the adapter was trained with another system prompt: {trained.system_prompt!r}")
        trained = replace(trained, system_prompt=config.system_prompt)
    if config.prompt_template_name is None:
        return trained
    template = load_template(config.prompt_template_name, base.tokenizer)
    if template.digest == trained.template.digest:
        return trained
    _warn(console, f"the adapter was trained with template {trained.template.name!r}, not with {template.name!r}")
    asked = PromptFormat.of(template, base.tokenizer, system_prompt=trained.system_prompt)
    return replace(asked, add_bos=trained.add_bos)


def _load_adapter(folder: str, base: Base, console: Console) -> AdapterRecord | None:
    plan = trained_for(folder, base.model)
    adapter, record = load_adapter(folder, base.model, base_fingerprint=base.fingerprint)
    for message in getattr(adapter, "messages", ()):
        _note(console, message)
    rank = adapter.config.get("r")
    how = "not merged" if plan is None else "folded in and quantized, as it was trained"
    _note(console, f"adapter: {folder} ({adapter.method}{f', rank {rank}' if rank else ''}), {how}")
    if plan is not None:
        fold(base.model, plan)
    if record is None and base.model.score is None:
        _note(console, "the adapter folder has no alpaca_lora.json: the template it was trained with is not known")
    return record


def _chat(speaker: Speaker, console: Console) -> dict[str, Any]:
    """Questions from the terminal, or line by line from a pipe; the last answer is the result."""
    answers: list[Answer] = []

    def answer(conversation: Conversation) -> str:
        answers.append(speaker.answer(conversation, sys.stdout))
        if sys.stdin.isatty():
            _report(answers[-1], console)
        return answers[-1].completion.text

    chat = Chat(answer, speaker.fits, console, interactive=sys.stdin.isatty(), interrupted=lambda: speaker.partial)
    chat.run(sys.stdin)
    if not answers:
        raise UserError("no question came from standard input", expected="one question per line, or --prompt")
    return answers[-1].to_json()


def _report(answer: Answer, console: Console) -> None:
    facts = answer.to_json()
    _note(
        console,
        f"{facts['completion_tokens']} tokens, {facts['tokens_per_second']:.1f} tokens/s, "
        f"prompt {facts['prompt_tokens']} tokens, ended by {facts['finish_reason']}",
    )


def _shown(text: str, out: TextIO) -> str:
    return _CONTROL.sub("", text) if out.isatty() else text


def _note(console: Console, text: str) -> None:
    console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def _warn(console: Console, text: str) -> None:
    console.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)
