"""Base + adapter -> one Hugging Face folder that needs neither, checked by its answers before it appears.

Knows models, adapters and the folder writer; knows no command line and no template.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from alpaca_lora.adapters.base import Adapter
from alpaca_lora.adapters.record import RECORD_NAME, AdapterRecord
from alpaca_lora.device import Compute
from alpaca_lora.errors import AdapterError, NumericalError, UserError
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.classifier import SCORE_WEIGHT, class_logits, classifier_config, find_score, padding_id
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.linear import dense_state
from alpaca_lora.models.load import Base, load_base
from alpaca_lora.text.rendered import Rendered, Span
from alpaca_lora.text.tokenizer import Tokenizer
from alpaca_lora.weights.huggingface import write_folder
from alpaca_lora.weights.safetensors_file import sync_folder

PROMPTS = (
    "The capital of France is Paris, and its river is the Seine.",
    "List three primary colors: red, blue and yellow. 1 + 2 = 3.",
    "def add(a, b):\n    return a + b\n",
    "店铺几点开门？我们早上九点开门，晚上八点关门。",
)
# Sums in another order moved the logits of a 135M model by 7e-5 at most.
FLOAT32_BOUND = 1e-3
# Weights rounded to 8 bits moved them by 0.19 at most where their standard deviation was 6.9, that is 0.027 of it.
BFLOAT16_BOUND = 0.1  # times the standard deviation of the logits
LOST_SHARE = 0.25  # of the adapter's own mean effect, beyond which rounding has eaten the adapter


@dataclass(frozen=True, slots=True)
class MergeReport:
    """Differences between the logits of base + adapter and of the folder as it was read again, over `num_tokens`
    tokens.

    mean_adapter_effect: mean difference between the logits of base + adapter and of the base alone, for comparison.
    """

    folder: Path
    dtype: torch.dtype
    max_logit_difference: float
    mean_logit_difference: float
    mean_adapter_effect: float
    bound: float
    num_tokens: int


def merge_into_folder(
    base: Base, adapter: Adapter, folder: str | PathLike[str], compute: Compute, *, dtype: torch.dtype,
    record: AdapterRecord | None = None, bound: float | None = None, max_shard_bytes: int = 4_000_000_000,
) -> MergeReport:  # fmt: skip
    """Write base + adapter, merged in float32 and stored as `dtype`, with tokenizer and chat template; then compare.

    `base` should be loaded in float32. It is used up: the adapter is taken off and the weights are given back before
    the folder is loaded for comparison, so that two models never lie in memory. `bound`: largest difference of a
    logit that is accepted; None: `FLOAT32_BOUND`, or for bfloat16 `BFLOAT16_BOUND` times the logits' spread.
    The folder appears whole and only after it passed.

    Raises UserError when `folder` exists and is not empty, AdapterError when the adapter is all zero, NumericalError
    when a merged weight is not finite or a bound is passed, MachineError when the disk fails.
    """
    check_free(folder)
    if not any(adapter.moved().values()):
        raise AdapterError("the adapter changes nothing: every update is zero", fix="give a trained adapter")
    target = Path(os.path.abspath(folder))
    ids, lengths = _prompt_ids(base)
    wanted_TV = _logits(base.model, ids, lengths)
    unchecked = target.with_name(f".{target.name}.{uuid.uuid4().hex}.unchecked")
    try:
        write_folder(
            unchecked, _merged_parameters(base.model, adapter, dtype), folder_config(base, dtype, record),
            extra_files=folder_files(base, record), tokenizer_saver=partial(save_tokenizer, base, record),
            max_shard_bytes=max_shard_bytes,
        )  # fmt: skip
        effect = difference(wanted_TV, _logits(base.model, ids, lengths))[1]
        base.model.to("meta")  # gives the memory back
        merged = load_base(str(unchecked), replace(compute, dtype=torch.float32))
        largest, mean = difference(wanted_TV, _logits(merged.model, ids, lengths))
        limit = bound or (FLOAT32_BOUND if dtype == torch.float32 else BFLOAT16_BOUND * float(wanted_TV.std()))
        report = MergeReport(Path(folder), dtype, largest, mean, effect, limit, len(ids))
        _judge(report)
        if target.exists():
            target.rmdir()
        os.rename(unchecked, target)
        sync_folder(unchecked.parent)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    return report


def check_free(folder: str | PathLike[str]) -> None:
    """UserError when something that is not an empty folder lies where the merged model is to be written."""
    target = Path(folder)
    try:
        if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
            raise UserError("exists already", file=target, fix="give another name, or remove it first")
    except OSError as error:
        raise UserError(f"cannot be used: {error.strerror}", file=target, field="output_dir") from error
    parent = next((one for one in Path(os.path.abspath(target)).parents if one.exists()), None)
    if parent is not None and not parent.is_dir():
        raise UserError("is a file, not a folder", file=parent, field="output_dir", fix="choose another folder")


def storage_dtype(model: nn.Module) -> torch.dtype:
    """bfloat16 if every weight of a base is a bfloat16 number, so that only merged ones are rounded; else float32."""
    for name, parameter in dense_state(model):
        if name != SCORE_WEIGHT and not torch.equal(parameter, parameter.bfloat16().to(parameter.dtype)):
            return torch.float32
    return torch.bfloat16


def _merged_parameters(model: nn.Module, adapter: Adapter, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """One at a time; takes the adapter off after the last weight that it changes. A classifier is written without the
    head over tokens, and its own head as it is.
    """
    left_out = "lm_head." if find_score(model) is not None else None
    done: set[str] = set()
    for name, weight in adapter.merged_tensors():
        done.add(name)
        yield name, weight if name == SCORE_WEIGHT else weight.to(dtype)
    adapter.remove()
    for name, weight in dense_state(model):
        if name not in done and not (left_out and name.startswith(left_out)):
            yield name, weight if name == SCORE_WEIGHT else weight.to(dtype)


def folder_config(base: Base, dtype: torch.dtype, record: AdapterRecord | None) -> dict[str, object]:
    """The config.json of a base as it stands now; a classifier's with the labels of the adapter that made it one."""
    # an adapter may have given a tied model a head of its own
    tied = base.config.tie_word_embeddings and base.model.lm_head is None
    config = {**base.config.to_hf(), "tie_word_embeddings": tied, "torch_dtype": str(dtype).removeprefix("torch.")}
    score = find_score(base.model)
    if score is None:
        return config
    labels = record.labels if record is not None and record.labels else score.labels
    return classifier_config(config, labels, _padding_id(base, record))


