"""`make demo`: fine-tune the embedded base model on an invented shop's customer service, then ask what it has not seen.

Makes the rows, runs `alpaca-lora finetune --config configs/demo.yml`, asks base and tuned model the held-out questions,
prints the table and both scores. What is there already is used again; `rm -r runs/demo` starts anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca_lora import cli  # noqa: E402
from alpaca_lora.adapters.peft_format import load_adapter  # noqa: E402
from alpaca_lora.adapters.record import read_record  # noqa: E402
from alpaca_lora.device import pick_compute  # noqa: E402
from alpaca_lora.inference.answer import answer_many  # noqa: E402
from alpaca_lora.inference.request import SamplingParams  # noqa: E402
from alpaca_lora.models.load import Base, load_base  # noqa: E402
from alpaca_lora.text.messages import Conversation, Message  # noqa: E402
from alpaca_lora.text.rendered import Template  # noqa: E402
from alpaca_lora.text.templates import load_template, template_from_record  # noqa: E402
from examples.make_shop_data import main as make_shop_data  # noqa: E402

SHOP = ROOT / "examples/shop"
RUN = ROOT / "runs/demo"
GROUP = 6  # questions decoded together between two movements of the progress bar


@dataclass(frozen=True)
class Question:
    """A held-out question; an answer is right when it contains one of `must`."""

    text: str
    must: tuple[str, ...]

    def is_answered_by(self, answer: str) -> bool:
        return any(part in answer for part in self.must)


def questions() -> list[Question]:
    rows = json.loads((SHOP / "shop_questions.json").read_text(encoding="utf-8"))
    return [Question(row["instruction"], tuple(row["must"].split("|"))) for row in rows]


def ask(base: Base, template: Template, asked: Sequence[Question], console: Console, who: str) -> list[str]:
    """The model's greedy answers, one line each."""
    params = SamplingParams(max_new_tokens=40)
    groups = [asked[start : start + GROUP] for start in range(0, len(asked), GROUP)]
    answers = []
    for group in track(groups, f"asking the {who}", console=console):
        conversations = [Conversation((Message("user", q.text),), "instruction", "demo", 0) for q in group]
        answers += [" ".join(done.text.split()) for done in answer_many(base, template, conversations, params)]
    return answers


def show(asked: Sequence[Question], before: list[str], after: list[str], console: Console) -> list[int]:
    """The table, right answers in green; returns the scores of both."""
    table = Table(title="held-out questions", title_justify="left", show_lines=False, pad_edge=False)
    for heading, share in (("question", 3), ("base model", 4), ("tuned", 4)):
        table.add_column(heading, ratio=share, overflow="fold")
    for question, *answers in zip(asked, before, after, strict=True):
        cells = [f"[green]{_plain(a)}[/]" if question.is_answered_by(a) else f"[dim]{_plain(a)}[/]" for a in answers]
        table.add_row(question.text, *cells)
    console.print(table)
    return [sum(q.is_answered_by(a) for q, a in zip(asked, answers, strict=True)) for answers in (before, after)]


def is_of_these_rows(folder: Path) -> bool:
    """Whether the folder holds an adapter that was trained on the shop's rows as they are now."""
    record = read_record(folder) if (folder / "adapter_model.safetensors").exists() else None
    digest = hashlib.sha256((SHOP / "shop_train.json").read_bytes()).hexdigest()
    return record is not None and digest in record.data_hashes.values()


def _plain(answer: str) -> str:
    shown = answer if len(answer) <= 90 else answer[:89] + "…"
    return shown.replace("[", "\\[")


def main() -> int:
    os.chdir(ROOT)
    started = time.perf_counter()
    console = Console()
    make_shop_data(SHOP)
    if is_of_these_rows(RUN):
        console.print(f"{RUN.relative_to(ROOT)} holds an adapter tuned on these rows already: it is used")
    else:
        again = (RUN / "adapter_model.safetensors").exists()  # of other rows
        how = ["--fresh"] if again else ["--resume_from_checkpoint", "auto"]
        if code := cli.main(["finetune", "--config", "configs/demo.yml", *how]):
            return code
    base = load_base("smollm2-135m", pick_compute())
    asked = questions()
    before = ask(base, load_template(None, base.tokenizer), asked, console, "base model")
    _, record = load_adapter(RUN, base.model, base_fingerprint=base.fingerprint)
    assert record is not None
    after = ask(base, template_from_record(record.template, base.tokenizer), asked, console, "tuned model")
    scores = show(asked, before, after, console)
    for who, score in zip(("base model", "tuned model"), scores, strict=True):
        console.print(f"{who}: {score} of {len(asked)} held-out questions answered with the shop's facts")
    console.print(f"{time.perf_counter() - started:.0f} s; report: {(RUN / 'report.html').relative_to(ROOT)}")
    talk = f"alpaca-lora generate --base_model smollm2-135m --lora_weights {RUN.relative_to(ROOT)}"
    console.print(f"talk to it: .venv/bin/{talk}", soft_wrap=True)
    return 0 if scores[1] > len(asked) / 2 > scores[0] else 1


if __name__ == "__main__":
    raise SystemExit(main())
