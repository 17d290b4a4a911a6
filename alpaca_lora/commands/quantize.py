"""`alpaca-lora quantize`: a dense base model -> a folder with its weights in fewer bits.

Three ways, by what the plan needs: linear by linear from the file (nothing but the weights); layer by layer over sample
rows (calibrated schemes, gptq, awq); in memory, where an adapter is folded in or a mixed plan is looked for first.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alpaca_lora import __version__
from alpaca_lora.adapters.base import Adapter
from alpaca_lora.adapters.merge import check_free, folder_config, folder_files, save_tokenizer
from alpaca_lora.adapters.peft_format import WEIGHTS_NAME, load_adapter
from alpaca_lora.adapters.record import AdapterRecord, read_record
from alpaca_lora.commands.bar import Bar
from alpaca_lora.commands.calibration_rows import calibration_rows, rows_sha256
from alpaca_lora.commands.job import speaker
from alpaca_lora.commands.merge import require_mergeable
from alpaca_lora.commands.schemas import QuantizeConfig
from alpaca_lora.config import Resolved
from alpaca_lora.device import DTYPES, Compute, peak_memory_bytes, pick_compute
from alpaca_lora.errors import ConfigError
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.load import Base
from alpaca_lora.quantization.calibrate import quantize_model, quantize_source
from alpaca_lora.quantization.folder import Origin, is_quantized, read_origin, write_quantized
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.load import by_rows, load_base, packed_fingerprint
from alpaca_lora.quantization.mixed import Budget, mixed_plan, quantize_source_mixed
from alpaca_lora.quantization.plan import Plan, linear_shapes, scheme_settings
from alpaca_lora.quantization.qat import fold
from alpaca_lora.text.tokenizer import Tokenizer
from alpaca_lora.weights.hub import resolve
from alpaca_lora.weights.safetensors_file import file_sha256

WORST_SHOWN, WORST_KEPT = 3, 10


@dataclass
class Made:
    """A model with packed linears. errors: linear -> relative error of its weight, or of its output on the rows
    (``errors_of``). record: of an adapter that is in the weights.
    """

    base: Base
    plan: Plan
    origin: Origin
    errors: dict[str, float]
    errors_of: str = "weight"
    record: AdapterRecord | None = None

    def statistics(self) -> dict[str, Any]:
        """The mean and the largest errors, for quantization.json."""
        worst = sorted(self.errors.items(), key=lambda item: -item[1])[:WORST_KEPT]
        mean = sum(self.errors.values()) / len(self.errors)
        return {"relative_errors_of": self.errors_of, "mean": mean, "largest": [list(one) for one in worst]}


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
            fix=f"give the model that it was made of ({read_origin(path).base_model})",
        )  # fmt: skip
    compute = pick_compute(config.device, config.dtype, config.num_threads)
    dense_dtype = torch.bfloat16 if config.dtype == "auto" else DTYPES[config.dtype]
    say = speaker(console)
    if path.is_file():
        say(f"{path.name}: weights that the file holds in blocks are rounded a second time")
    bar = Bar(console, "quantizing")
    with bar.progress:
        made = _make(config, path, compute, bar, console)
    for notice in made.base.notices:
        say(notice)
    fingerprint = packed_fingerprint(made.origin, made.plan)
    folder = _write(config, made, fingerprint, dense_dtype)
    shapes = linear_shapes(made.base.model)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    dense = made.base.model.num_parameters() * dense_dtype.itemsize
    statistics = made.statistics()
    console.print(made.plan.table(shapes, dense_bits=8 * dense_dtype.itemsize))
    console.print(_summary(made, stored, dense, time.perf_counter() - start, folder), highlight=False)
    return {
        "scheme": config.scheme or "plan", "bits_per_weight": round(made.plan.bits_per_weight(shapes), 4),
        "bytes": stored, "dense_bytes": dense, "largest_error": max(made.errors.values()),
        "mean_error": statistics["mean"], "calibration_tokens": made.origin.calibration_tokens,
        "fingerprint": fingerprint, "peak_memory_bytes": peak_memory_bytes(), "output_dir": config.output_dir,
        "seconds": round(time.perf_counter() - start, 3),
    }  # fmt: skip


def _write(config: QuantizeConfig, made: Made, fingerprint: str, dense_dtype: torch.dtype) -> Path:
    base, record = made.base, made.record
    if record is None and base.path.is_dir():
        record = read_record(base.path)  # of an adapter that was merged into the base: template and stop tokens
    return write_quantized(
        config.output_dir, base.model, made.plan, replace(made.origin, statistics=made.statistics()),
        fingerprint=fingerprint, config=folder_config(base, dense_dtype, record), dense_dtype=dense_dtype,
        tokenizer_saver=partial(save_tokenizer, base, record), extra_files=folder_files(base, record),
        max_shard_bytes=int(config.max_shard_gb * 1e9),
    )  # fmt: skip


def _make(config: QuantizeConfig, path: Path, compute: Compute, bar: Bar, console: Console) -> Made:
    if config.lora_weights is not None:
        return _with_adapter(config, config.lora_weights, compute, bar, console)
    if config.needs_calibration or (config.plan is not None and config.calibration_data is not None):
        return _over_rows(config, path, compute, bar, console)
    return _from_weights(config, compute, bar)


def _plan_of(config: QuantizeConfig, model: CausalLM) -> Plan:
    if config.plan is not None:
        return Plan.from_file(model, config.plan, field="plan")
    return Plan.uniform(model, str(config.scheme), scheme_settings(config))


def _rows(config: QuantizeConfig, tokenizer: Tokenizer) -> list[torch.Tensor]:
    if config.calibration_data is None:
        return []
    return calibration_rows(
        config.calibration_data, config.calibration_tokens, tokenizer, template=config.prompt_template_name,
        system_prompt=config.system_prompt,
    )  # fmt: skip


def _origin(config: QuantizeConfig, base_fingerprint: str, rows: list[torch.Tensor], adapter: str = "") -> Origin:
    return Origin(
        config.base_model, base_fingerprint, rounding=config.rounding if rows else "nearest",
        calibration_sha256=rows_sha256(rows) if rows else "", calibration_tokens=sum(map(len, rows)),
        adapter_sha256=adapter, version=__version__,
    )  # fmt: skip


def _from_weights(config: QuantizeConfig, compute: Compute, bar: Bar) -> Made:
    """Each linear as it is read: the dense model never exists."""
    errors: dict[str, float] = {}
    known: list[tuple[Plan, str]] = []

    def on_plan(plan: Plan, dense_fingerprint: str) -> None:
        _refuse_missing_rows(plan)
        known.append((plan, dense_fingerprint))

    def on_read(name: str, linear: QuantizedLinear, weight: torch.Tensor | None) -> None:
        assert weight is not None
        errors[name] = linear.relative_error(weight)
        bar(len(errors), len(known[0][0].schemes), name)

    base = load_base(config.base_model, compute, plan_of=partial(_plan_of, config), on_read=on_read, on_plan=on_plan)
    plan, fingerprint = known[0]
    return Made(base, plan, _origin(config, fingerprint, []), errors)


def _refuse_missing_rows(plan: Plan) -> None:
    if name := plan.made_on_rows():
        raise ConfigError(
            f"missing: scheme {plan.schemes[name].name} of {name} is made by running the model on rows",
            field="calibration_data", expected="a text file, or any data file",
        )  # fmt: skip


def _over_rows(config: QuantizeConfig, path: Path, compute: Compute, bar: Bar, console: Console) -> Made:
    """Layer by layer: one dense layer at a time."""
    rows: list[torch.Tensor] = []
    how: dict[str, Any] = {"rounding": config.rounding, "on_progress": bar}

    def rows_of(tokenizer: Tokenizer) -> list[torch.Tensor]:
        rows.extend(_rows(config, tokenizer))
        return rows

    if config.scheme == "mixed":
        base, plan, errors, table = quantize_source_mixed(path, compute, _budget(config), rows_of, **how)
        console.print(table)
    else:
        base, plan, errors = quantize_source(path, compute, partial(_plan_of, config), rows_of, **how)
    return _made(config, base, plan, rows, errors)


def _budget(config: QuantizeConfig) -> Budget:
    return Budget(config.bits, config.max_perplexity_increase)


def _made(
    config: QuantizeConfig, base: Base, plan: Plan, rows: list[torch.Tensor], errors: dict[str, float],
    adapter: _Adapter | None = None,
) -> Made:  # fmt: skip
    """What came out of a dense base that may have been run on ``rows``."""
    errors_of = "output" if by_rows(config.rounding, plan) else "weight"
    origin = _origin(config, base.fingerprint, rows, adapter.digest if adapter else "")
    return Made(base, plan, origin, errors, errors_of, adapter.record if adapter else None)


def _with_adapter(config: QuantizeConfig, folder: str, compute: Compute, bar: Bar, console: Console) -> Made:
    """The whole model in float32, or as a quantization-aware run had it, with the adapter on it; then its linears one
    by one.
    """
    adapter = _Adapter.read(folder)
    base = load_base(config.base_model, replace(compute, dtype=adapter.dtype))
    plan = _plan_of(config, base.model) if config.scheme != "mixed" else None
    rows = _rows(config, base.tokenizer)
    if plan is not None and not rows:
        _refuse_missing_rows(plan)
    adapter.put_on(base, plan, speaker(console))
    if plan is not None and not by_rows(config.rounding, plan) and adapter.lies_in(plan):
        return _made(config, base, plan, [], fold(base.model, plan, on_progress=bar), adapter)
    adapter.merge(base)
    how: dict[str, Any] = {"rounding": config.rounding, "on_progress": bar}
    if plan is None:
        budget: dict[str, Any] = dataclasses.asdict(_budget(config))
        plan, table = mixed_plan(base, rows, **budget, **how)
        console.print(table)
    plan, errors = quantize_model(base, plan, rows, **how)
    return _made(config, base, plan, rows, errors, adapter)


@dataclass
class _Adapter:
    """An adapter folder that is to be in the weights. dtype: of the base that it is put on."""

    folder: Path
    record: AdapterRecord | None
    dtype: torch.dtype
    digest: str
    adapter: Adapter | None = None

    @classmethod
    def read(cls, name: str) -> _Adapter:
        """What needs no model is judged before one is loaded."""
        require_mergeable(name)
        folder = Path(name)
        record = read_record(folder)
        trained_for = record.quantization_aware if record is not None else {}
        dtype = DTYPES.get(str(trained_for.get("dtype")), torch.float32)
        return cls(folder, record, dtype, file_sha256(folder / WEIGHTS_NAME))

    def put_on(self, base: Base, plan: Plan | None, say: Callable[[str], None]) -> None:
        """Load it; says so when it was trained for another form of the weights than ``plan``."""
        trained_for = self.record.quantization_aware if self.record is not None else {}
        wanted = Plan.uniform(base.model, trained_for["scheme"], trained_for.get("settings")) if trained_for else None
        if wanted is not None and (plan is None or plan.digest() != wanted.digest()):
            say(f"warning: the adapter was trained for {wanted.summary(linear_shapes(base.model))}, not for this")
        self.adapter, self.record = load_adapter(self.folder, base.model, base.fingerprint)
        for message in self.adapter.messages:
            say(message)

    def lies_in(self, plan: Plan) -> bool:
        """Whether every linear that it changes is one of the plan."""
        return set(getattr(self.adapter, "layers", {})) <= plan.schemes.keys()

    def merge(self, base: Base) -> None:
        """Into the base's weights, in float32."""
        assert self.adapter is not None
        base.model.float()
        self.adapter.merge()


def _summary(made: Made, stored: int, dense: int, seconds: float, folder: Path) -> Table:
    table = Table.grid(padding=(0, 2))
    shown = made.statistics()["largest"][:WORST_SHOWN]
    lines: dict[str, str] = {
        "written to": str(folder),
        "size": f"{stored / 1e6:,.1f} MB, {stored / dense:.0%} of the {dense / 1e6:,.1f} MB of the dense model",
        "time": f"{seconds:.1f} s",
        "mean error": f"{made.statistics()['mean']:.2%} of the {made.errors_of}'s norm",
        "largest errors": ", ".join(f"{name} {value:.2%}" for name, value in shown),
    }
    if made.origin.calibration_tokens:
        lines["run on"] = f"{made.origin.calibration_tokens:,} tokens"
    for label, value in lines.items():
        table.add_row(label, escape(value))
    return table
