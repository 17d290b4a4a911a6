"""An adapter folder: adapter_config.json and adapter_model.safetensors as PEFT 0.21 writes them, our alpaca_lora.json.

Knows the folder and PEFT's type names; what a type's configuration means, each method says itself. Reads no pickle.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alpaca_lora.adapters.base import Adapter, method_class
from alpaca_lora.adapters.lora_config import NO_TARGETS
from alpaca_lora.adapters.record import RECORD_NAME, AdapterRecord, read_record
from alpaca_lora.errors import AdapterError, AlpacaLoraError, ModelFileError, NumericalError, UserError, nearest
from alpaca_lora.models.classifier import attach_score
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.weights.safetensors_file import (
    disk_error,
    file_sha256,
    read_header,
    read_safetensors,
    sync_folder,
    write_safetensors,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
MAX_CONFIG_BYTES = 4 * 2**20
MAX_SHOWN = 6  # wrong keys in one message
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# PEFT's type -> our method; LORA stands for several, see `method_of`
_PEFT_TYPES: Mapping[str, str] = {
    "LORA": "lora", "ADALORA": "adalora", "IA3": "ia3", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"
}  # fmt: skip


def adapter_folder(folder: str | PathLike[str], name: str = "default") -> Path:
    """Where the adapter called `name` lies: PEFT keeps `default` in the folder itself, others in folders inside of it.

    AdapterError for a name that could lead out of the folder, or that PEFT could not tell from its own words.
    """
    root = Path(folder)
    if name == "default":
        return root
    if not _ADAPTER_NAME.fullmatch(name) or name == "lora" or "lora_" in name:
        raise AdapterError(
            f"bad adapter name {name!r}",
            expected="letters, digits, dot, dash and underscore, at most 64, not 'lora' nor 'lora_' in it",
        )
    inside = root / name
    if inside.resolve().parent != root.resolve():
        raise AdapterError(f"adapter {name!r} lies outside of the folder", file=root)
    return inside


def save_adapter(
    folder: str | PathLike[str], adapter: Adapter, record: AdapterRecord | None = None, *, allow_untrained: bool = False
) -> str:
    """Write an adapter folder, read it back and compare it; returns the sha256 of the weights.

    A new or empty folder appears whole or not at all. In a folder that holds other things each file is replaced whole,
    the record last; it carries the sha256 of the weights, so a save that was cut in between is noticed when it is
    loaded. Raises AdapterError when the adapter is empty or, unless `allow_untrained` (for checkpoints), has not moved;
    MachineError when the disk fails; ModelFileError when what was read back differs.
    """
    tensors = adapter.state_tensors()
    _check_worth_saving(adapter, tensors, allow_untrained)
    return write_adapter(folder, tensors, adapter.config, record)


def write_adapter(
    folder: str | PathLike[str], tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any],
    record: AdapterRecord | None = None,
) -> str:  # fmt: skip
    """`save_adapter` for tensors that are on no model: PEFT key -> tensor, and the content of adapter_config.json."""
    config = dict(config)
    if record is not None:
        config["base_model_name_or_path"] = record.base_model
    target = Path(folder)
    fresh = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    temporary = (target.parent if fresh else target) / f".tmp-adapter-{uuid.uuid4().hex}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        digest = write_safetensors(temporary / WEIGHTS_NAME, tensors, {"format": "pt"})
        _write_text(temporary / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True))
        if record is not None:
            _write_text(temporary / RECORD_NAME, dataclasses.replace(record, adapter_sha256=digest).to_json())
        sync_folder(temporary)
        _compare(temporary, tensors, config)
        _publish(temporary, target, fresh)
    except OSError as error:
        needed = sum(t.numel() * t.element_size() for t in tensors.values())
        raise disk_error(error, target / WEIGHTS_NAME, needed) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return digest


def _check_worth_saving(adapter: Adapter, tensors: Mapping[str, torch.Tensor], allow_untrained: bool) -> None:
    if not tensors or not any(t.numel() for t in tensors.values()):
        raise AdapterError("the adapter holds no tensors: nothing to save", fix="was it merged or removed before?")
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError("holds NaN or Inf: not saved", field=key, fix="use the last good checkpoint")
    moved = adapter.moved()
    if not allow_untrained and not any(moved.values()):
        raise AdapterError(
            f"the adapter did not move: the update of all {len(moved)} modules is zero", expected="a trained adapter",
            fix="check the learning rate, the number of steps and that rows have supervised tokens",
        )  # fmt: skip


def _write_text(path: Path, text: str) -> None:
    with open(path, "x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _compare(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """What lies in `folder` is what was meant, bit for bit."""
    found = read_safetensors(folder / WEIGHTS_NAME)
    if found.keys() != tensors.keys():
        raise ModelFileError("read back with other tensors than were written", file=folder / WEIGHTS_NAME)
    for key, tensor in tensors.items():
        if found[key].dtype != tensor.dtype or not torch.equal(found[key], tensor):
            raise ModelFileError("read back with other values than were written", file=folder / WEIGHTS_NAME, field=key)
    if read_config(folder) != json.loads(json.dumps(config)):
        raise ModelFileError("read back with other content than was written", file=folder / CONFIG_NAME)


def _publish(temporary: Path, target: Path, fresh: bool) -> None:
    if fresh:
        os.replace(temporary, target)  # also over an empty folder
    else:
        for name in (WEIGHTS_NAME, CONFIG_NAME, RECORD_NAME):
            if (temporary / name).exists():
                os.replace(temporary / name, target / name)
            else:
                (target / name).unlink(missing_ok=True)  # a record of the adapter that was there before
        sync_folder(target)
    sync_folder(target.parent)


def read_config(folder: str | PathLike[str]) -> dict[str, Any]:
    """adapter_config.json of a folder, with a peft_type that we have.

    UserError: no such folder or file. ModelFileError: damaged. AdapterError: a type that we do not have.
    """
    path = Path(folder) / CONFIG_NAME
    if not os.path.isfile(path):
        what = "is not a folder" if os.path.isfile(folder) else "no such folder"
        what = f"no {CONFIG_NAME}" if os.path.isdir(folder) else what
        raise UserError(what, file=folder, expected=f"an adapter folder with {CONFIG_NAME} and {WEIGHTS_NAME}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelFileError(f"{path.stat().st_size} bytes", file=path, expected=f"at most {MAX_CONFIG_BYTES}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"not JSON: {error}", file=path) from error
    if not isinstance(config, dict):
        raise ModelFileError("not a JSON object", file=path)
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in _PEFT_TYPES:
        shown = "missing" if peft_type is None else f"{peft_type!r} is not supported"
        raise AdapterError(shown, file=path, field="peft_type", expected=f"one of {', '.join(_PEFT_TYPES)}")
    return config


def method_of(config: Mapping[str, Any]) -> str:
    """Our name of the method that reads an adapter_config.json (PiSSA is saved as the LoRA that it comes to)."""
    method = _PEFT_TYPES[config["peft_type"]]
    if method != "lora":
        return method
    if config.get("target_modules") in (NO_TARGETS, [NO_TARGETS]):
        return "freeze"
    return "dora" if config.get("use_dora") else "lora"


def load_adapter(
    folder: str | PathLike[str], model: nn.Module, base_fingerprint: str | None = None, *, trainable: bool = False,
    ignore_base_mismatch: bool = False, name: str = "default",
) -> tuple[Adapter, AdapterRecord | None]:  # fmt: skip
    """Read an adapter folder, ours or PEFT's, and put it on `model`; everything is checked before the model is touched.

    The record is None for a folder without alpaca_lora.json. What the user should be told is in the adapter's
    `messages`. Raises AdapterError: other base than it was trained on (unless `ignore_base_mismatch`), missing, extra
    or misshapen tensors, a type or setting that is not supported. ModelFileError: damaged files. NumericalError: a
    weight is not finite. UserError: no such folder, or only pickled weights.
    """
    root = adapter_folder(folder, name)
    config = read_config(root)
    record = read_record(root)
    weights = root / WEIGHTS_NAME
    _check_weights_file(root, weights)
    if record is not None:
        _check_base(root, record, base_fingerprint, ignore_base_mismatch)
    method = method_class(method_of(config))
    header = read_header(weights)
    added = _add_score(model, config, header.tensors, record, weights)
    try:
        expected = method.expected_shapes(model, config, file=root / CONFIG_NAME)
        _check_tensors(weights, {key: entry.shape for key, entry in header.tensors.items()}, expected)
        tensors = read_tensors(root, record)
    except AlpacaLoraError:
        if added:
            model.score = None  # pyright: ignore[reportArgumentType]
        raise
    return method.from_peft(model, config, tensors, trainable=trainable, file=root / CONFIG_NAME), record


def _add_score(
    model: nn.Module, config: Mapping[str, Any], found: Mapping[str, Any], record: AdapterRecord | None, file: Path
) -> bool:
    """Put a head for as many classes as the file has on a language model that has none yet; whether it was put."""
    if config.get("task_type") != "SEQ_CLS" or not isinstance(model, CausalLM):
        return False
    keys = [key for key in found if key.endswith(".score.weight")]
    if len(keys) != 1 or len(found[keys[0]].shape) != 2:
        raise AdapterError("is of a classifier and holds no head", file=file, field="score.weight")
    number, labels = found[keys[0]].shape[0], record.labels if record is not None else []
    if labels and len(labels) != number:
        raise AdapterError(f"the record names {len(labels)} labels, the head has {number} outputs", file=file)
    new = model.score is None
    attach_score(model, labels or number, seed=0)
    return new


def read_tensors(root: Path, record: AdapterRecord | None) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder by PEFT key, as stored: finite floating point numbers, of the save that `record`
    was written for.

    UserError: no weights, or pickled ones only. ModelFileError: damaged. NumericalError: NaN or Inf.
    """
    weights = root / WEIGHTS_NAME
    _check_weights_file(root, weights)
    if record is not None and record.adapter_sha256 and file_sha256(weights) != record.adapter_sha256:
        raise ModelFileError(
            f"is not the file that {RECORD_NAME} was written for: changed, or a save was cut", file=weights,
            fix=f"save it again, or remove {RECORD_NAME} to load the folder as a plain PEFT adapter",
        )  # fmt: skip
    tensors = read_safetensors(weights)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelFileError(f"is stored as {kind}", file=weights, field=key, expected="floating point numbers")
        if not torch.isfinite(tensor).all():
            raise NumericalError("holds NaN or Inf", file=weights, field=key, fix="use an earlier checkpoint")
    return tensors


