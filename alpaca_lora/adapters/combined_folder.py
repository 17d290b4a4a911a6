"""Adapter folders of one base -> one folder that holds their combination: what must agree, and what is written.

Knows folders, configurations and records; the arithmetic is `adapters/combine.py`. Loads no base model.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from alpaca_lora import __version__
from alpaca_lora.adapters.combine import Combination, Update, combine
from alpaca_lora.adapters.lora_config import DEFAULTS, SAFE_INITIALISATIONS, check_config, settings
from alpaca_lora.adapters.overlap import Overlap, overlap
from alpaca_lora.adapters.peft_format import CONFIG_NAME, WEIGHTS_NAME, read_config, read_tensors, write_adapter
from alpaca_lora.adapters.record import RECORD_NAME, AdapterRecord, read_record
from alpaca_lora.errors import AdapterError, ConfigError, NumericalError

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# of the records: what decides how a model is asked and when it stops. An empty text is "not known".
_SAME = (
    "template",
    "system_prompt",
    "stop_ids",
    "stop_strings",
    "add_bos",
    "add_eos",
    "tokenizer_fingerprint",
    "labels",
)


@dataclass(frozen=True, slots=True)
class Source:
    """One adapter folder as read. updates: module name -> float32 factors and scale, in the file's order."""

    folder: Path
    config: dict[str, Any]
    record: AdapterRecord | None
    updates: dict[str, Update]
    messages: list[str]


@dataclass(frozen=True, slots=True)
class Combined:
    """What was written. ranks: smallest and largest of a module. messages: what the user should be told."""

    folder: Path
    num_modules: int
    ranks: tuple[int, int]
    overlap: Overlap
    messages: list[str]


def combine_folders(
    folders: Sequence[str | PathLike[str]], weights: Sequence[float], how: Combination, output: str | PathLike[str]
) -> Combined:
    """Read the adapters, combine them, write the result as a complete folder at `output`.

    ConfigError: fewer than two folders, weights that do not fit. AdapterError: a folder that is no plain LoRA, shapes,
    bases, templates or stop ids that differ (both folders are named), a result that changes nothing. NumericalError: a
    result that is not finite. The errors of reading and writing are those of `peft_format`.
    """
    if len(folders) < 2:
        raise ConfigError(f"{len(folders)} adapter", field="lora_weights", expected="at least two folders")
    sources = [read_source(folder) for folder in folders]
    messages = [message for source in sources for message in source.messages]
    _check_shapes(sources)
    record, told = _joined_record(sources, weights, how)
    messages += told + _made_up_for(sources, weights)
    inputs = [source.updates for source in sources]
    result = combine(inputs, weights, how)
    alone = sum(not all(name in updates for updates in inputs) for name in result)
    if alone:
        messages.append(
            f"{alone} of {len(result)} modules are not changed by every adapter: combined from those that do"
        )
    for name, update in result.items():
        if not (torch.isfinite(update.lora_A).all() and torch.isfinite(update.lora_B).all()):
            raise NumericalError("the combined update holds NaN or Inf", field=name, fix="choose smaller weights")
    measured = overlap(inputs, weights, result)
    if measured.norm == 0:
        raise AdapterError("the result changes nothing: every update is zero", fix="choose other weights or density")
    if record is not None:
        figures = {"combined_norm": measured.norm, "combined_distance": measured.distance}
        record = dataclasses.replace(record, metrics=figures)
    write_adapter(output, _tensors(result), _config(sources, result), record)
    ranks = [update.rank for update in result.values()]
    return Combined(Path(output), len(result), (min(ranks), max(ranks)), measured, messages)


def _made_up_for(sources: Sequence[Source], weights: Sequence[float]) -> list[str]:
    """A message when adapters that hold what quantizing took from the base do not add up to holding it once."""
    begun = [
        weight
        for source, weight in zip(sources, weights, strict=True)
        if source.record is not None and source.record.makes_up_for_rounding
    ]
    if not begun or math.isclose(sum(begun), 1, abs_tol=1e-3):
        return []
    return [
        f"{len(begun)} of the adapters make up for what quantizing took from the base, with weights that sum to "
        f"{sum(begun):.3g}: it is made up for {sum(begun):.3g} times; weights that sum to 1 keep it once"
    ]


def read_source(folder: str | PathLike[str]) -> Source:
    """Read one folder, ours or PEFT's. AdapterError for anything but plain LoRA on linears of the base as it is."""
    root = Path(folder)
    config = read_config(root)
    file = root / CONFIG_NAME
    if config["peft_type"] != "LORA":
        raise AdapterError(
            f"{config['peft_type']} adapters cannot be combined", file=file, field="peft_type", expected="LORA"
        )
    for key, what in (
        ("use_dora", "DoRA's magnitudes cannot be added"),
        ("modules_to_save", "modules that were trained wholly cannot be added"),
    ):
        if config.get(key):
            raise AdapterError(what, file=file, field=key, expected="a LoRA adapter without them")
    start = config.get("init_lora_weights", True)
    if not any(start is safe or (isinstance(start, str) and start == safe) for safe in SAFE_INITIALISATIONS):
        raise AdapterError(
            f"{start!r} took a part out of the base weights: its update is to another base", file=file,
            field="init_lora_weights", expected="a LoRA adapter for the base as it is",
        )  # fmt: skip
    messages = check_config(config, file=file)
    record = read_record(root)
    updates = _updates(root / WEIGHTS_NAME, config, read_tensors(root, record))
    if record is None:
        messages.append(f"{root}: no {RECORD_NAME}: its base, template and stop ids are not known to be the others'")
    if not any(bool(update.lora_B.any()) for update in updates.values()):
        messages.append(f"{root}: the adapter changes nothing: every lora_B is zero")
    return Source(root, config, record, updates, messages)


