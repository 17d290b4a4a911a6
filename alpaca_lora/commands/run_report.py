"""report.html of a run: the figures, curves and pictures of what it did, and what the tuned model says to rows.

Looks at a `Job` that has been trained; changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from alpaca_lora.commands.job import Job
from alpaca_lora.config import Resolved
from alpaca_lora.inference.answer import answer_many
from alpaca_lora.inference.prompts import PromptFormat
from alpaca_lora.inference.request import SamplingParams
from alpaca_lora.text.messages import Conversation, Message
from alpaca_lora.training.classification_figures import confusion_figure
from alpaca_lora.training.method_report import MethodReport
from alpaca_lora.training.rank_picture import rank_figure
from alpaca_lora.training.report import Report, SampleAnswer, write_report
from alpaca_lora.training.run_folder import RunFolder
from alpaca_lora.training.state import TrainState

SAMPLE_TOKENS = 128  # of each answer in the report


def report_run(
    job: Job, state: TrainState, log: list[dict[str, Any]], folder: RunFolder, resolved: Resolved[Any],
    method: MethodReport, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Write report.html into the output folder."""
    config = job.config
    best = f"best, at step {state.best_step}" if state.best_step else ""
    figures = [(name, f"{value:.4f}", best) for name, value in state.best_figures.items() if isinstance(value, float)]
    summary = [
        ("base model", job.base.name, job.base.description), ("method", config.method, ""),
        ("steps", f"{state.step:,}", f"{state.epoch:.2f} epochs"), ("rows", f"{state.examples:,}", "counted each time"),
        ("tokens", f"{state.tokens:,}", f"{state.supervised_tokens:,} learned"),
        ("speed", f"{state.tokens_per_second:,.0f}", "tokens per second of training"),
        ("training loss", _number(state.train_loss), "mean over the run"),
        ("validation loss", _number(state.best_val_loss), best), *figures,
    ]  # fmt: skip
    path = folder.path / "report.html"
    write_report(path, Report(
        title=f"{job.base.name}: {folder.path.name}", summary=summary, log=log, config=resolved.rows(),
        rows=job.prepared.ledger.rows(), moved=method.moved, method=method.lines(), samples=_samples(job),
        pictures=_pictures(job, state, log), loss_per="row" if config.task == "classification" else "token",
    ))  # fmt: skip
    say(f"report: {path}")


def _pictures(job: Job, state: TrainState, log: list[dict[str, Any]]) -> list[tuple[str, Figure]]:
    pictures = []
    if "confusion" in state.best_figures:
        matrix = state.best_figures["confusion"]
        pictures.append(("Confusion matrix of the validation rows", confusion_figure(matrix, job.prepared.labels)))
    if (figure := rank_figure(log)) is not None:
        pictures.append(("Rank of each module over the steps", figure))
    return pictures


def _samples(job: Job) -> list[SampleAnswer]:
    """What the tuned model answers to questions of the validation rows."""
    config = job.config
    if config.task == "classification":
        return []
    asked = [row for row in job.prepared.samples if _can_be_asked(row, job)][: config.num_sample_answers]
    questions = [dataclasses.replace(row, messages=row.messages[:-1]) for row in asked]
    params = SamplingParams(max_new_tokens=SAMPLE_TOKENS)
    answers = answer_many(job.base, job.template, questions, params, system_prompt=config.system_prompt)
    return [
        SampleAnswer(_spelled(question.messages[-1]), row.messages[-1].content, answer.text)
        for row, question, answer in zip(asked, questions, answers, strict=True)
    ]


def _can_be_asked(row: Conversation, job: Job) -> bool:
    """Whether the row is a question and an answer, and the question leaves room for one in the model's context."""
    if row.kind == "text" or row.messages[-1].role != "assistant" or len(row.messages) < 2:
        return False
    question = dataclasses.replace(row, messages=row.messages[:-1])
    format_ = PromptFormat.of(job.template, job.base.tokenizer, system_prompt=job.config.system_prompt)
    return len(format_.prompt_ids(question)) + SAMPLE_TOKENS <= (
        job.base.config.max_position_embeddings - job.base.model.prefix_length
    )


def _spelled(message: Message) -> str:
    return f"{message.content}\n\n{message.context}" if message.context else message.content


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
