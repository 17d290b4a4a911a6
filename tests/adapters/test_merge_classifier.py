"""A merged classifier is a `...ForSequenceClassification` folder: to transformers, and to us as a base."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alpaca_lora.adapters.lora import Lora
from alpaca_lora.adapters.merge import merge_into_folder, storage_dtype
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.classifier import attach_score, class_logits, find_score
from alpaca_lora.models.load import Base, load_base
from tests.adapters.conftest import IDS, train_a_little
from tests.adapters.test_merge import COMPUTE, RECORD, base_folder
from tests.models.test_classifier import LABELS


def tuned(folder: Path, options: Any, **overrides: Any) -> tuple[Base, Lora, torch.Tensor]:
    """(base with a head, trained adapter, logits of the last token)."""
    base = load_base(str(base_folder(folder, **overrides)), COMPUTE)
    attach_score(base.model, LABELS, seed=0)
    adapter = Lora.attach(base.model, options(), seed=0)
    train_a_little(adapter)
    return base, adapter, last_logits(base)


def last_logits(base: Base) -> torch.Tensor:
    with torch.no_grad():
        hidden_TD = base.model(IDS, torch.arange(len(IDS)), Packed([len(IDS)]))
        return class_logits(base.model, hidden_TD[-1:])[0]


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_and_we_load_the_folder_and_say_the_same(
    options: Callable[..., Any], tmp_path: Path, tied: bool
) -> None:
    from transformers import AutoModelForSequenceClassification

    base, adapter, wanted = tuned(tmp_path / "base", options, tie_word_embeddings=tied)
    merge_into_folder(base, adapter, tmp_path / "merged", COMPUTE, dtype=torch.float32, record=RECORD)
    theirs, loading = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )  # fmt: skip
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.id2label == dict(enumerate(LABELS))
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS[None]).logits[0], wanted, rtol=0, atol=1e-4)
    again = load_base(str(tmp_path / "merged"), COMPUTE)
    score = find_score(again.model)
    assert score is not None and score.labels == LABELS and again.model.lm_head is None
    torch.testing.assert_close(last_logits(again), wanted, rtol=0, atol=1e-4)


def test_labels_of_the_record_name_a_head_without_names(options: Callable[..., Any], tmp_path: Path) -> None:
    base = load_base(str(base_folder(tmp_path / "base")), COMPUTE)
    attach_score(base.model, 2, seed=0)  # as an adapter's file does, which holds no names
    adapter = Lora.attach(base.model, options(), seed=0)
    train_a_little(adapter)
    record = dataclasses.replace(RECORD, labels=["no", "yes"])
    merge_into_folder(base, adapter, tmp_path / "merged", COMPUTE, dtype=torch.float32, record=record)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"} and config["architectures"] == [
        "LlamaForSequenceClassification"
    ]  # fmt: skip


def test_a_bfloat16_folder_keeps_the_head_in_float32(options: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = tuned(tmp_path / "base", options)
    merge_into_folder(base, adapter, tmp_path / "merged", COMPUTE, dtype=torch.bfloat16, bound=10.0)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert tensors["score.weight"].dtype == torch.float32 and "lm_head.weight" not in tensors
    assert tensors["model.norm.weight"].dtype == torch.bfloat16


def test_the_head_does_not_decide_the_dtype_of_the_base(tmp_path: Path) -> None:
    base = load_base(str(base_folder(tmp_path / "base", torch.bfloat16)), COMPUTE)
    attach_score(base.model, LABELS, seed=0)
    assert storage_dtype(base.model) == torch.bfloat16
