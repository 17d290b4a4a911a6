"""The token that is classified is the one that transformers and PEFT look for, though padding is EOS: as in SmolLM2.

Their rule: the last token that is not config.pad_token_id.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alpaca_lora.adapters.lora import Lora
from alpaca_lora.adapters.merge import merge_into_folder
from alpaca_lora.adapters.peft_format import save_adapter
from alpaca_lora.data.encode import EncodePolicy
from alpaca_lora.inference.classify import classify
from alpaca_lora.models.classifier import attach_score
from alpaca_lora.models.load import Base, load_base
from alpaca_lora.weights.huggingface import write_folder
from tests.adapters.conftest import train_a_little
from tests.adapters.test_merge import COMPUTE, RECORD
from tests.models.test_classifier import LABELS
from tests.tiny import ByteTokenizer, tiny_model

EOS = 257
TEXTS = ["a fine film", "bad", "so so, and long enough to need no padding"]


def eos_pads(folder: Path) -> Path:
    """A base whose padding is EOS, in the tokenizer and in config.json."""

    def save_tokenizer(where: Path) -> None:
        ByteTokenizer().save(where)
        path = where / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "</s>"}))

    model = tiny_model(extra={"bos_token_id": 256, "eos_token_id": EOS, "pad_token_id": EOS})
    return write_folder(folder, model.state_dict().items(), model.config.to_hf(), tokenizer_saver=save_tokenizer)


def tuned(folder: Path, options: Callable[..., Any], *, add_eos: bool) -> tuple[Base, Lora, torch.Tensor]:
    """(base with a head, trained adapter, our probabilities of TEXTS)."""
    base = load_base(str(folder), COMPUTE)
    score = attach_score(base.model, LABELS, seed=0)
    adapter = Lora.attach(base.model, options(), seed=0)
    train_a_little(adapter)
    return base, adapter, ours(base, score.labels, add_eos=add_eos)


def ours(base: Base, labels: Sequence[str], *, add_eos: bool) -> torch.Tensor:
    policy = EncodePolicy(64, add_eos_token=add_eos)
    found = classify(base.model, base.tokenizer, TEXTS, labels, policy)
    return torch.tensor([[one.probabilities[label] for label in labels] for one in found if one is not None])


@torch.no_grad()
def theirs(model: Any, tokenizer: Any, *, add_eos: bool) -> torch.Tensor:
    """All texts in one padded batch, as their users write it; EOS is what we put behind a text and they do not."""
    ids = [tokenizer(text)["input_ids"] + [EOS] * add_eos for text in TEXTS]
    padded = tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt")
    assert (padded["attention_mask"] == 0).any()
    return model(**padded).logits.softmax(-1)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() < 1e-4)


@pytest.mark.parametrize("add_eos", [False, True])
def test_a_merged_folder_classifies_the_token_that_was_trained(
    options: Callable[..., Any], tmp_path: Path, add_eos: bool
) -> None:
    base, adapter, wanted = tuned(eos_pads(tmp_path / "base"), options, add_eos=add_eos)
    record = dataclasses.replace(RECORD, add_eos=add_eos)
    merge_into_folder(base, adapter, tmp_path / "merged", COMPUTE, dtype=torch.float32, record=record)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["pad_token_id"] == EOS) is not add_eos and config["eos_token_id"] == EOS
    assert not (tmp_path / "merged" / "generation_config.json").exists()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.pad_token_id == model.config.pad_token_id and tokenizer.eos_token_id == EOS
    assert same(theirs(model, tokenizer, add_eos=add_eos), wanted)
    again = load_base(str(tmp_path / "merged"), COMPUTE)
    assert same(ours(again, LABELS, add_eos=add_eos), wanted)
    # with EOS for padding they read another token; without EOS at the end that is the one that was trained
    model.config.pad_token_id = tokenizer.pad_token_id = EOS
    assert same(theirs(model, tokenizer, add_eos=add_eos), wanted) is not add_eos


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_classifies_the_token_that_was_trained(options: Callable[..., Any], tmp_path: Path) -> None:
    """Without EOS the usual call is right as it is; with EOS only after pad_token_id was set, as the run says."""
    from peft import PeftModel

    source = eos_pads(tmp_path / "base")
    for add_eos in (False, True):
        _, adapter, wanted = tuned(source, options, add_eos=add_eos)
        save_adapter(tmp_path / f"adapter-{add_eos}", adapter, dataclasses.replace(RECORD, labels=list(LABELS)))
        loaded = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(LABELS))
        model = PeftModel.from_pretrained(loaded, str(tmp_path / f"adapter-{add_eos}")).eval()
        tokenizer = AutoTokenizer.from_pretrained(source)
        assert tokenizer.pad_token_id == model.config.pad_token_id == EOS
        assert same(theirs(model, tokenizer, add_eos=add_eos), wanted) is not add_eos
        model.config.pad_token_id = tokenizer.pad_token_id = 258
        assert same(theirs(model, tokenizer, add_eos=add_eos), wanted)
