"""`alpaca-lora quantize`: a dense base model -> a folder with its weights in fewer bits.

Three ways, by what the plan needs: linear by linear from the file (nothing but the weights); layer by layer over sample
rows (calibrated schemes, gptq, awq); in memory, where an adapter is folded in or a mixed plan is looked for first.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from alpaca_lora import __version__
from alpaca_lora.adapters.merge import check_free
from alpaca_lora.adapters.peft_format import load_adapter
from alpaca_lora.adapters.record import RECORD_NAME, AdapterRecord
from alpaca_lora.commands.calibration_rows import calibration_rows, rows_sha256
from alpaca_lora.commands.schemas import QuantizeConfig
from alpaca_lora.config import Resolved
from alpaca_lora.device import DTYPES, Compute, peak_memory_bytes, pick_compute
from alpaca_lora.errors import ConfigError
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.load import Base
from alpaca_lora.quantization.calibrate import quantize_model, quantize_source
from alpaca_lora.quantization.folder import Origin, is_quantized, write_quantized
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.load import load_base, packed_fingerprint
from alpaca_lora.quantization.mixed import mixed_plan
from alpaca_lora.quantization.plan import Plan, linear_shapes
from alpaca_lora.text.tokenizer import Tokenizer
from alpaca_lora.weights.hub import resolve
from alpaca_lora.weights.safetensors_file import file_sha256

WORST_SHOWN = 3


@dataclass
class Made:
    """A model with packed linears. errors: linear -> relative error of its weight, or of its output where it was made
    on rows.
    """

    base: Base
    plan: Plan
    origin: Origin
    errors: dict[str, float]
    record: AdapterRecord | None = None


class Bar:
    """What is done of how much, its rate and the time left, while the block runs."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip
        self.task = self.progress.add_task("quantizing", total=None)

    def __call__(self, done: int, total: int, what: str) -> None:
        self.progress.update(self.task, completed=done, total=total, description=what)


def run(config: QuantizeConfig, *, resolved: Resolved[QuantizeConfig], console: Console) -> dict[str, Any]:
    """Returns scheme bits_per_weight bytes dense_bytes largest_error mean_error calibration_tokens fingerprint
    peak_memory_bytes output_dir seconds.
    """
    start = time.perf_counter()
    check_free(config.output_dir)
    path = resolve(config.base_model)
    if is_quantized(path):
        raise ConfigError(
            f"{path} is quantized already", field="base_model", expected="a dense model",
            fix="give the model that it was made of",
        )  # fmt: skip
    compute = pick_compute(config.device, "auto" if config.dtype == "auto" else config.dtype, config.num_threads)
    dense_dtype = torch.bfloat16 if config.dtype == "auto" else DTYPES[config.dtype]
    bar = Bar(console)
    with bar.progress:
        made = _make(config, path, compute, bar, console)
    shapes = linear_shapes(made.base.model)
    fingerprint = packed_fingerprint(made.origin, made.plan)
    files = {RECORD_NAME: made.record.to_json().encode()} if made.record is not None else {}
    folder = write_quantized(
        config.output_dir, made.base, made.plan, made.origin, fingerprint=fingerprint, dense_dtype=dense_dtype,
        extra_files=files, max_shard_bytes=int(config.max_shard_gb * 1e9),
    )  # fmt: skip
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    dense = made.base.model.num_parameters() * dense_dtype.itemsize
    errors = sorted(made.errors.items(), key=lambda item: -item[1])
    console.print(made.plan.table(shapes))
    console.print(_summary(made, stored, dense, errors, time.perf_counter() - start, folder))
    return {
        "scheme": config.scheme or "plan", "bits_per_weight": round(made.plan.bits_per_weight(shapes), 4),
        "bytes": stored, "dense_bytes": dense, "largest_error": errors[0][1] if errors else None,
        "mean_error": sum(made.errors.values()) / len(errors) if errors else None,
        "calibration_tokens": made.origin.calibration_tokens, "fingerprint": fingerprint,
        "peak_memory_bytes": peak_memory_bytes(), "output_dir": config.output_dir,
        "seconds": round(time.perf_counter() - start, 3),
    }  # fmt: skip


def _make(config: QuantizeConfig, path: Path, compute: Compute, bar: Bar, console: Console) -> Made:
    if config.lora_weights is not None or config.scheme == "mixed":
        return _in_memory(config, compute, bar, console)
    if config.needs_calibration or (config.plan is not None and config.calibration_data is not None):
        return _over_rows(config, path, compute, bar)
    return _from_weights(config, compute, bar)


