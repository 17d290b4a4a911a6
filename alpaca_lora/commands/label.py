"""What `generate` does with a model that classifies: a label and its probability for --prompt, or for each line.

Knows a model with a head for classes and the record it was trained with.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from alpaca_lora.adapters.record import RECORD_NAME, AdapterRecord
from alpaca_lora.commands.chat import typed_line
from alpaca_lora.commands.input_lines import waiting_lines
from alpaca_lora.commands.schemas import GenerateConfig
from alpaca_lora.config import DEFAULT, Resolved
from alpaca_lora.data.classes import some
from alpaca_lora.data.cleaning import RULE_NAMES
from alpaca_lora.data.encode import EncodePolicy
from alpaca_lora.data.encode_labelled import text_room
from alpaca_lora.errors import AlpacaLoraError, ConfigError, ModelFileError, UserError
from alpaca_lora.inference.classify import Classification, classify
from alpaca_lora.inference.options import GenerationOptions
from alpaca_lora.models.classifier import find_score, unnamed
from alpaca_lora.models.load import Base
from alpaca_lora.text.options import TextOptions

SHOWN = 5  # labels with their probabilities
READ_KEYS = {"lora_weights", "prompt", "input"}  # of the answering room; a classifier has no use for the others
# a label comes from a data file: it must not steer the reader's terminal, nor break the line that it is
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")

Note = Callable[[str], None]


@dataclass(frozen=True)
class Labeller:
    """A base with a head, the names of its classes, and how rows were cut, ended and cleaned in training."""

    base: Base
    labels: tuple[str, ...]
    policy: EncodePolicy
    skip_cleaning: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what to tell the user of all that

    @classmethod
    def of(cls, base: Base, record: AdapterRecord | None) -> Labeller:
        """Of a model with a head, which has the names that its record or its configuration gives. ModelFileError for a
        record that cannot be.
        """
        score = find_score(base.model)
        assert score is not None
        notes = [f"labels: {some(score.labels)}"]
        context = base.config.max_position_embeddings - base.model.prefix_length
        if record is None:
            # a classifier of someone else: the text as it is, as Hugging Face's tokenizers leave it
            policy, skip_cleaning = EncodePolicy(context, add_eos_token=False), ()
            names = " and the names of the labels" if unnamed(score.labels) else ""
            notes.append(
                f"there is no {RECORD_NAME}: cutoff_len, the EOS{names} of its training are not known; texts are read "
                f"up to {context:,} tokens, without EOS"
            )
        else:
            cutoff_len, skip_cleaning = _recorded(record, context)
            template = str(record.config.get("text_template", "{text}"))
            policy = EncodePolicy(cutoff_len, add_eos_token=record.add_eos, text_template=template)
        text_room(base.tokenizer, policy)
        return cls(base, score.labels, policy, skip_cleaning, tuple(notes))

    def ask(self, texts: Sequence[str]) -> list[Classification | None]:
        """None for a text of which nothing is left to classify."""
        return classify(
            self.base.model, self.base.tokenizer, texts, self.labels, self.policy, skip_cleaning=self.skip_cleaning
        )


def _recorded(record: AdapterRecord, context: int) -> tuple[int, tuple[str, ...]]:
    """(cutoff_len, skip_cleaning) of the training's configuration."""
    cutoff_len, skipped = record.config.get("cutoff_len", context), record.config.get("skip_cleaning", [])
    if type(cutoff_len) is not int or cutoff_len < 1:
        raise ModelFileError(f"is {str(cutoff_len)[:60]}", file=RECORD_NAME, field="config.cutoff_len")
    if not isinstance(skipped, list) or not set(map(str, skipped)) <= {*RULE_NAMES, "all"}:
        raise ModelFileError(
            f"is {str(skipped)[:60]}",
            file=RECORD_NAME,
            field="config.skip_cleaning",
            expected="names of cleaning rules",
        )
    return cutoff_len, tuple(map(str, skipped))


