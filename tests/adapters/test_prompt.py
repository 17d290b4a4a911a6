"""Prompt tuning against PEFT in both directions, against the definition, and files that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alpaca_lora.adapters.options import AdapterOptions
from alpaca_lora.adapters.peft_format import load_adapter, save_adapter
from alpaca_lora.adapters.prompt import PromptTuning
from alpaca_lora.errors import AdapterError
from alpaca_lora.models.attention import Packed
from tests.adapters.conftest import IDS, Twins, our_logits, train_a_little
from tests.adapters.peft_twin import PEFT_ON_TRANSFORMERS
from tests.adapters.virtual_twin import FAMILIES, assert_classifiers_agree, assert_same_gradient, family_twins
from tests.models.hf_models import hf_model, ours_from
from tests.tiny import tiny_model

KEY = "prompt_embeddings"
pytestmark = pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)


def attach(model: Any, **changes: Any) -> PromptTuning:
    options = AdapterOptions(**{"method": "prompt", "num_virtual_tokens": 5, **changes})
    adapter = PromptTuning.attach(
        model, options, seed=0, encode_text=lambda text: [byte % 97 for byte in text.encode()[:4]]
    )
    train_a_little(adapter)
    return adapter


def their_logits(twins: Twins, model: Any) -> torch.Tensor:
    """Of the row alone: PEFT gives those of the virtual tokens too."""
    return twins.their_logits(model)[-len(IDS) :]


# --- PEFT


@pytest.mark.parametrize("name", ["tiny", *FAMILIES])
def test_peft_loads_ours_and_says_the_same(tmp_path: Path, name: str, twins: Twins) -> None:
    from peft import PeftModel, PromptTuningConfig

    twins = twins if name == "tiny" else family_twins(name)
    bare = twins.our_logits()
    save_adapter(tmp_path / "a", attach(twins.ours))
    model = PeftModel.from_pretrained(twins.theirs, str(tmp_path / "a"))
    assert isinstance(model.peft_config["default"], PromptTuningConfig)
    assert (their_logits(twins, model) - twins.our_logits()).abs().max() < 1e-5
    assert (twins.our_logits() - bare).abs().max() > 0.1


def test_we_load_peft_s_and_say_the_same(twins: Twins, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(0)
    theirs = get_peft_model(twins.theirs, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7))
    theirs.save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    adapter, _ = load_adapter(tmp_path / "a", twins.ours)
    assert adapter.messages == [] and adapter.moved()[KEY] > 0
    assert (their_logits(twins, theirs.eval()) - twins.our_logits()).abs().max() < 1e-5
    save_adapter(tmp_path / "b", adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_the_gradient_is_peft_s(twins: Twins) -> None:
    from peft import PromptTuningConfig

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    assert_same_gradient(twins, attach(twins.ours), config)


def test_a_classifier_is_peft_s(tmp_path: Path) -> None:
    assert_classifiers_agree(attach, tmp_path)


# --- the definition


@pytest.mark.parametrize("name", ["llama2-grouped-query", "gemma3", "gpt-neo"])
def test_embeddings_in_front_of_the_row_s_own_give_the_same_rows_and_gradient(name: str) -> None:
    """Run through the layers together with the row, as the paper has it."""
    model, row = ours_from(hf_model(name)), IDS[:9] % 97
    adapter = attach(model)
    ((_, embeddings),) = adapter.trained_parameters()
    weights = torch.randn(9, 97, generator=torch.Generator().manual_seed(1))
    ours = model.logits(model(row, torch.arange(9), Packed([9])))
    (our_gradient,) = torch.autograd.grad((ours * weights).sum(), embeddings)
    x_TD = torch.cat((embeddings, model.embed(row)))
    together = model.logits(model.final_norm(model.run_layers(x_TD, torch.arange(14), Packed([14]))))[5:]
    (gradient,) = torch.autograd.grad((together * weights).sum(), embeddings)
    torch.testing.assert_close(ours, together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_gradient, gradient, atol=1e-4, rtol=1e-4)
    assert gradient.abs().max() > 0.1


def test_the_start_is_the_text_s_embeddings_scaled_as_the_model_does() -> None:
    model = ours_from(hf_model("gemma3"))
    assert model.config.embedding_scale != 1.0
    options = AdapterOptions(method="prompt", num_virtual_tokens=3)
    adapter = PromptTuning.attach(model, options, seed=0, encode_text=lambda text: [4, 9, 2] if text else [])
    assert torch.equal(adapter.state_tensors()[KEY], model.embed(torch.tensor([4, 9, 2])))


def test_a_rotation_by_length_is_told_of() -> None:
    assert any("dynamic NTK" in message for message in attach(ours_from(hf_model("rope-dynamic"))).messages)
    assert attach(ours_from(hf_model("rope-linear"))).messages == []


# --- files


def test_the_folder_holds_one_tensor_and_loads_again(tmp_path: Path) -> None:
    model = tiny_model()
    save_adapter(tmp_path / "a", attach(model))
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {KEY: (5, 32)}
    again = tiny_model()
    adapter, _ = load_adapter(tmp_path / "a", again, trainable=True)
    assert [name for name, _ in adapter.trained_parameters()] == [KEY]
    assert torch.equal(our_logits(again), our_logits(model))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_dim": 16}, "token_dim: is 16, expected 32"),
        ({"num_virtual_tokens": 9999}, "num_virtual_tokens: is 9999"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "'SEQ_2_SEQ_LM' is not supported by method prompt"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    save_adapter(tmp_path / "a", attach(tiny_model()))
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(AdapterError, match=words):
        load_adapter(tmp_path / "a", tiny_model())
