"""An adapter folder of a stranger: all that can be wrong with it is found before its weights are read.

Knows files, PEFT's configurations and the base; what is found good becomes a `LoadedAdapter`. Reads no pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alpaca_lora.adapters import adalora_config, lora_config
from alpaca_lora.adapters.base import method_class
from alpaca_lora.adapters.lora_config import Setting
from alpaca_lora.adapters.peft_format import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    PICKLE_NAMES,
    WEIGHTS_NAME,
    method_of,
    read_config,
    read_tensors,
)
from alpaca_lora.adapters.record import RECORD_NAME, AdapterRecord, read_record
from alpaca_lora.adapters.targets import HEAD_OF_CLASSES, MAX_HINTS, peft_targets
from alpaca_lora.adapters.virtual_tokens import BASE_PREFIX, KNOWN
from alpaca_lora.adapters.whole_modules import CLASS_HEADS, PEFT_PREFIX
from alpaca_lora.device import available_memory_bytes
from alpaca_lora.errors import AdapterError, MachineError, ModelFileError, UserError
from alpaca_lora.inference.adapter_weights import AdapterWeights, num_bytes_of
from alpaca_lora.inference.banked_linear import BankRows
from alpaca_lora.inference.loaded_adapter import LoadedAdapter
from alpaca_lora.models.classifier import SCORE_WEIGHT, default_labels
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.weights.contained import contained_file
from alpaca_lora.weights.safetensors_file import Header, read_header

LOW_RANK = ("lora", "dora", "adalora")
VIRTUAL = ("prefix", "prompt")
MAX_RANK = 4096
STORED_AS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class ServedBase:
    """What adapters must fit. tokenizer_fingerprint: None where nobody knows it."""

    model: CausalLM
    fingerprint: str
    tokenizer_fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """A folder whose configuration, record and header fit each other and the base.

    shapes: PEFT key -> shape of what the file holds. settings: rank and scale of each linear, none for virtual tokens.
    labels: of a classifier. num_bytes: what it takes once it is loaded.
    """

    folder: Path
    base: ServedBase
    method: str
    record: AdapterRecord | None
    shapes: dict[str, tuple[int, ...]]
    settings: dict[str, Setting]
    labels: tuple[str, ...]
    num_bytes: int
    messages: tuple[str, ...]

    @classmethod
    def check(cls, folder: Path, base: ServedBase) -> CheckedAdapter:
        """Look at a folder without reading its weights.

        UserError: no such folder, pickled weights. ModelFileError: damaged files, links that lead out of the folder.
        AdapterError: of another base, a method that cannot stand beside others, settings that cannot be right, tensors
        that do not fit them. MachineError: no memory for it.
        """
        _check_files(folder)
        config = read_config(folder)
        record = read_record(folder)
        _check_base(folder, record, base)
        method = method_of(config)
        _refuse_unserved(folder, config, method)
        header = read_header(folder / WEIGHTS_NAME)
        labels = _labels(folder, config, record, header)
        if method in LOW_RANK:
            shapes, settings, messages = _low_rank(folder, config, method, base.model)
        else:
            shapes, settings = method_class(method).expected_shapes(base.model, config, file=folder / CONFIG_NAME), {}
            known = KNOWN | method_class(method).known  # pyright: ignore
            messages = [
                f"{folder / CONFIG_NAME}: {key}: unknown key, not used" for key in sorted(config.keys() - known)
            ]
        if labels:
            before = PEFT_PREFIX if method in LOW_RANK else BASE_PREFIX
            shapes[before + SCORE_WEIGHT] = len(labels), base.model.config.hidden_size
        _check_header(folder, header, shapes)
        num_bytes = num_bytes_of(base.model, method, shapes)
        checked = cls(
            folder, base, method, record, shapes, settings, labels, num_bytes, tuple(messages)
        )  # fmt: skip
        checked._check_memory()
        return checked

    def _check_memory(self) -> None:
        """MachineError when the machine has not the memory that reading it takes."""
        needed, available = self.num_bytes + (self.folder / WEIGHTS_NAME).stat().st_size, available_memory_bytes()
        if needed > available:
            raise MachineError(
                f"needs {needed / 1e6:.0f} MB, {available / 1e6:.0f} MB are free", file=self.folder,
                fix="unload other adapters",
            )  # fmt: skip

    def read(self, name: str, rows: BankRows) -> LoadedAdapter:
        """The adapter, under this name. ModelFileError: the file has changed since. NumericalError: weights that are
        not finite, or so large that outputs would not be.
        """
        tensors = read_tensors(self.folder, self.record)
        if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != self.shapes:
            raise ModelFileError("has changed while it was read", file=self.folder / WEIGHTS_NAME, fix="load it again")
        digest = self._digest(tensors)
        weights = AdapterWeights.make(
            self.base.model, self.method, self.settings, self.labels, tensors, rows, file=self.folder / WEIGHTS_NAME
        )
        return LoadedAdapter(
            name, self.folder, self.method, digest, self.num_bytes, self.record, updates=weights.updates,
            num_virtual=weights.num_virtual, prefix=weights.prefix, labels=self.labels, score=weights.score,
            messages=self.messages,
        )  # fmt: skip

    def _digest(self, tensors: Mapping[str, torch.Tensor]) -> str:
        """sha256 of the base, what is made of the tensors, and the tensors themselves."""
        made = [self.base.fingerprint, self.method, [[n, s.rank, s.scale] for n, s in sorted(self.settings.items())]]
        digest = hashlib.sha256(json.dumps(made).encode())
        for key, tensor in sorted(tensors.items()):
            digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _check_files(folder: Path) -> None:
    """What can be said of the files without opening one."""
    for name in (CONFIG_NAME, WEIGHTS_NAME, RECORD_NAME):
        if os.path.lexists(folder / name):
            size = contained_file(folder, name).stat().st_size
            if name != WEIGHTS_NAME and size > MAX_CONFIG_BYTES:
                raise ModelFileError(f"{size} bytes", file=folder / name, expected=f"at most {MAX_CONFIG_BYTES}")
    if os.path.lexists(folder / WEIGHTS_NAME):
        return
    pickles = [name for name in PICKLE_NAMES if os.path.lexists(folder / name)]
    file = folder / pickles[0] if pickles else folder
    if pickles or f"adapter_model{folder.suffix}" in PICKLE_NAMES:
        raise UserError(
            "is a pickle, which can run code and is never read", file=file, expected=f"a folder with {WEIGHTS_NAME}",
            fix="where you trust the file, load it with PEFT and save it again (save_pretrained writes safetensors)",
        )  # fmt: skip
    if os.path.lexists(folder / CONFIG_NAME):
        raise UserError(f"no {WEIGHTS_NAME}", file=folder, expected="a complete adapter folder")


def _check_base(folder: Path, record: AdapterRecord | None, base: ServedBase) -> None:
    if record is None:
        return
    for what, field, trained, served in (
        ("base model", "base_fingerprint", record.base_fingerprint, base.fingerprint),
        ("tokenizer", "tokenizer_fingerprint", record.tokenizer_fingerprint, base.tokenizer_fingerprint),
    ):
        if trained and served is not None and trained != served:
            raise AdapterError(
                f"was trained with another {what} ({record.base_model}): fingerprint {trained[:200]}, here {served}",
                file=folder / RECORD_NAME, field=field, fix="serve it with the base that it was trained on",
            )  # fmt: skip


def _refuse_unserved(folder: Path, config: Mapping[str, Any], method: str) -> None:
    file = folder / CONFIG_NAME
    if method not in LOW_RANK + VIRTUAL:
        what = "freeze, bitfit or full" if method == "freeze" else method
        raise AdapterError(
            f"an adapter of method {what} changes the base itself and cannot stand beside others", file=file,
            field="peft_type", expected="LoRA, DoRA, AdaLoRA, prefix or prompt tuning",
            fix="merge it into a model of its own (alpaca-lora merge) and serve that",
        )  # fmt: skip
    entries = config.get("modules_to_save")
    if not (entries is None or (isinstance(entries, list) and all(type(entry) is str for entry in entries))):
        raise AdapterError(f"is {str(entries)[:200]}", file=file, field="modules_to_save", expected="names of modules")
    if others := [entry for entry in entries or () if entry not in CLASS_HEADS]:
        raise AdapterError(
            f"{others[0][:200]!r} was trained wholly, so the base would be another for each adapter", file=file,
            field="modules_to_save", fix="merge it into a model of its own (alpaca-lora merge) and serve that",
        )  # fmt: skip


def _labels(
    folder: Path, config: Mapping[str, Any], record: AdapterRecord | None, header: Header
) -> tuple[str, ...]:  # fmt: skip
    """Of a classifier, in the order of its outputs; empty for an adapter that writes text."""
    if config.get("task_type") != "SEQ_CLS":
        return ()
    file = folder / WEIGHTS_NAME
    shapes = [entry.shape for key, entry in header.tensors.items() if key.endswith("." + SCORE_WEIGHT)]
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][0] < 2:
        raise AdapterError(
            "is of a classifier", file=file, field=SCORE_WEIGHT, expected="one head with a row for each of its classes"
        )
    number, labels = shapes[0][0], record.labels if record is not None else []
    if labels and len(labels) != number:
        raise AdapterError(f"the record names {len(labels)} labels, the head has {number} outputs", file=file)
    return tuple(labels) or default_labels(number)


def _low_rank(
    folder: Path, config: dict[str, Any], method: str, model: CausalLM
) -> tuple[dict[str, tuple[int, ...]], dict[str, Setting], list[str]]:
    """(shapes, settings, messages)."""
    file = folder / CONFIG_NAME
    rules = adalora_config if method == "adalora" else lora_config
    messages = rules.check_config(config, file=file)
    names, problems = peft_targets(model, config, file=file)
    if HEAD_OF_CLASSES in names:
        raise AdapterError("the head of a classifier cannot carry an adapter here", file=file, field="target_modules")
    settings = rules.settings(config, names)
    for name, setting in settings.items():
        if setting.rank > MAX_RANK or not math.isfinite(setting.scale):
            raise AdapterError(
                f"{name} has rank {setting.rank} and scale {setting.scale:g}", file=file, field="r",
                expected=f"a rank of at most {MAX_RANK}",
            )  # fmt: skip
    # modules_to_save holds nothing but a classifier's head by now, which `_labels` has looked at
    shapes = method_class(method).expected_shapes(model, {**config, "modules_to_save": None}, file=file)
    return shapes, settings, messages + [f"{file}: target_modules: {problem}" for problem in problems[:MAX_HINTS]]


def _check_header(folder: Path, header: Header, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Keys, shapes and types of the file against what configuration and base ask for; the first few problems."""
    file, found = folder / WEIGHTS_NAME, header.tensors
    problems = [f"missing {key}" for key in expected if key not in found]
    problems += [f"unexpected {key[:200]}" for key in found if key not in expected]
    for key, shape in expected.items():
        if key not in found:
            continue
        if found[key].shape != shape:
            problems.append(f"{key} has shape {found[key].shape}, expected {shape}")
        if found[key].dtype not in STORED_AS:
            problems.append(f"{key} is stored as {found[key].dtype}, expected one of {', '.join(STORED_AS)}")
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise AdapterError(f"does not fit the base model and {CONFIG_NAME}: {shown}", file=file)
