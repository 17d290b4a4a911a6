"""`alpaca-lora finetune`: from a configuration to a saved adapter. Puts the rooms together; each knows its own part.

folder and lock -> base model -> template -> rows -> adapter -> loader -> (resume) -> trainer -> adapter folder
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from alpaca_lora import __version__
from alpaca_lora.adapters.base import Adapter, method_class
from alpaca_lora.adapters.peft_format import save_adapter
from alpaca_lora.adapters.record import AdapterRecord
from alpaca_lora.commands.schemas import FinetuneConfig
from alpaca_lora.config import Resolved, dump
from alpaca_lora.data.loader import Loader
from alpaca_lora.data.prepare import Prepared, prepare
from alpaca_lora.device import Compute, peak_memory_bytes, pick_compute, seed_everything
from alpaca_lora.errors import Stopped
from alpaca_lora.models.load import Base, load_base
from alpaca_lora.text.rendered import Template
from alpaca_lora.text.templates import load_template
from alpaca_lora.training.checkpoint import STATE, Checkpoint, CheckpointStore
from alpaca_lora.training.durable import replace_file
from alpaca_lora.training.identity import RunIdentity
from alpaca_lora.training.lock import RunLock
from alpaca_lora.training.loss import causal_lm_loss
from alpaca_lora.training.metrics import MetricsLog, open_trackers
from alpaca_lora.training.progress import TrainingProgress
from alpaca_lora.training.run_folder import RunFolder
from alpaca_lora.training.saver import Saver
from alpaca_lora.training.schedule import total_steps, warmup_steps
from alpaca_lora.training.signals import Interrupted, SignalFlag
from alpaca_lora.training.state import TrainState
from alpaca_lora.training.trainer import Trainer


@dataclass(frozen=True)
class Job:
    """All that a run needs before the first step; `check` takes it as well."""

    config: FinetuneConfig
    compute: Compute
    base: Base
    template: Template
    prepared: Prepared
    adapter: Adapter
    loader: Loader
    val_loader: Loader | None

    def identity(self) -> RunIdentity:
        """What a checkpoint must share with this run to be resumed by it."""
        steps = total_steps(self.config.num_epochs, self.config.max_steps, self.loader.steps_per_epoch)
        return RunIdentity.of(
            self.config.model_dump(), total_steps=steps, warmup_steps=warmup_steps(self.config.warmup_steps, steps),
            fingerprints={
                "base model": self.base.fingerprint, "template": self.template.digest,
                "data": self.prepared.fingerprint, "dtype": self.compute.dtype_name,
            },
            data_hashes=self.prepared.data_hashes,
        )  # fmt: skip

    def record(self, state: TrainState) -> AdapterRecord:
        """The adapter folder's alpaca_lora.json; no times in it, so that equal runs write equal files."""
        tokenizer = self.base.tokenizer
        metrics = {
            "step": state.step, "train_loss": state.train_loss, "val_loss": state.val_loss,
            "best_val_loss": state.best_val_loss, "best_step": state.best_step,
        }  # fmt: skip
        return AdapterRecord(
            base_model=self.config.base_model, base_fingerprint=self.base.fingerprint,
            template=self.template.to_record(), system_prompt=self.config.system_prompt,
            stop_ids=list(tokenizer.stop_ids), stop_strings=list(self.template.stop_tokens),
            add_bos=tokenizer.add_bos, add_eos=self.config.add_eos_token, tokenizer_fingerprint=tokenizer.fingerprint,
            data_hashes=dict(self.prepared.data_hashes), config=self.config.model_dump(), metrics=metrics,
            version=__version__,
        )  # fmt: skip


