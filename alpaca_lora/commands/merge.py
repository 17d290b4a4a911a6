"""`alpaca-lora merge`: fold an adapter into its base model and write the result as a Hugging Face folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from alpaca_lora.adapters.base import Adapter, method_class
from alpaca_lora.adapters.merge import (
    MergeReport,
    check_free,
    difference,
    merge_into_folder,
    prompt_logits,
    storage_dtype,
)
from alpaca_lora.adapters.peft_format import load_adapter, method_of, read_config
from alpaca_lora.adapters.record import AdapterRecord
from alpaca_lora.commands.base_model import open_base
from alpaca_lora.commands.job import speaker
from alpaca_lora.commands.schemas import MergeConfig
from alpaca_lora.config import Resolved
from alpaca_lora.data.classes import some
from alpaca_lora.device import DTYPES, Compute, pick_compute
from alpaca_lora.errors import AdapterError, AlpacaLoraError, ConfigError
from alpaca_lora.models.classifier import find_score
from alpaca_lora.models.load import Base, load_base, packed_linears
from alpaca_lora.quantization.folder import is_quantized, read_origin


def run(config: MergeConfig, *, resolved: Resolved[MergeConfig], console: Console) -> dict[str, Any]:
    """Returns max_logit_difference mean_logit_difference mean_adapter_effect bound merge_dtype output_dir seconds; and
    for an adapter that was trained on a quantized base merge_onto and original_logit_difference.
    """
    start = time.perf_counter()
    # what needs no model is judged before one is loaded
    check_free(config.output_dir)
    require_mergeable(config.lora_weights)
    # merged in float32 whatever is stored in the end
    compute = replace(pick_compute(config.device, "float32", config.num_threads), dtype=torch.float32)
    say = speaker(console)
    base = open_base(config, compute, lora_weights=config.lora_weights, say=say)
    say(f"base model: {base.description}")
    is_packed = bool(packed_linears(base.model))
    if config.merge_onto == "original" and not is_packed:
        raise ConfigError("the base is dense, there is no other", field="merge_onto", fix="leave it out")
    dtype = _storage_dtype(config, base)
    adapter, record = load_adapter(config.lora_weights, base.model, base.fingerprint)
    for message in (*base.notices, *adapter.messages):
        say(message)
    onto: dict[str, Any] = {}
    if is_packed:
        original, onto = _original(config, base, record, compute, say)
        if config.merge_onto == "original":
            assert original is not None
            base, adapter, dtype = original
    report = merge_into_folder(
        base, adapter, config.output_dir, compute, record=record, dtype=dtype,
        bound=config.max_logit_difference, max_shard_bytes=int(config.max_shard_gb * 1e9),
    )  # fmt: skip
    score = find_score(base.model)
    _show(report, record, () if score is None else score.labels, console)
    return {
        "max_logit_difference": report.max_logit_difference,
        "mean_logit_difference": report.mean_logit_difference,
        "mean_adapter_effect": report.mean_adapter_effect,
        "bound": report.bound,
        "merge_dtype": str(report.dtype).removeprefix("torch."),
        "output_dir": str(report.folder),
        "seconds": round(time.perf_counter() - start, 3),
        **onto,
    }


def require_mergeable(lora_weights: str) -> None:
    """AdapterError when the adapter is no change of weights; other errors as `read_config`."""
    method = method_class(method_of(read_config(lora_weights)))
    if not method.mergeable:
        raise AdapterError(
            f"is of method {method.method}, which is no change of any weight and cannot be merged",
            file=lora_weights, field="lora_weights", fix="generate takes the folder beside its base model",
        )  # fmt: skip


def _storage_dtype(config: MergeConfig, base: Base) -> torch.dtype:
    """Of the merged weights; ``base`` carries no adapter yet."""
    return DTYPES[config.dtype] if config.dtype != "auto" else storage_dtype(base.model)


def _original(
    config: MergeConfig, base: Base, record: AdapterRecord | None, compute: Compute, say: Callable[[str], None]
) -> tuple[tuple[Base, Adapter, torch.dtype] | None, dict[str, Any]]:
    """(the dense base that the packed ``base`` was made of, the adapter on it, the dtype to store), and how far its
    logits are from those that were trained, as JSON. None where the dense base cannot be had and is not asked for.
    """
    nothing: dict[str, Any] = {"merge_onto": "dequantized", "original_logit_difference": None}
    if record is not None and record.makes_up_for_rounding:
        what = "the adapter makes up for what quantizing took from the weights; the original ones still have it"
        if config.merge_onto == "original":
            raise AdapterError(what, file=config.lora_weights, field="merge_onto", expected="dequantized")
        say(f"nothing is said of merging into the dense weights: {what}")
        return None, nothing
    trained = prompt_logits(base)
    origin = read_origin(base.path) if is_quantized(base.path) else None
    name = config.base_model if origin is None else origin.base_model
    try:
        dense = load_base(name, compute)
        if origin is not None and (what := origin.why_not(dense.fingerprint)):
            raise AdapterError(f"is not what {base.path} was made of: {what}", field="merge_onto")
    except AlpacaLoraError as error:
        if config.merge_onto == "original":
            raise
        say(f"nothing is said of merging into the dense weights, since they are not at hand: {error}")
        return None, nothing
    dtype = _storage_dtype(config, dense)
    adapter, _ = load_adapter(config.lora_weights, dense.model, ignore_base_mismatch=True)
    largest, mean = difference(trained, prompt_logits(dense))
    say(
        f"into the dense weights of {name}: logits differ from the trained ones by {largest:.3g} at most, {mean:.3g} "
        "on average, because the adapter was trained beside the quantized ones"
    )
    onto = {
        "merge_onto": config.merge_onto,
        "original_logit_difference": mean,
        "original_max_logit_difference": largest,
    }
    return (dense, adapter, dtype), onto


def _show(report: MergeReport, record: AdapterRecord | None, labels: Sequence[str], console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    for label, value in (
        ("merged into", str(report.folder)),
        ("stored as", str(report.dtype).removeprefix("torch.")),
        ("largest logit difference", f"{report.max_logit_difference:.3g} (accepted: up to {report.bound:.3g})"),
        ("mean logit difference", f"{report.mean_logit_difference:.3g} over {report.num_tokens} tokens"),
        ("mean effect of the adapter", f"{report.mean_adapter_effect:.3g}"),
    ):
        table.add_row(label, value)
    console.print(table, highlight=False, markup=False)
    if labels:
        told = f"a classifier of {some(labels)}: generate and transformers take the labels from its config.json"
        console.print(told, markup=False, highlight=False)
    elif record is not None and record.template.get("name"):
        name = record.template["name"]
        console.print(f"its template ({name}) is in the folder: generate takes it from there", markup=False)
