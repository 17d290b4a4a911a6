"""`alpaca-lora finetune`: from a configuration to a saved adapter. Puts the rooms together; each knows its own part.

folder and lock -> base model -> template -> rows -> adapter (and its start) -> loader -> (resume) -> trainer ->
adapter folder
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from alpaca_lora.adapters.peft_format import save_adapter
from alpaca_lora.commands.audit import audit
from alpaca_lora.commands.job import Job, assemble, speaker
from alpaca_lora.commands.rounding_start import start_at_rounding_error
from alpaca_lora.commands.run_report import report_run
from alpaca_lora.commands.schemas import FinetuneConfig
from alpaca_lora.config import Resolved, dump
from alpaca_lora.device import peak_memory_bytes
from alpaca_lora.errors import Stopped
from alpaca_lora.training.checkpoint import STATE, Checkpoint, CheckpointStore
from alpaca_lora.training.classification_figures import class_table, confusion_table
from alpaca_lora.training.durable import replace_file
from alpaca_lora.training.lock import RunLock
from alpaca_lora.training.method_report import MethodReport
from alpaca_lora.training.metrics import MetricsLog, open_trackers, require_trackers
from alpaca_lora.training.progress import TrainingProgress
from alpaca_lora.training.run_folder import RunFolder
from alpaca_lora.training.saver import Saver
from alpaca_lora.training.signals import Interrupted, SignalFlag
from alpaca_lora.training.state import TrainState
from alpaca_lora.training.trainer import Trainer


def run(config: FinetuneConfig, *, resolved: Resolved[FinetuneConfig], console: Console) -> dict[str, Any]:
    """Returns steps examples tokens supervised_tokens tokens_per_second peak_memory_bytes train_loss val_loss ..."""
    started = time.perf_counter()
    say = speaker(console)
    console.print(dump(resolved))
    for notice in resolved.notices:
        console.print(notice, markup=False, highlight=False, soft_wrap=True)
    folder = RunFolder(Path(config.output_dir), say)
    with SignalFlag() as signals, RunLock(folder.path) as lock:
        if lock.taken_over:
            say(f"taking over from a run that died (pid {lock.taken_over.get('pid')})")
        try:
            checkpoint = folder.claim(config)
            job = assemble(config, console, signals)
            audit(job, console, signals, measure_anew=False)
            if config.init_lora_weights == "rounding_error" and job.adapter.method == "lora" and checkpoint is None:
                start_at_rounding_error(job, console, signals)
        except Interrupted as interrupted:
            what = f"stopped by {interrupted} before the first step: nothing was trained"
            raise Stopped(interrupted.signal_number, what) from None
        state, log = _train(job, folder, checkpoint, resolved, console, signals)
        method = MethodReport.of(job.adapter, job.num_base_parameters)
        if "confusion" in state.best_figures:
            console.print(class_table(state.best_figures["confusion"], job.prepared.labels))
            console.print(confusion_table(state.best_figures["confusion"], job.prepared.labels))
        say(method.headline())
        console.print(method.table())
        try:
            report_run(job, state, log, folder, resolved, method, say)
        except Exception as error:  # the adapter is saved: a page must not fail the run that made it
            say(f"report.html was not written: {type(error).__name__}: {error}")
        return {
            "steps": state.step, "examples": state.examples, "tokens": state.tokens,
            "supervised_tokens": state.supervised_tokens, "tokens_per_second": round(state.tokens_per_second, 1),
            "peak_memory_bytes": peak_memory_bytes(job.compute.device), "train_loss": state.train_loss,
            "val_loss": state.val_loss, "best_val_loss": state.best_val_loss,
            "best_step": state.best_step, **_of_classes(job), **state.best_figures,
            "trained_parameters": method.num_started, "method_report": method.to_json(),
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
        job.base.model, job.adapter, job.loader, job.loss, config, val_loader=job.val_loader, judge=job.judge,
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


def _of_classes(job: Job) -> dict[str, Any]:
    """What names the rows and columns of a confusion matrix."""
    prepared = job.prepared
    return {"labels": list(prepared.labels), "class_counts": list(prepared.class_counts)} if prepared.labels else {}


def _save(where: Path, job: Job, state: TrainState) -> None:
    save_adapter(where, job.adapter, job.record(state), allow_untrained=True)