@dataclass
class _Answers:
    """What has been answered so far, as JSON: an object for each line, and the last label."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    last: dict[str, Any] | None = None

    def add(self, found: Classification | None) -> None:
        facts: dict[str, Any] = {"label": None}
        if found is not None:
            self.last = _facts(found)
            facts = {**self.last, "truncated": found.truncated}
        self.lines.append({"line": len(self.lines) + 1, **facts})

    def to_json(self, seconds: float) -> dict[str, Any]:
        """UserError where nothing was labelled."""
        if self.last is None:
            raise UserError("no text came from standard input", expected="one text per line, or --prompt")
        return {**self.last, "seconds": round(seconds, 4), "results": self.lines}


def label_texts(labeller: Labeller, resolved: Resolved[GenerateConfig], console: Console, note: Note) -> dict[str, Any]:
    """Write the label of --prompt, or of each line of standard input, to standard output: a line for a line.

    Returns label, probabilities, prompt_tokens and seconds of the (last) text; of lines ``results`` too, an object for
    each. Raises UserError for a prompt of which cleaning leaves nothing, DataError for a line of a pipe that
    is not UTF-8.
    """
    config = resolved.value
    if config.input:
        raise ConfigError("the model classifies one text", field="input", fix="put the whole text into prompt")
    for text in (*labeller.notes, *_useless_keys(resolved)):
        note(text)
    start = time.perf_counter()
    if config.prompt is not None:
        found = labeller.ask([config.prompt])[0]
        if found is None:
            raise UserError("the text to classify is empty", field="prompt")
        _write(found)
        _explain(found, labeller, note)
        return {**_facts(found), "seconds": round(time.perf_counter() - start, 4)}
    answers = _answer_terminal(labeller, console, note) if sys.stdin.isatty() else _answer_pipe(labeller, note)
    return answers.to_json(time.perf_counter() - start)


def _useless_keys(resolved: Resolved[GenerateConfig]) -> Iterator[str]:
    keys = (*GenerationOptions.model_fields, *TextOptions.model_fields)
    given = [key for key in keys if key not in READ_KEYS and resolved.origins.get(key, DEFAULT) != DEFAULT]
    if given:
        yield f"the model classifies and writes nothing, so these keys do nothing: {', '.join(given)}"


def _answer_pipe(labeller: Labeller, note: Note) -> _Answers:
    """What has come is classified together; a line without text is answered by an empty line."""
    answers = _Answers()
    for lines in waiting_lines(sys.stdin):
        for found in labeller.ask(lines):
            answers.add(found)
            _write(found)
            where = f"standard input:{len(answers.lines)}"
            if found is None:
                note(f"{where}: there is no text to classify: an empty line is its answer")
            elif found.truncated:
                note(f"{where}: {_cut(labeller)}")
    return answers


def _answer_terminal(labeller: Labeller, console: Console, note: Note) -> _Answers:
    """One text after the other until Ctrl-D; an error ends none of it."""
    answers = _Answers()
    while (line := typed_line(console, leave="Ctrl-D leaves")) is not None:
        if not line.strip():
            continue
        try:
            found = labeller.ask([line])[0]
        except AlpacaLoraError as error:
            note(f"error: {error}")
            continue
        except KeyboardInterrupt:
            note("stopped")
            continue
        if found is None:
            note("there is no text to classify")
            continue
        answers.add(found)
        _write(found)
        _explain(found, labeller, note)
    return answers


def _facts(found: Classification) -> dict[str, Any]:
    return {"label": found.label, "probabilities": found.probabilities, "prompt_tokens": found.prompt_tokens}


def _write(found: Classification | None) -> None:
    sys.stdout.write("\n" if found is None else f"{shown_label(found.label)}\n")
    sys.stdout.flush()


def _explain(found: Classification, labeller: Labeller, note: Note) -> None:
    likeliest = list(found.probabilities.items())[:SHOWN]
    note(", ".join(f"{shown_label(label)} {share:.1%}" for label, share in likeliest))
    if found.truncated:
        note(_cut(labeller))


def _cut(labeller: Labeller) -> str:
    return f"the text is longer than {labeller.policy.cutoff_len:,} tokens: only its beginning was read"


def shown_label(label: str) -> str:
    """The label on one line, without control characters; JSON has it as it is."""
    return _CONTROLS.sub(" ", label).strip()