def _plan_of(config: QuantizeConfig, model: CausalLM) -> Plan:
    if config.plan is not None:
        return Plan.from_file(model, config.plan)
    return Plan.uniform(model, str(config.scheme), config.settings())


def _rows(config: QuantizeConfig, tokenizer: Tokenizer) -> list[torch.Tensor]:
    if config.calibration_data is None:
        return []
    return calibration_rows(
        config.calibration_data, config.calibration_tokens, tokenizer, template=config.prompt_template_name,
        system_prompt=config.system_prompt,
    )  # fmt: skip


def _origin(config: QuantizeConfig, base_fingerprint: str, rows: list[torch.Tensor], adapter: str = "") -> Origin:
    return Origin(
        config.base_model, base_fingerprint, int4_method=config.int4_method if rows else "round",
        calibration_sha256=rows_sha256(rows) if rows else "", calibration_tokens=sum(map(len, rows)),
        adapter_sha256=adapter, version=__version__,
    )  # fmt: skip


def _from_weights(config: QuantizeConfig, compute: Compute, bar: Bar) -> Made:
    """Each linear as it is read: the dense model never exists."""
    errors: dict[str, float] = {}

    def on_read(name: str, linear: QuantizedLinear, weight: torch.Tensor | None) -> None:
        assert weight is not None
        errors[name] = linear.relative_error(weight)
        bar(len(errors), num_linears[0], name)

    num_linears = [0]
    plans: list[Plan] = []

    def on_plan(plan: Plan, dense_fingerprint: str) -> None:
        num_linears[0] = len(plan.schemes)
        plans.append(plan)
        fingerprints.append(dense_fingerprint)

    fingerprints: list[str] = []
    base = load_base(
        config.base_model, compute, quantize=None if config.scheme is None else str(config.scheme),
        settings=config.settings(), plan_file=config.plan, on_read=on_read, on_plan=on_plan,
    )  # fmt: skip
    return Made(base, plans[0], _origin(config, fingerprints[0], []), errors)


def _over_rows(config: QuantizeConfig, path: Path, compute: Compute, bar: Bar) -> Made:
    """Layer by layer: one dense layer at a time."""
    rows: list[torch.Tensor] = []

    def rows_of(tokenizer: Tokenizer) -> list[torch.Tensor]:
        rows.extend(_rows(config, tokenizer))
        return rows

    base, plan, errors = quantize_source(
        path, compute, lambda model: _plan_of(config, model), rows_of, int4_method=config.int4_method, on_progress=bar
    )
    return Made(base, plan, _origin(config, base.fingerprint, rows), errors)


def _in_memory(config: QuantizeConfig, compute: Compute, bar: Bar, console: Console) -> Made:
    """The dense model in float32, an adapter folded in; then the plan, then its linears one by one."""
    base = load_base(config.base_model, replace(compute, dtype=torch.float32))
    record, digest = None, ""
    if config.lora_weights is not None:
        adapter, record = load_adapter(config.lora_weights, base.model, base.fingerprint)
        adapter.merge()
        digest = file_sha256(Path(config.lora_weights) / "adapter_model.safetensors")
    rows = _rows(config, base.tokenizer)
    if config.scheme == "mixed":
        plan, table = mixed_plan(
            base, rows, bits=config.bits, max_perplexity_increase=config.max_perplexity_increase, on_progress=bar
        )
        console.print(table)
    else:
        plan = _plan_of(config, base.model)
    plan, errors = quantize_model(base, plan, rows, int4_method=config.int4_method, on_progress=bar)
    return Made(base, plan, _origin(config, base.fingerprint, rows, digest), errors, record)


def _summary(
    made: Made, stored: int, dense: int, errors: list[tuple[str, float]], seconds: float, folder: Path
) -> Table:  # fmt: skip
    table = Table.grid(padding=(0, 2))
    lines: dict[str, str] = {
        "written to": str(folder),
        "size": f"{stored / 1e6:,.1f} MB, {stored / dense:.0%} of the {dense / 1e6:,.1f} MB of the dense model",
        "time": f"{seconds:.1f} s",
    }
    if made.origin.calibration_tokens:
        lines["calibrated on"] = f"{made.origin.calibration_tokens:,} tokens"
    if errors:
        what = "of the output" if made.origin.calibration_tokens else "of the weight"
        lines["mean error"] = f"{sum(value for _, value in errors) / len(errors):.2%} {what}, relative"
        lines["largest errors"] = ", ".join(f"{name} {value:.2%}" for name, value in errors[:WORST_SHOWN])
    for label, value in lines.items():
        table.add_row(label, value)
    return table
