"""What `generate` does with a model that classifies: a label and its probability for --prompt, or for each line.

Knows a model with a head for classes and the record it was trained with.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from alpaca_lora.adapters.record import AdapterRecord
from alpaca_lora.commands.schemas import GenerateConfig
from alpaca_lora.data.encode import EncodePolicy
from alpaca_lora.errors import UserError
from alpaca_lora.inference.classify import Classification, classify
from alpaca_lora.models.classifier import find_score
from alpaca_lora.models.load import Base

SHOWN = 5  # labels with their probabilities


@dataclass(frozen=True)
class Labeller:
    """A base with a head, the names of its classes, and how rows were cut and ended in training."""

    base: Base
    labels: tuple[str, ...]
    policy: EncodePolicy

    @classmethod
    def of(cls, base: Base, record: AdapterRecord | None) -> Labeller:
        """Of a model with a head, which has the names that its record or its configuration gives."""
        score = find_score(base.model)
        assert score is not None
        context = base.config.max_position_embeddings - base.model.prefix_length
        trained = record.config if record is not None else {}
        # a classifier of someone else: the text as it is, as Hugging Face's tokenizers leave it
        policy = EncodePolicy(int(trained.get("cutoff_len", context)), add_eos_token=bool(record and record.add_eos))
        return cls(base, score.labels, policy)

    def ask(self, text: str) -> Classification:
        return classify(self.base.model, self.base.tokenizer, [text], self.labels, self.policy)[0]


def label_texts(
    labeller: Labeller, config: GenerateConfig, console: Console, note: Callable[[str], None]
) -> dict[str, Any]:
    """Write the label of --prompt, or of each line of standard input, to standard output. Returns the last one's label,
    probabilities, prompt_tokens and seconds.
    """
    note(f"labels: {', '.join(labeller.labels)}")
    if config.prompt is not None:
        return _answer(labeller, config.prompt, note)
    last = None
    while (line := _read(console)) is not None:
        if line.strip():
            last = _answer(labeller, line.strip(), note)
    if last is None:
        raise UserError("no text came from standard input", expected="one text per line, or --prompt")
    return last


def _read(console: Console) -> str | None:
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    try:
        return console.input("[bold]> [/]")
    except (EOFError, KeyboardInterrupt):
        return None


def _answer(labeller: Labeller, text: str, note: Callable[[str], None]) -> dict[str, Any]:
    start = time.perf_counter()
    found = labeller.ask(text)
    seconds = time.perf_counter() - start
    sys.stdout.write(f"{found.label}\n")
    sys.stdout.flush()
    likeliest = list(found.probabilities.items())[:SHOWN]
    note(", ".join(f"{label} {share:.1%}" for label, share in likeliest))
    if found.truncated:
        note(
            f"the text is longer than the {labeller.policy.cutoff_len} tokens of training: only its beginning was read"
        )
    return {
        "label": found.label, "probabilities": found.probabilities, "prompt_tokens": found.prompt_tokens,
        "seconds": round(seconds, 4),
    }  # fmt: skip
