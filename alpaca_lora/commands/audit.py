"""What `check` shows, and `finetune` before its first step: tokenizer, template, rows, lengths, memory, time.

Looks at a `Job` and at two probe steps; changes nothing of either.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from alpaca_lora import __version__
from alpaca_lora.commands.job import Job
from alpaca_lora.data.preview import length_histogram, row_panel, spread_rows
from alpaca_lora.device import peak_memory_bytes
from alpaca_lora.home import home
from alpaca_lora.quantization.plan import scheme_settings
from alpaca_lora.training.activation_levels import describe
from alpaca_lora.training.preflight import Probe, check_fits, longest_batch, memory_limit, probe
from alpaca_lora.training.probe_cache import ProbeCache
from alpaca_lora.training.schedule import total_steps
from alpaca_lora.training.signals import SignalFlag

FORWARD_SHARE = 1 / 3  # of a training step's time: evaluation has no backward pass, which costs twice the forward


def audit(job: Job, console: Console, signals: SignalFlag, *, measure_anew: bool, num_rows: int = 3) -> dict[str, Any]:
    """Show everything, measure the probe, refuse what cannot fit (MachineError). Returns the figures.

    ``measure_anew`` False takes the probe of an earlier run of the same job on the same machine where there is one.
    """
    train, tokenizer = job.prepared.train, job.base.tokenizer
    console.print(token_table(job))
    for row in spread_rows(train.lengths, num_rows):
        console.print(row_panel(train[row], tokenizer, number=row, labels=job.prepared.labels))
    console.print(length_histogram(train.lengths, job.config.cutoff_len))
    signals.check()
    measured, recalled = measure(job, signals, measure_anew=measure_anew)
    figures = estimate(job, measured)
    console.print(probe_table(job, measured, figures, recalled=recalled))
    return figures


def token_table(job: Job) -> Table:
    """Special tokens as the run uses them."""
    tokenizer, template = job.base.tokenizer, job.template

    def token(number: int | None) -> str:
        return "none" if number is None else f"{number} {tokenizer.decode([number], skip_special=False)!r}"

    lines = [
        ("vocabulary", f"{tokenizer.vocab_size:,} tokens, {job.base.config.vocab_size:,} embedding rows"),
        ("BOS", f"{token(tokenizer.bos_id)}, {'put' if tokenizer.add_bos else 'not put'} before each row"),
        ("EOS", f"{token(tokenizer.eos_id)}{' (also the padding token)' if _pad_is_eos(job) else ''}"),
    ]
    if job.config.task == "classification":
        learned = f"a label for each row, of {len(job.prepared.labels)}"
        lines += [("text", repr(job.config.text_template)), ("learned", learned)]
    else:
        learned = "prompts and answers" if job.config.train_on_inputs else f"answers ({job.config.train_on_turns})"
        lines += [
            ("generation stops at", ", ".join(token(number) for number in tokenizer.stop_ids)),
            ("template", f"{template.name}, from {template.source}, sha256 {template.digest[:12]}"),
            ("learned", learned), ("rows that teach stopping", f"{job.prepared.ledger.end_share:.1%}"),
        ]  # fmt: skip
    table = Table(title="tokens", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for what, value in lines:
        table.add_row(what, value)
    return table


def _pad_is_eos(job: Job) -> bool:
    return job.base.tokenizer.pad_id is not None and job.base.tokenizer.pad_id == job.base.tokenizer.eos_id


def measure(job: Job, signals: SignalFlag, *, measure_anew: bool) -> tuple[Probe, bool]:
    """The probe, and whether it is one of an earlier run."""
    cache = ProbeCache(home() / "probes", facts(job))
    known, limit = None if measure_anew else cache.recall(), memory_limit(job.config, job.compute.device)
    if known is not None and known.levels and known.needed_bytes > limit:
        known = None  # chosen for more memory than there is today
    if known is not None:
        check_fits(known, limit, job.config)
        if known.levels:
            job.base.model.gradient_checkpointing = known.levels
        return known, True
    job.base.model.activation_file.folder = Path(job.config.output_dir)
    measured = probe(
        job.base.model, job.adapter, job.loss, job.prepared.train, job.config, device=job.compute.device,
        check_signals=signals.check,
    )  # fmt: skip
    cache.remember(measured)
    return measured, False


def facts(job: Job) -> dict[str, Any]:
    """All that the memory and the speed of a step depend on."""
    config = job.config
    batch = longest_batch(job.prepared.train, config.micro_batch_size * config.cutoff_len, config.batch_size)
    trained = [(name, tuple(p.shape), str(p.dtype)) for name, p in job.adapter.trained_parameters()]
    return {
        "base": job.base.fingerprint, "quantization_aware": [config.quantization_aware, scheme_settings(config)],
        "method": config.method, "trained": trained, "adapter": job.adapter.config,
        "lengths": list(batch.lengths),
        "labels": batch.num_supervised, "gradient_checkpointing": config.gradient_checkpointing,
        "optimizer_state": config.optimizer_state,
        "max_memory_gb": config.max_memory_gb if config.gradient_checkpointing in ("auto", "disk") else None,
        "machine": [platform.node(), platform.processor(), str(job.compute.device), job.compute.num_threads],
        "reason": job.compute.reason, "torch": torch.__version__, "version": __version__,
    }  # fmt: skip


def estimate(job: Job, measured: Probe) -> dict[str, Any]:
    """The run's steps, tokens, memory and seconds from what the probe measured."""
    config, train, val = job.config, job.prepared.train, job.prepared.val
    steps = total_steps(config.num_epochs, config.max_steps, job.loader.steps_per_epoch)
    epochs = steps / job.loader.steps_per_epoch
    val_tokens = val.num_tokens if val is not None else 0
    num_evaluations = -(-steps // config.eval_steps) if val_tokens else 0
    tokens = epochs * train.num_tokens
    seconds = (tokens + num_evaluations * val_tokens * FORWARD_SHARE) / measured.tokens_per_second
    return {
        "train_rows": len(train), "val_rows": len(val) if val is not None else 0, "steps": steps,
        "epochs": round(epochs, 3), "tokens_per_epoch": train.num_tokens,
        "supervised_share": round(train.num_supervised_tokens / train.num_tokens, 4),
        "longest_row": int(train.lengths.max()), "tokens_per_second": round(measured.tokens_per_second, 1),
        "needed_memory_bytes": measured.needed_bytes, "peak_memory_bytes": peak_memory_bytes(job.compute.device),
        "estimated_seconds": round(seconds), "trained_parameters": _num_trained(job),
    }  # fmt: skip


def _num_trained(job: Job) -> int:
    return sum(parameter.numel() for _, parameter in job.adapter.trained_parameters())


def probe_table(job: Job, measured: Probe, figures: dict[str, Any], *, recalled: bool) -> Table:
    """What a person wants to know before an hour of training."""
    minutes, seconds = divmod(figures["estimated_seconds"], 60)
    hours, minutes = divmod(minutes, 60)
    share = figures["trained_parameters"] / job.num_base_parameters
    limit = memory_limit(job.config, job.compute.device)
    lines = [
        (
            "trained",
            f"{figures['trained_parameters']:,} parameters ({share:.2%} of the base's), method {job.config.method}",
        ),
        ("steps", f"{figures['steps']:,} of {job.config.batch_size} rows ({figures['epochs']:g} epochs)"),
        ("longest micro-batch", f"{measured.num_tokens:,} tokens, longest row {measured.longest_row:,}"),
        ("memory", f"{measured.needed_bytes / 2**30:.2f} GiB at its peak, {limit / 2**30:.2f} GiB may be taken"),
        *([("made again in backward", describe(measured.levels))] if measured.levels else []),
        ("speed", f"{measured.tokens_per_second:,.0f} tokens/s"),
        ("time", f"about {hours}:{minutes:02}:{seconds:02}, evaluation included"),
    ]
    title = "the run, measured " + ("before, in the same job on this machine" if recalled else "by two steps just now")
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for what, value in lines:
        table.add_row(what, value)
    return table
