"""Full fine-tuning: every weight is trained, and an adapter folder of all of them is a model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alpaca_lora.adapters.full import Full
from alpaca_lora.adapters.merge import merge_into_folder
from alpaca_lora.adapters.peft_format import load_adapter, save_adapter
from alpaca_lora.models.classifier import attach_score
from alpaca_lora.models.load import load_base
from tests.adapters.conftest import IDS, make_twins, our_logits
from tests.adapters.peft_twin import PEFT_ON_TRANSFORMERS, assert_peft_loads_ours, our_loss, our_steps
from tests.adapters.test_merge import COMPUTE, base_folder
from tests.tiny import tiny_model

Make = Callable[..., Any]


def full(model: Any, options: Any) -> Full:
    return Full.attach(model, options, seed=0)


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_is_trained_and_moves(options: Make, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    adapter = full(model, options())
    assert {id(p) for _, p in adapter.trained_parameters()} == {id(p) for p in model.parameters()}
    before = our_loss(model).item()
    our_steps(model, adapter)
    assert our_loss(model).item() < before - 0.1
    assert len(adapter.moved()) == len(list(model.parameters())) and all(adapter.moved().values())
    assert dict(adapter.facts())["trained weights"].endswith(", 100.00%")
    assert dict(adapter.facts())["layers without a backward pass"] == "0 of 2"


@pytest.mark.parametrize("tied", [False, True])
def test_a_classifier_has_no_use_for_the_head_of_tokens(options: Make, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    attach_score(model, 2, seed=0)
    adapter = full(model, options())
    idle = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert idle == (set() if tied else {"lm_head.weight"})
    assert not any("lm_head" in key for key in adapter.state_tensors()) and "ensure_weight_tying" not in adapter.config


def test_any_torch_model(options: Make) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    adapter = full(model, options())
    assert adapter.config["modules_to_save"] == ["0", "1", "3"]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize("tied", [False, True])
def test_peft_loads_ours_and_we_load_it_again(options: Make, tmp_path: Path, tied: bool) -> None:
    twins = make_twins(tie_word_embeddings=tied)
    before = twins.our_logits()
    adapter = full(twins.ours, options())
    our_steps(twins.ours, adapter)
    assert (twins.our_logits() - before).abs().max() > 0.05
    assert_peft_loads_ours(twins, adapter, tmp_path / "a")
    again = tiny_model(tie_word_embeddings=tied)
    loaded, _ = load_adapter(tmp_path / "a", again)
    assert torch.equal(our_logits(again), twins.our_logits()) and (again.lm_head is None) is tied
    loaded.remove()
    assert torch.equal(our_logits(again), before)


@pytest.mark.parametrize("tied", [False, True])
def test_the_merged_folder_is_the_trained_model(options: Make, tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    base = load_base(str(base_folder(tmp_path / "base", tie_word_embeddings=tied)), COMPUTE)
    adapter = full(base.model, options())
    our_steps(base.model, adapter)
    wanted = our_logits(base.model)
    merge_into_folder(base, adapter, tmp_path / "merged", COMPUTE, dtype=torch.float32)
    theirs, loading = AutoModelForCausalLM.from_pretrained(  # pyright: ignore
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.tie_word_embeddings is tied
    with torch.no_grad():
        assert (theirs(input_ids=IDS[None]).logits[0] - wanted).abs().max() < 1e-5


def test_a_file_is_as_small_as_the_base(options: Make, tmp_path: Path) -> None:
    model = tiny_model().bfloat16()
    adapter = full(model, options())
    our_steps(model, adapter, learning_rate=1.0)
    save_adapter(tmp_path / "a", adapter)
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert 2 * model.num_parameters() < size < 2.1 * model.num_parameters() + 8192  # the header, and norms in float32
    again = tiny_model().bfloat16()
    load_adapter(tmp_path / "a", again)
    assert torch.equal(our_logits(again), our_logits(model))
