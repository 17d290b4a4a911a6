"""BitFit on models with biases, without, and with norms that have both; PEFT is the oracle of the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alpaca_lora.adapters.bitfit import BitFit
from alpaca_lora.adapters.lora_config import NO_TARGETS
from alpaca_lora.adapters.peft_format import load_adapter, save_adapter
from alpaca_lora.errors import AdapterError, ConfigError
from alpaca_lora.models.classifier import attach_score
from tests.adapters.conftest import Twins, our_logits
from tests.adapters.peft_twin import (
    PEFT_ON_TRANSFORMERS,
    assert_peft_loads_ours,
    assert_we_load_peft_s,
    our_steps,
    their_steps,
)
from tests.models.hf_models import hf_model, ours_from
from tests.tiny import tiny_model

Make = Callable[..., Any]
# none, of q, k and v only, of all linears, of linears and norms
FAMILIES = ["llama2-grouped-query", "qwen2", "llama-bias-wide-heads", "gpt-neo"]


def twins_of(family: str) -> Twins:
    theirs = hf_model(family, vocab_size=264)
    return Twins(theirs, ours_from(theirs))


def fitted(model: Any, options: Any) -> BitFit:
    return BitFit.attach(model, options, seed=0)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("family", "parts", "biases", "norms"),
    [
        ("llama2-grouped-query", "auto", False, True),
        ("llama2-grouped-query", "norms", False, True),
        ("llama2-grouped-query", "both", False, True),
        ("qwen2", "auto", True, False),
        ("qwen2", "biases", True, False),
        ("qwen2", "norms", False, True),
        ("qwen2", "both", True, True),
        ("gpt-neo", "both", True, True),
    ],
)
def test_parts(options: Make, family: str, parts: str, biases: bool, norms: bool) -> None:
    model = twins_of(family).ours
    adapter = fitted(model, options(bitfit_parts=parts))
    all_biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    all_norms = {name for name, p in model.named_parameters() if p.ndim == 1 and not name.endswith(".bias")}
    assert trained(model) == (all_biases if biases else set()) | (all_norms if norms else set()) != set()
    assert bool(adapter.messages) == (family.startswith("llama") and parts == "auto")
    assert adapter.config["bias"] == ("all" if biases else "none")


def test_norms_of_a_family_with_biased_norms_are_whole(options: Make) -> None:
    model = twins_of("gpt-neo").ours
    adapter = fitted(model, options(bitfit_parts="norms"))
    assert adapter.config["bias"] == "none" and "transformer.ln_f.bias" in trained(model)
    assert all(".ln_" in name for name in trained(model))


def test_what_cannot_be_is_refused(options: Make) -> None:
    with pytest.raises(ConfigError, match="bitfit_parts: this model has no biases, expected auto, norms or both"):
        fitted(tiny_model(), options(bitfit_parts="biases"))
    with pytest.raises(ConfigError, match="this model has no norms"):
        fitted(nn.Sequential(nn.Linear(2, 2)), options(bitfit_parts="both"))


def test_a_classifier_s_head_is_trained_with_them(options: Make) -> None:
    model = twins_of("qwen2").ours
    attach_score(model, 2, seed=0)
    adapter = fitted(model, options())
    assert "score.weight" in trained(model) and adapter.config["modules_to_save"] == ["score"]
    assert "model.layers.0.self_attn.q_proj.bias" in trained(model)


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize("parts", ["auto", "norms", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_ours_and_we_load_it_again(options: Make, tmp_path: Path, family: str, parts: str) -> None:
    twins = twins_of(family)
    before = twins.our_logits()
    adapter = fitted(twins.ours, options(bitfit_parts=parts))
    our_steps(twins.ours, adapter)
    assert (twins.our_logits() - before).abs().max() > 0.02
    assert_peft_loads_ours(twins, adapter, tmp_path / "a")
    again = twins_of(family).ours
    loaded, _ = load_adapter(tmp_path / "a", again)
    assert loaded.messages == [] and torch.equal(our_logits(again), twins.our_logits())
    assert loaded.moved() == pytest.approx(adapter.moved()) and all(loaded.moved().values())
    save_adapter(tmp_path / "b", loaded)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    loaded.remove()
    assert torch.equal(our_logits(again), before)


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("qwen2", {"bias": "all"}),
        ("gpt-neo", {"bias": "all"}),
        ("qwen2", {"bias": "all", "modules_to_save": ["input_layernorm", "model.norm"]}),
        ("llama2-grouped-query", {"modules_to_save": ["input_layernorm", "post_attention_layernorm", "model.norm"]}),
    ],
)
def test_we_load_peft_s(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    twins = twins_of(family)
    before = twins.our_logits()
    theirs = get_peft_model(twins.theirs, LoraConfig(target_modules=NO_TARGETS, task_type="CAUSAL_LM", **more))
    their_steps(theirs)
    adapter = assert_we_load_peft_s(twins, theirs, tmp_path)
    assert (twins.our_logits() - before).abs().max() > 0.02
    adapter.merge()
    assert (twins.our_logits() - twins.their_logits(theirs)).abs().max() < 1e-5


def test_a_file_must_hold_every_bias(options: Make, tmp_path: Path) -> None:
    model = twins_of("qwen2").ours
    adapter = fitted(model, options())
    our_steps(model, adapter)
    save_adapter(tmp_path / "a", adapter)
    shapes = BitFit.expected_shapes(model, adapter.config, file="f")
    assert shapes.keys() == adapter.state_tensors().keys() and len(shapes) == 6
    with pytest.raises(AdapterError, match=r"missing base_model.*\.0\.self_attn\.o_proj\.bias"):
        load_adapter(tmp_path / "a", twins_of("llama-bias-wide-heads").ours)
    with pytest.raises(AdapterError, match="f: bias: is 'some', expected none, all or lora_only"):
        BitFit.expected_shapes(model, {**adapter.config, "bias": "some"}, file="f")