def run(config: FinetuneConfig, *, resolved: Resolved[FinetuneConfig], console: Console) -> dict[str, Any]:
    """Returns steps examples tokens supervised_tokens tokens_per_second peak_memory_bytes train_loss val_loss ..."""
    started = time.perf_counter()
    say = _speaker(console)
    console.print(dump(resolved))
    folder = RunFolder(Path(config.output_dir), say)
    with SignalFlag() as signals, RunLock(folder.path) as lock:
        if lock.taken_over:
            say(f"taking over from a run that died (pid {lock.taken_over.get('pid')})")
        try:
            checkpoint = folder.claim(config)
            job = assemble(config, console, signals)
            signals.check()
            # training/preflight.py joins here
        except Interrupted as interrupted:
            what = f"stopped by {interrupted} before the first step: nothing was trained"
            raise Stopped(interrupted.signal_number, what) from None
        state = _train(job, folder, checkpoint, resolved, console, signals)
        # training/report.py joins here
        return {
            "steps": state.step, "examples": state.examples, "tokens": state.tokens,
            "supervised_tokens": state.supervised_tokens, "tokens_per_second": round(state.tokens_per_second, 1),
            "peak_memory_bytes": peak_memory_bytes(job.compute.device), "train_loss": state.train_loss,
            "val_loss": state.val_loss, "best_val_loss": state.best_val_loss,
            "seconds": round(time.perf_counter() - started, 3), "output_dir": config.output_dir,
        }  # fmt: skip


def assemble(config: FinetuneConfig, console: Console, signals: SignalFlag) -> Job:
    """Load, prepare and attach; says what it found."""
    say = _speaker(console)
    compute = pick_compute(config.device, config.dtype, config.num_threads)
    seed_everything(config.seed)
    base = load_base(config.base_model, compute)
    say(f"base model: {base.name}: {base.description} ({compute.reason})")
    for notice in base.notices:
        say(notice)
    template = load_template(config.prompt_template_name, base.tokenizer)
    say(f"template: {template.name} ({template.source}, sha256 {template.digest[:12]})")
    prepared = prepare(
        config, base.tokenizer, template, system_prompt=config.system_prompt, seed=config.seed,
        on_progress=lambda *_: signals.check(),
    )  # fmt: skip
    console.print(prepared.ledger.table())
    for message in prepared.messages:
        say(message)
    adapter = method_class(config.method).attach(base.model, config, seed=config.seed)
    for message in getattr(adapter, "messages", ()):
        say(message)
    return Job(
        config, compute, base, template, prepared, adapter,
        loader=_loader(config, prepared.train), val_loader=_loader(config, prepared.val) if prepared.val else None,
    )  # fmt: skip


def _loader(config: FinetuneConfig, table: Any) -> Loader:
    return Loader(
        table, batch_size=config.batch_size, token_budget=config.micro_batch_size * config.cutoff_len, seed=config.seed,
        group_by_length=config.group_by_length,
    )  # fmt: skip


def _train(
    job: Job, folder: RunFolder, checkpoint: Checkpoint | None, resolved: Resolved[FinetuneConfig], console: Console,
    signals: SignalFlag,
) -> TrainState:  # fmt: skip
    """From the job to the adapter in the output folder. The folder is first written to once nothing can be refused
    any more.
    """
    config, say, identity = job.config, _speaker(console), job.identity()
    if checkpoint is not None:
        identity.check(checkpoint.state()["run"], file=checkpoint.path / STATE)
    trackers = open_trackers(
        config.report_to, folder=folder.path, wandb_project=config.wandb_project, wandb_run_name=config.wandb_run_name,
        config=config.model_dump(),
    )  # fmt: skip
    if config.fresh:
        folder.set_aside()
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
    if checkpoint is not None:
        trainer.resume(checkpoint)
    say(f"training: {trainer.total_steps} steps of {config.batch_size} rows, {len(job.prepared.train):,} rows in all")
    try:
        with TrainingProgress(console, total_steps=trainer.total_steps, step=trainer.state.step) as progress:
            trainer.progress = progress
            state = trainer.train()
    finally:
        log.close()
    save_adapter(folder.path, job.adapter, job.record(state))
    say(f"adapter saved in {folder.path}")
    return state


def _save(where: Path, job: Job, state: TrainState) -> None:
    save_adapter(where, job.adapter, job.record(state), allow_untrained=True)


def _speaker(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