def _updates(file: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Update]:
    """The pairs of A and B, each with the rank and scale that the configuration says."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim != 2:
            raise AdapterError(f"{key} {tuple(tensor.shape)} is no LoRA matrix of a linear", file=file)
        pairs.setdefault(match.group(1), {})[match.group(2)] = tensor.float()
    if not pairs:
        raise AdapterError("holds no tensors", file=file)
    updates: dict[str, Update] = {}
    for name, setting in settings(config, pairs).items():
        a, b = pairs[name].get("A"), pairs[name].get("B")
        if a is None or b is None:
            raise AdapterError(f"lora_{'A' if a is None else 'B'} is missing", file=file, field=name)
        if not a.shape[0] == b.shape[1] == setting.rank:
            raise AdapterError(
                f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}", file=file, field=name,
                expected=f"rank {setting.rank}, as {CONFIG_NAME} says",
            )  # fmt: skip
        updates[name] = Update(a, b, setting.scale)
    return updates


def _check_shapes(sources: Sequence[Source]) -> None:
    seen: dict[str, tuple[Source, tuple[int, int]]] = {}
    for source in sources:
        for name, update in source.updates.items():
            shape = (update.lora_B.shape[0], update.lora_A.shape[1])
            first, other = seen.setdefault(name, (source, shape))
            if other != shape:
                raise AdapterError(
                    f"{first.folder} changes a weight of shape {other}, {source.folder} one of shape {shape}",
                    field=name, expected="adapters of the same base model",
                )  # fmt: skip


def _joined_record(
    sources: Sequence[Source], weights: Sequence[float], how: Combination
) -> tuple[AdapterRecord | None, list[str]]:
    """The record of the result, and what the user should be told. AdapterError when two records disagree."""
    known = [(source, source.record) for source in sources if source.record is not None]
    messages: list[str] = []
    names = dict.fromkeys(str(base) for source in sources if (base := source.config.get("base_model_name_or_path")))
    fingerprints = {record.base_fingerprint for _, record in known if record.base_fingerprint}
    if len(names) > 1 and (len(known) < len(sources) or not fingerprints):
        messages.append(f"the adapters name different bases: {', '.join(names)}")
    if not known:
        return None, messages
    for other in known[1:]:
        _check_agreement(known[0], other)
    first = known[0][1]
    hashes: dict[str, str] = {}
    for source, record in known:
        for path, digest in record.data_hashes.items():
            hashes[path if hashes.get(path, digest) == digest else f"{source.folder}: {path}"] = digest
    made = {
        "lora_weights": [str(source.folder) for source in sources],
        "adapter_sha256": [source.record.adapter_sha256 if source.record else "" for source in sources],
        "combination_weights": list(weights), "combination": how.kind, "density": how.density,
        "majority_sign_method": how.majority_sign_method, "svd_rank": how.svd_rank, "seed": how.seed,
    }  # fmt: skip
    if any(record.makes_up_for_rounding for _, record in known):
        made["init_lora_weights"] = "rounding_error"
    return dataclasses.replace(first, data_hashes=hashes, config=made, metrics={}, version=__version__), messages


def _check_agreement(one: tuple[Source, AdapterRecord], other: tuple[Source, AdapterRecord]) -> None:
    for key in ("base_fingerprint", *_SAME):
        mine, theirs = getattr(one[1], key), getattr(other[1], key)
        unknown = key.endswith("fingerprint") and not (mine and theirs)
        if mine == theirs or unknown:
            continue
        shown = [_shown(key, record) for record in (one[1], other[1])]
        if shown[0] == shown[1]:
            shown[1] = f"another {shown[1]}"
        raise AdapterError(
            f"{one[0].folder} has {shown[0]}, {other[0].folder} has {shown[1]}", field=key,
            expected="adapters that were trained on one base and are asked and stopped in one way",
        )  # fmt: skip


def _shown(key: str, record: AdapterRecord) -> str:
    if key == "template":
        return f"template {record.template.get('name', '(none)')!r}"
    if key == "base_fingerprint":
        return f"{record.base_model} with fingerprint {record.base_fingerprint}"
    return repr(getattr(record, key))[:80]


def _tensors(result: Mapping[str, Update]) -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.{name}.lora_{matrix}.weight": factor.contiguous()
        for name, update in result.items()
        for matrix, factor in (("A", update.lora_A), ("B", update.lora_B))
    }


def _config(sources: Sequence[Source], result: Mapping[str, Update]) -> dict[str, Any]:
    """alpha is the rank everywhere, so that the scale is 1; modules of another rank stand in both patterns."""
    rank = max(update.rank for update in result.values())
    # `^` and escapes: as PEFT reads them, patterns are expressions that may match the end of a longer name
    others = {f"^{re.escape(name)}": update.rank for name, update in result.items() if update.rank != rank}
    first = sources[0].config
    tasks = {source.config.get("task_type") for source in sources}
    return {
        **DEFAULTS,
        "base_model_name_or_path": first.get("base_model_name_or_path"),
        "r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": dict(others),
        "target_modules": _target_modules(sources, result),
        "task_type": first.get("task_type") if len(tasks) == 1 else None,
    }  # fmt: skip


def _target_modules(sources: Sequence[Source], result: Mapping[str, Update]) -> list[str]:
    """The union of the inputs' names where these are names and all that decides; else the modules' whole names."""
    narrowed = ("exclude_modules", "layers_to_transform", "layers_pattern")
    plain = all(
        isinstance(source.config["target_modules"], list) and not any(source.config.get(key) for key in narrowed)
        for source in sources
    )
    if plain:
        return sorted({name for source in sources for name in source.config["target_modules"]})
    return sorted(result)
