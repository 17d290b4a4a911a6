"""`alpaca-lora finetune`: from a configuration to a saved adapter. Puts the rooms together; each knows its own part.

folder and lock -> base model -> template -> rows -> adapter -> loader -> (resume) -> trainer -> adapter folder
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from alpaca_lora.adapters.peft_format import save_adapter
from alpaca_lora.commands.audit import audit
from alpaca_lora.commands.job import Job, assemble, speaker
from alpaca_lora.commands.schemas import FinetuneConfig
from alpaca_lora.config import Resolved, dump
from alpaca_lora.device import peak_memory_bytes
from alpaca_lora.errors import Stopped
from alpaca_lora.inference.answer import answer_many
from alpaca_lora.inference.prompts import PromptFormat
from alpaca_lora.inference.request import SamplingParams
from alpaca_lora.text.messages import Conversation, Message
from alpaca_lora.training.checkpoint import STATE, Checkpoint, CheckpointStore
from alpaca_lora.training.durable import replace_file
from alpaca_lora.training.lock import RunLock
from alpaca_lora.training.loss import causal_lm_loss
from alpaca_lora.training.metrics import MetricsLog, open_trackers, require_trackers
from alpaca_lora.training.progress import TrainingProgress
from alpaca_lora.training.report import Report, SampleAnswer, write_report
from alpaca_lora.training.run_folder import RunFolder
from alpaca_lora.training.saver import Saver
from alpaca_lora.training.signals import Interrupted, SignalFlag
from alpaca_lora.training.state import TrainState
from alpaca_lora.training.trainer import Trainer

SAMPLE_TOKENS = 128  # of each answer in the report


def run(config: FinetuneConfig, *, resolved: Resolved[FinetuneConfig], console: Console) -> dict[str, Any]:
    """Returns steps examples tokens supervised_tokens tokens_per_second peak_memory_bytes train_loss val_loss ..."""
    started = time.perf_counter()
    say = speaker(console)
    console.print(dump(resolved))
    folder = RunFolder(Path(config.output_dir), say)
    with SignalFlag() as signals, RunLock(folder.path) as lock:
        if lock.taken_over:
            say(f"taking over from a run that died (pid {lock.taken_over.get('pid')})")
        try:
            checkpoint = folder.claim(config)
            job = assemble(config, console, signals)
            audit(job, console, signals, measure_anew=False)
        except Interrupted as interrupted:
            what = f"stopped by {interrupted} before the first step: nothing was trained"
            raise Stopped(interrupted.signal_number, what) from None
        state, log = _train(job, folder, checkpoint, resolved, console, signals)
        try:
            _report(job, state, log, folder, resolved, console)
        except Exception as error:  # the adapter is saved: a page must not fail the run that made it
            say(f"report.html was not written: {type(error).__name__}: {error}")
        return {
            "steps": state.step, "examples": state.examples, "tokens": state.tokens,
            "supervised_tokens": state.supervised_tokens, "tokens_per_second": round(state.tokens_per_second, 1),
            "peak_memory_bytes": peak_memory_bytes(job.compute.device), "train_loss": state.train_loss,
            "val_loss": state.val_loss, "best_val_loss": state.best_val_loss,
            "seconds": round(time.perf_counter() - started, 3), "output_dir": config.output_dir,
        }  # fmt: skip


def _train(
    job: Job, folder: RunFolder, checkpoint: Checkpoint | None, resolved: Resolved[FinetuneConfig], console: Console,
    signals: SignalFlag,
) -> tuple[TrainState, list[dict[str, Any]]]:  # fmt: skip
    """From the job to the adapter in the output folder; the state and the log. The folder is first written to once
    nothing can be refused any more.
    """
    config, say, identity = job.config, speaker(console), job.identity()
    if checkpoint is not None:
        identity.check(checkpoint.state()["run"], file=checkpoint.path / STATE)
    require_trackers(config.report_to, config.wandb_project)
    if config.fresh:
        folder.set_aside()
    trackers = open_trackers(
        config.report_to, folder=folder.path, wandb_project=config.wandb_project, wandb_run_name=config.wandb_run_name,
        config=config.model_dump(),
    )  # fmt: skip
    replace_file(folder.path / "config.yml", resolved.to_yaml().encode())
    job.prepared.ledger.write(folder.path)
    log = MetricsLog(
        folder.path / "metrics.jsonl", lines=checkpoint.log_lines() if checkpoint else (), trackers=trackers, say=say
    )
    saver = Saver(CheckpointStore(folder.path, keep=config.save_total_limit), about=identity.summary(), say=say)
    trainer = Trainer(
        job.base.model, job.adapter, job.loader, causal_lm_loss, config, val_loader=job.val_loader,
        device=job.compute.device, identity=identity, saver=saver, log=log, signals=signals,
    )  # fmt: skip
    saver.write_adapter = lambda where: _save(where, job, trainer.state)
    progress = TrainingProgress(console, total_steps=trainer.total_steps, step=checkpoint.step if checkpoint else 0)
    trainer.progress = progress
    if checkpoint is not None:
        trainer.resume(checkpoint)
    say(f"training: {trainer.total_steps} steps of {config.batch_size} rows, {len(job.prepared.train):,} rows in all")
    try:
        with progress:
            state = trainer.train()
    finally:
        log.close()
    save_adapter(folder.path, job.adapter, job.record(state))
    say(f"adapter saved in {folder.path}")
    return state, log.records()


def _report(
    job: Job, state: TrainState, log: list[dict[str, Any]], folder: RunFolder, resolved: Resolved[FinetuneConfig],
    console: Console,
) -> None:  # fmt: skip
    """report.html in the output folder, with answers of the tuned model to questions of the validation rows."""
    config = job.config
    asked = [row for row in job.prepared.samples if _can_be_asked(row, job)][: config.num_sample_answers]
    questions = [dataclasses.replace(row, messages=row.messages[:-1]) for row in asked]
    params = SamplingParams(max_new_tokens=SAMPLE_TOKENS)
    answers = answer_many(job.base, job.template, questions, params, system_prompt=config.system_prompt)
    samples = [
        SampleAnswer(_spelled(question.messages[-1]), row.messages[-1].content, answer.text)
        for row, question, answer in zip(asked, questions, answers, strict=True)
    ]
    best = f"best, at step {state.best_step}" if state.best_step else ""
    summary = [
        ("base model", job.base.name, job.base.description), ("method", config.method, ""),
        ("steps", f"{state.step:,}", f"{state.epoch:.2f} epochs"), ("rows", f"{state.examples:,}", "counted each time"),
        ("tokens", f"{state.tokens:,}", f"{state.supervised_tokens:,} learned"),
        ("speed", f"{state.tokens_per_second:,.0f}", "tokens per second of training"),
        ("training loss", _number(state.train_loss), "mean over the run"),
        ("validation loss", _number(state.best_val_loss), best),
    ]  # fmt: skip
    path = folder.path / "report.html"
    write_report(path, Report(
        title=f"{job.base.name}: {folder.path.name}", summary=summary, log=log, config=resolved.rows(),
        rows=job.prepared.ledger.rows(), moved=job.adapter.moved(), samples=samples,
    ))  # fmt: skip
    speaker(console)(f"report: {path}")


def _can_be_asked(row: Conversation, job: Job) -> bool:
    """Whether the row is a question and an answer, and the question leaves room for one in the model's context."""
    if row.kind == "text" or row.messages[-1].role != "assistant" or len(row.messages) < 2:
        return False
    question = dataclasses.replace(row, messages=row.messages[:-1])
    format_ = PromptFormat.of(job.template, job.base.tokenizer, system_prompt=job.config.system_prompt)
    return len(format_.prompt_ids(question)) + SAMPLE_TOKENS <= job.base.config.max_position_embeddings


def _spelled(message: Message) -> str:
    return f"{message.content}\n\n{message.context}" if message.context else message.content


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _save(where: Path, job: Job, state: TrainState) -> None:
    save_adapter(where, job.adapter, job.record(state), allow_untrained=True)