def _check_weights_file(root: Path, weights: Path) -> None:
    if weights.is_file():
        return
    pickles = [name for name in PICKLE_NAMES if (root / name).exists()]
    if pickles:
        raise UserError(
            "holds its weights as a pickle only, which can run code and is never read", file=root / pickles[0],
            expected=WEIGHTS_NAME,
            fix="where you trust the file, load it with PEFT and save it again (save_pretrained writes safetensors)",
        )  # fmt: skip
    raise UserError(f"no {WEIGHTS_NAME}", file=root, expected="a complete adapter folder")


def _check_base(root: Path, record: AdapterRecord, base_fingerprint: str | None, ignore: bool) -> None:
    if base_fingerprint is None or ignore or not record.base_fingerprint or record.base_fingerprint == base_fingerprint:
        return
    raise AdapterError(
        f"trained on another base model: {record.base_model} with fingerprint {record.base_fingerprint}, "
        f"this one has {base_fingerprint}",
        file=root / RECORD_NAME, field="base_fingerprint",
        fix="give the base model that the adapter was trained on, quantized as it was then or not at all",
    )  # fmt: skip


def _check_tensors(path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """All that is wrong with the file's keys and shapes in one error."""
    if not found:
        raise AdapterError("holds no tensors", file=path, expected=f"{len(expected)} of them")
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    misshapen = [key for key, shape in expected.items() if key in found and found[key] != shape]
    if not (missing or extra or misshapen):
        return
    # only what is shown: to look for alike names takes long, and a file may have a million wrong ones
    problems = [f"missing {key}" + _nearest(key, extra) for key in missing[:MAX_SHOWN]]
    problems += [f"unexpected {key[:200]}" + _nearest(key, missing or list(expected)) for key in extra[:MAX_SHOWN]]
    problems += [f"{key} has shape {found[key]}, expected {expected[key]}" for key in misshapen[:MAX_SHOWN]]
    more = len(missing) + len(extra) + len(misshapen) - min(len(problems), MAX_SHOWN)
    shown = "; ".join(problems[:MAX_SHOWN]) + (f"; and {more} more" if more else "")
    raise AdapterError(f"does not fit the base model and {CONFIG_NAME}: {shown}", file=path)


def _nearest(key: str, others: list[str]) -> str:
    alike = nearest(key[:200], [other[:200] for other in others[:200]])
    return f" (nearest: {alike[0]})" if alike else ""
