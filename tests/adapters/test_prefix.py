"""Prefix tuning against PEFT in both directions, its network, and files that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca_lora.adapters.options import AdapterOptions
from alpaca_lora.adapters.peft_format import load_adapter, save_adapter
from alpaca_lora.adapters.prefix import PrefixTuning
from alpaca_lora.errors import AdapterError
from tests.adapters.conftest import Twins, our_logits, train_a_little
from tests.adapters.peft_twin import PEFT_ON_TRANSFORMERS, assert_peft_loads_ours, assert_we_load_peft_s
from tests.adapters.virtual_twin import FAMILIES, assert_classifiers_agree, assert_same_gradient, family_twins
from tests.tiny import tiny_model

KEY = "prompt_embeddings"
pytestmark = pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)


def attach(model: Any, **changes: Any) -> PrefixTuning:
    options = AdapterOptions(**{"method": "prefix", "num_virtual_tokens": 5, **changes})
    adapter = PrefixTuning.attach(
        model, options, seed=0, encode_text=lambda text: [byte % 97 for byte in text.encode()[:4]]
    )
    train_a_little(adapter)
    return adapter


def saved(folder: Path, **changes: Any) -> Path:
    save_adapter(folder, attach(tiny_model(), **changes))
    return folder


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --- PEFT


@pytest.mark.parametrize("changes", [{}, {"num_virtual_tokens": 1}, {"prefix_projection": True}])
def test_peft_loads_ours_and_says_the_same(twins: Twins, tmp_path: Path, changes: dict[str, Any]) -> None:
    from peft import PrefixTuningConfig

    bare = our_logits(twins.ours)
    model = assert_peft_loads_ours(twins, attach(twins.ours, **changes), tmp_path / "a")
    assert isinstance(model.peft_config["default"], PrefixTuningConfig)
    assert load_file(tmp_path / "a" / "adapter_model.safetensors").keys() == {KEY}
    assert (twins.our_logits() - bare).abs().max() > 0.1


def test_we_load_peft_s_and_say_the_same(twins: Twins, tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    torch.manual_seed(0)
    theirs = get_peft_model(twins.theirs, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7))
    adapter = assert_we_load_peft_s(twins, theirs, tmp_path)
    assert all(adapter.moved().values())  # from no known start


def test_what_peft_trained_through_its_network_is_plain_in_its_file(twins: Twins, tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    torch.manual_seed(0)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=9
    )
    theirs = get_peft_model(twins.theirs, config)
    theirs.save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    adapter, _ = load_adapter(tmp_path / "a", twins.ours, trainable=True)
    assert [name for name, _ in adapter.trained_parameters()] == [KEY]
    assert (twins.their_logits(theirs.eval()) - twins.our_logits()).abs().max() < 1e-5
    save_adapter(tmp_path / "b", adapter)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["prefix_projection"] is False


@pytest.mark.parametrize("name", [*FAMILIES, "rope-dynamic"])
def test_peft_says_the_same_of_every_family(tmp_path: Path, name: str) -> None:
    twins = family_twins(name)
    assert_peft_loads_ours(twins, attach(twins.ours), tmp_path / "a")


def test_the_gradient_is_peft_s(twins: Twins) -> None:
    from peft import PrefixTuningConfig

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    assert_same_gradient(twins, attach(twins.ours), config)


def test_a_classifier_is_peft_s(tmp_path: Path) -> None:
    assert_classifiers_agree(attach, tmp_path)


# --- the network


def test_the_network_starts_at_the_text_and_is_folded_away(tmp_path: Path) -> None:
    options = AdapterOptions(method="prefix", num_virtual_tokens=5, prefix_projection=True)
    plain = PrefixTuning.attach(tiny_model(), AdapterOptions(method="prefix", num_virtual_tokens=5), seed=0)
    model = tiny_model()
    adapter = PrefixTuning.attach(model, options, seed=0)
    assert torch.equal(adapter.state_tensors()[KEY], plain.state_tensors()[KEY])
    shapes = {name: tuple(parameter.shape) for name, parameter in adapter.trained_parameters()}
    assert shapes == {
        "prompt_encoder.embedding.weight": (5, 16),
        "prompt_encoder.transform.0.weight": (32, 16), "prompt_encoder.transform.0.bias": (32,),  # the model's width
        "prompt_encoder.transform.2.weight": (64, 32), "prompt_encoder.transform.2.bias": (64,),
    }  # fmt: skip
    again = PrefixTuning.attach(tiny_model(), options, seed=0)
    for (_, one), (_, other) in zip(adapter.trained_parameters(), again.trained_parameters(), strict=True):
        assert torch.equal(one, other)
    train_a_little(adapter)
    assert min(adapter.moved().values()) > 0.1
    save_adapter(tmp_path / "a", adapter)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["prefix_projection"] is False and config["num_attention_heads"] == 2 and config["token_dim"] == 16
    folded = tiny_model()
    load_adapter(tmp_path / "a", folded)
    assert torch.equal(our_logits(folded), our_logits(model))


def test_the_formula_of_the_network() -> None:
    """start + W2 tanh(W1 e + b1) + b2, written out."""
    adapter = attach(tiny_model(), prefix_projection=True, prefix_hidden_size=3)
    e, w1, b1, w2, b2 = (parameter.detach() for _, parameter in adapter.trained_parameters())
    wanted = adapter.extra_state()["start"] + torch.tanh(e @ w1.t() + b1) @ w2.t() + b2
    torch.testing.assert_close(adapter.state_tensors()[KEY], wanted)


# --- files


def test_save_load_save_is_byte_equal(tmp_path: Path) -> None:
    first = saved(tmp_path / "a")
    model = tiny_model()
    adapter, _ = load_adapter(first, model, trainable=True)
    assert [name for name, _ in adapter.trained_parameters()] == [KEY]
    save_adapter(tmp_path / "b", adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (first / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens: is 0, expected at least 1"),
        ({"num_virtual_tokens": 512}, "num_virtual_tokens: is 512, .*fewer than the model's context of 512"),
        ({"num_virtual_tokens": "5"}, "num_virtual_tokens: is '5'"),
        ({"num_virtual_tokens": 6}, r"prompt_embeddings has shape \(5, 64\), expected \(6, 64\)"),
        ({"num_layers": 3}, "num_layers: is 3, expected 2, is this the right base model"),
        ({"num_attention_heads": 4}, "num_attention_heads: is 4, expected 2"),
        ({"token_dim": 32}, "token_dim: is 32, expected 16"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules: is 2, expected 1"),
        ({"task_type": "TOKEN_CLS"}, "'TOKEN_CLS' is not supported by method prefix"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    edit(saved(tmp_path / "a"), **changes)
    model = tiny_model()
    with pytest.raises(AdapterError, match=words):
        load_adapter(tmp_path / "a", model)
    assert model.prefix is None


def test_tensors_that_do_not_fit_and_keys_that_nobody_knows(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    edit(folder, made_by="somebody")
    adapter, _ = load_adapter(folder, tiny_model())
    assert len(adapter.messages) == 1 and "made_by: unknown key" in adapter.messages[0]
    assert adapter.config["made_by"] == "somebody"
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.score.weight": torch.ones(2, 32)}, file)
    with pytest.raises(AdapterError):
        load_adapter(folder, tiny_model())
    save_file({"prompt_embedding": load_file(file)[KEY]}, file)
    with pytest.raises(AdapterError, match="missing prompt_embeddings"):
        load_adapter(folder, tiny_model())


def test_a_prefix_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    with pytest.raises(AdapterError, match="num_layers: is 2, expected 3"):
        load_adapter(folder, tiny_model(num_layers=3))
