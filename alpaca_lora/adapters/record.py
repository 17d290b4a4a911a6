"""`alpaca_lora.json`: what an adapter folder says beyond PEFT's two files, so that it is served as it was trained.

Knows the file; knows neither tensors nor templates (a template travels as the record that it makes of itself).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from alpaca_lora.errors import ModelFileError, nearest

RECORD_NAME = "alpaca_lora.json"
RECORD_FORMAT = 1


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """What travels with an adapter. template: what `Template.to_record` gave; metrics: the run's last figures.
    labels: names of a classifier's classes, in the order of its outputs; empty for one that writes text.
    """

    base_model: str
    base_fingerprint: str
    template: dict[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    stop_ids: list[int] = field(default_factory=list)
    stop_strings: list[str] = field(default_factory=list)
    add_bos: bool = False
    add_eos: bool = True
    tokenizer_fingerprint: str = ""
    data_hashes: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    # entries of the plan by which the base was quantized while it was loaded; empty otherwise
    base_plan: list[dict[str, Any]] = field(default_factory=list)
    # scheme, settings and dtype of a run that trained for them; empty otherwise
    quantization_aware: dict[str, Any] = field(default_factory=dict)
    version: str = ""  # of this package
    adapter_sha256: str = ""  # of adapter_model.safetensors; filled in by `save_adapter`
    format_version: int = RECORD_FORMAT

    @property
    def makes_up_for_rounding(self) -> bool:
        """Whether it holds what quantizing took from its base, which a dense base still has."""
        return self.config.get("init_lora_weights") == "rounding_error"

    def to_json(self) -> str:
        """The file's text: sorted keys, so that equal records are equal bytes."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, file: str | PathLike[str]) -> AdapterRecord:
        """Read strictly: ModelFileError names `file` and the field that is missing, unknown, of a wrong type or too
        new.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelFileError(f"not JSON: {error}", file=file, fix=_FIX) from error
        if not isinstance(content, dict):
            raise ModelFileError("not a JSON object", file=file, fix=_FIX)
        _check(content, file)
        return cls(**content)


_FIX = "remove the file to load the folder as a plain PEFT adapter"
_TYPES: Mapping[str, tuple[type, ...]] = {
    "base_model": (str,), "base_fingerprint": (str,), "template": (dict,), "system_prompt": (str, type(None)),
    "stop_ids": (list,), "stop_strings": (list,), "add_bos": (bool,), "add_eos": (bool,),
    "tokenizer_fingerprint": (str,), "data_hashes": (dict,),
    "config": (dict,), "metrics": (dict,), "labels": (list,),
    "base_plan": (list,), "quantization_aware": (dict,), "version": (str,), "adapter_sha256": (str,),
    "format_version": (int,),
}  # fmt: skip
_ITEM_TYPES: Mapping[str, type] = {
    "stop_ids": int,
    "stop_strings": str,
    "data_hashes": str,
    "labels": str,
    "base_plan": dict,
}


def _check(content: dict[str, Any], file: str | PathLike[str]) -> None:
    version = content.get("format_version", 0)
    if isinstance(version, int) and version > RECORD_FORMAT:
        raise ModelFileError(
            f"format {version} is newer than this program", file=file, field="format_version",
            expected=f"at most {RECORD_FORMAT}", fix="update alpaca-lora",
        )  # fmt: skip
    for name in ("base_model", "base_fingerprint"):
        if name not in content:
            raise ModelFileError("missing", file=file, field=name, fix=_FIX)
    for name, value in content.items():
        if name not in _TYPES:
            alike = nearest(name, _TYPES)
            raise ModelFileError(
                "unknown field", file=file, field=name, fix=f"did you mean {alike[0]!r}?" if alike else _FIX
            )
        expected = _TYPES[name]
        wrong = not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected)
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        item_type = _ITEM_TYPES.get(name)
        if wrong or (item_type and not all(type(item) is item_type for item in items)):
            of = f" of {item_type.__name__}" if item_type else ""
            raise ModelFileError(
                f"wrong value {str(value)[:60]!r}", file=file, field=name, expected=f"{expected[0].__name__}{of}"
            )


def read_record(folder: str | PathLike[str]) -> AdapterRecord | None:
    """The record of an adapter folder, None when it has none (a folder that PEFT wrote)."""
    path = Path(folder) / RECORD_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"cannot be read: {error}", file=path) from error
    return AdapterRecord.from_json(text, file=path)
