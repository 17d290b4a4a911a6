"""A quantized model as a folder: the parts of each linear as safetensors, and `quantization.json`, the plan and where
it came from.

The configuration names no `quant_method`, which makes transformers refuse the folder instead of misreading it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from alpaca_lora.errors import ModelFileError
from alpaca_lora.models.classifier import SCORE_WEIGHT, find_score
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.load import PACKED_CONFIG, Source, packed_linears
from alpaca_lora.quantization.plan import Plan
from alpaca_lora.weights.contained import contained_file, read_json
from alpaca_lora.weights.huggingface import write_folder

PLAN_NAME = "quantization.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Origin:
    """What a quantized model was made of, and how; part of its fingerprint.

    base_fingerprint: of the dense base. rounding: nearest, gptq or awq. calibration_sha256: of the token ids that
    calibrated schemes saw. adapter_sha256: of an adapter that was folded in first.
    """

    base_model: str
    base_fingerprint: str
    rounding: str = "nearest"
    calibration_sha256: str = ""
    calibration_tokens: int = 0
    adapter_sha256: str = ""
    version: str = ""
    statistics: dict[str, Any] = field(default_factory=dict)  # figures of the making; not part of the identity

    def why_not(self, base_fingerprint: str) -> str | None:
        """Why the dense base with this fingerprint is not what the model was made of; None: it is."""
        if self.adapter_sha256:
            return "an adapter was folded in"
        return None if base_fingerprint == self.base_fingerprint else f"{self.base_model} is another model by now"


def write_quantized(
    folder: str | PathLike[str], model: CausalLM, plan: Plan, origin: Origin, *, fingerprint: str,
    config: Mapping[str, Any], dense_dtype: torch.dtype, tokenizer_saver: Callable[[Path], object],
    extra_files: Mapping[str, bytes] | None = None, max_shard_bytes: int = 4_000_000_000,
) -> Path:  # fmt: skip
    """Write a model whose linears are packed as the plan says; what stays dense is stored as ``dense_dtype``.

    ``config``: of the dense model's config.json. The folder appears whole or not at all. UserError when it exists,
    MachineError when the disk fails.
    """
    content = {
        "format_version": FORMAT_VERSION, "fingerprint": fingerprint, **dataclasses.asdict(origin),
        "plan": plan.to_entries(),
    }  # fmt: skip
    files = {PLAN_NAME: (json.dumps(content, indent=1, sort_keys=True) + "\n").encode(), **(extra_files or {})}
    return write_folder(
        folder, _tensors(model, dense_dtype), {**config, "quantization_config": PACKED_CONFIG}, extra_files=files,
        tokenizer_saver=tokenizer_saver, max_shard_bytes=max_shard_bytes,
    )  # fmt: skip


def _tensors(model: CausalLM, dense_dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """One at a time; a classifier has no head over tokens, and its own is float32 everywhere."""
    left_out = "lm_head." if find_score(model) is not None else None
    for name, parameter in model.named_parameters():
        if not (left_out and name.startswith(left_out)):
            yield name, parameter.detach().to("cpu", torch.float32 if name == SCORE_WEIGHT else dense_dtype)
    for name, linear in packed_linears(model):
        for part, tensor in linear.named_buffers():
            yield f"{name}.{part}", tensor.cpu()


def check_stored(source: Source, model: CausalLM) -> None:
    """ModelFileError naming tensor and file where parts of the linears of an empty model are missing in a folder, or
    have shapes that do not go with each other.
    """
    for name, linear in packed_linears(model):
        parts = linear.stored_shapes()
        for part, shape in parts.items():
            tensor = f"{name}.{part}"
            found = source.shapes.get(tensor)
            if found == shape:
                continue
            others = [f"{name}.{other}" for other in parts if f"{name}.{other}" in source.shapes]
            file = source.where(tensor if found is not None else others[0]) if others else source.path
            what = "is missing" if found is None else f"has shape {_shown(found)}, which does not fit its linear"
            raise ModelFileError(
                f"{what} of {linear.out_features} x {linear.in_features} weights" if found is not None else what,
                file=file, field=tensor, expected=_shown(shape), fix="quantize the model again",
            )  # fmt: skip


def _shown(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def is_quantized(path: Path) -> bool:
    """Whether the path is a folder that `write_quantized` made."""
    return path.is_dir() and (path / PLAN_NAME).exists()


def read_origin(path: Path) -> Origin:
    """What a quantized folder was made of. ModelFileError as `read_plan`."""
    content = read_json(file := contained_file(path, PLAN_NAME))
    return _origin({k: v for k, v in content.items() if k not in ("format_version", "plan", "fingerprint")}, file)


def read_plan(path: Path, model: CausalLM) -> tuple[Plan, str, Origin]:
    """(plan, fingerprint, origin) of a quantized folder for an empty model. ModelFileError naming the file and what is
    wrong with it.
    """
    file = contained_file(path, PLAN_NAME)
    content = read_json(file)
    version = content.pop("format_version", None)
    if type(version) is not int or version < 1:
        raise ModelFileError("is missing or no number", file=file, field="format_version")
    if version > FORMAT_VERSION:
        raise ModelFileError(
            f"format {version} is newer than this program", file=file, field="format_version",
            expected=f"at most {FORMAT_VERSION}", fix="update alpaca-lora",
        )  # fmt: skip
    plan = Plan.from_stored(model, content.pop("plan", None), file=file)
    fingerprint = content.pop("fingerprint", None)
    if not isinstance(fingerprint, str) or len(fingerprint) != 64:
        raise ModelFileError("is missing or not 64 digits", file=file, field="fingerprint")
    return plan, fingerprint, _origin(content, file)


def _origin(content: Mapping[str, Any], file: Path) -> Origin:
    defaults = {one.name: one for one in dataclasses.fields(Origin)}
    for key, value in content.items():
        if key not in defaults:
            raise ModelFileError("unknown key", file=file, field=key, expected=f"one of {', '.join(defaults)}")
        kind = {"calibration_tokens": int, "statistics": dict}.get(key, str)
        if type(value) is not kind:
            raise ModelFileError(f"is {str(value)[:60]!r}", file=file, field=key, expected=kind.__name__)
    for key in ("base_model", "base_fingerprint"):
        if key not in content:
            raise ModelFileError("is missing", file=file, field=key)
    return Origin(**content)
