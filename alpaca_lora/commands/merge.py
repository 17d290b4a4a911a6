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
    method = method_class(method_of(read_config(config.lora_weights)))
    if not method.mergeable:
        raise AdapterError(
            f"is of method {method.method}, which is no change of any weight and cannot be merged",
            file=config.lora_weights, field="lora_weights", fix="generate takes the folder beside its base model",
        )  # fmt: skip
    # merged in float32 whatever is stored in the end
    compute = replace(pick_compute(config.device, "float32", config.num_threads), dtype=torch.float32)
    say = speaker(console)
    base = open_base(config, compute, lora_weights=config.lora_weights, say=say)
    say(f"base model: {base.description}")
    adapter, record = load_adapter(config.lora_weights, base.model, base.fingerprint)
    for message in (*base.notices, *adapter.messages):
        say(message)
    onto: dict[str, Any] = {}
    if packed_linears(base.model):
        base, adapter, onto = _onto_original(config, base, adapter, compute, say)
    elif config.merge_onto == "original":
        raise ConfigError("the base is dense, there is no other", field="merge_onto", fix="leave it out")
    dtype = DTYPES[config.dtype] if config.dtype != "auto" else storage_dtype(base.model)
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


def _onto_original(
    config: MergeConfig, base: Base, adapter: Adapter, compute: Compute, say: Callable[[str], None]
) -> tuple[Base, Adapter, dict[str, Any]]:
    """(base and adapter to merge, what to report) of an adapter that was trained on the packed ``base``: how far the
    dense base with the same adapter is from what was trained, and, if that is asked for, that base in its place.
    """
    trained = prompt_logits(base)
    name = read_origin(base.path).base_model if is_quantized(base.path) else config.base_model
    try:
        dense = load_base(name, compute)
    except AlpacaLoraError as error:
        if config.merge_onto == "original":
            raise
        say(f"the dense model cannot be loaded, so nothing is said of merging into it ({error})")
        return base, adapter, {"merge_onto": "dequantized", "original_logit_difference": None}
    dense_adapter, _ = load_adapter(config.lora_weights, dense.model, base.fingerprint)
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
    return (dense, dense_adapter, onto) if config.merge_onto == "original" else (base, adapter, onto)


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