def _padding_id(base: Base, record: AdapterRecord | None) -> int | None:
    """What pads the texts of a merged classifier: the base's padding, unless that is the EOS which is classified."""
    tokenizer, ends = base.tokenizer, record is not None and record.add_eos
    pad_id = base.config.extra.get("pad_token_id") if tokenizer.pad_id is None else tokenizer.pad_id
    return padding_id(tokenizer.special_tokens, pad_id, tokenizer.eos_id if ends else None)


def save_tokenizer(base: Base, record: AdapterRecord | None, folder: Path) -> None:
    """The tokenizer's files; a classifier's name the padding of its config.json, where that is another one."""
    tokenizer = base.tokenizer
    tokenizer.save(folder)
    if find_score(base.model) is None or (pad_id := _padding_id(base, record)) == tokenizer.pad_id:
        return
    names = {index: name for name, index in tokenizer.special_tokens.items()}
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["pad_token"] = None if pad_id is None else names.get(pad_id)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def folder_files(base: Base, record: AdapterRecord | None) -> dict[str, bytes]:
    """What ends an answer, for transformers (a classifier has none); and the adapter's record, which keeps template and
    provenance.
    """
    files = _generation_config(base.tokenizer, record) if find_score(base.model) is None else {}
    return {**files, RECORD_NAME: record.to_json().encode()} if record is not None else files


def _generation_config(tokenizer: Tokenizer, record: AdapterRecord | None) -> dict[str, bytes]:
    ends = sorted({*tokenizer.stop_ids, *([tokenizer.eos_id] if tokenizer.eos_id is not None else [])})
    if record is not None:
        ends = sorted({*ends, *record.stop_ids})
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends or None, "pad_token_id": tokenizer.pad_id}
    generation = {key: value for key, value in ids.items() if value is not None}
    return {"generation_config.json": (json.dumps(generation, indent=2, sort_keys=True) + "\n").encode()}


def prompt_logits(base: Base) -> torch.Tensor:
    """float32 logits (T, V) of a base, with whatever adapter is on it, on the four texts that merging compares."""
    return _logits(base.model, *_prompt_ids(base))


def _prompt_ids(base: Base) -> tuple[list[int], list[int]]:
    """The prompts as one stream of tokens, and the length of each."""
    start = [base.tokenizer.bos_id] if base.tokenizer.add_bos and base.tokenizer.bos_id is not None else []
    ids: list[int] = []
    lengths: list[int] = []
    for text in PROMPTS:
        own = start + list(base.tokenizer.encode(Rendered(text, (Span(0, len(text)),), (), False, True)).ids)
        ids += own
        lengths.append(len(own))
    return ids, lengths


@torch.no_grad()
def _logits(model: CausalLM, ids: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    device = next(model.parameters()).device
    positions_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
    hidden_TD = model(torch.tensor(ids, device=device), positions_T, Packed(lengths))
    logits = model.logits(hidden_TD) if find_score(model) is None else class_logits(model, hidden_TD)
    return logits.cpu()


def difference(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Largest and mean absolute difference; infinite where either is not a number."""
    difference = (one - other).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(difference.max()), float(difference.mean())


def _judge(report: MergeReport) -> None:
    largest, mean, effect = report.max_logit_difference, report.mean_logit_difference, report.mean_adapter_effect
    rounded = report.dtype != torch.float32
    fix = "nothing was written; store it as float32" if rounded else "nothing was written"
    if not largest <= report.bound:
        raise NumericalError(
            f"the merged model's logits differ from base + adapter by {largest:.3g} at most, {mean:.3g} on average",
            expected=f"at most {report.bound:.3g}",
            fix=fix,
        )
    if rounded and mean > LOST_SHARE * effect:
        raise NumericalError(
            f"rounding moves the logits by {mean:.3g} on average, the adapter by {effect:.3g}: much of it is lost",
            fix=fix,
        )
