"""What all methods beside linears share: how far they moved, and what may lie on a model together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from alpaca_lora.adapters.base import METHODS, Adapter, method_class
from alpaca_lora.adapters.linear_adapter import LinearAdapter
from alpaca_lora.adapters.lora import Lora
from alpaca_lora.errors import AdapterError, ConfigError
from alpaca_lora.models.classifier import attach_score
from tests.adapters.conftest import our_logits, train_a_little
from tests.tiny import tiny_model

Make = Callable[..., Any]
LINEAR = [name for name in METHODS if issubclass(method_class(name), LinearAdapter)]
IA3_TARGETS = {"lora_target_modules": ["k_proj", "v_proj", "down_proj"]}
MORE = {"adalora": {"adalora_init_r": 6}, "ia3": IA3_TARGETS, "freeze": {"train_last_layers": 1}}


def put_on(model: nn.Module, method: str, options: Make, **changes: Any) -> Adapter:
    chosen = options(**{"method": method, "num_virtual_tokens": 4, **MORE.get(method, {}), **changes})
    return method_class(method).attach(model, chosen, seed=0, encode_text=lambda text: list(text.encode()))


# ---- how far


@pytest.mark.parametrize("method", [*LINEAR, "rslora"])
def test_moved_is_the_norm_of_the_dense_change(options: Make, method: str) -> None:
    changes: dict[str, Any] = {"use_rslora": True} if method == "rslora" else {}
    adapter: Any = put_on(tiny_model(), "lora" if method == "rslora" else method, options, **changes)
    assert set(adapter.moved().values()) == {0.0}
    for step in range(2):
        train_a_little(adapter, seed=step)
        adapter.set_rows(None)
        for name, change in adapter.moved().items():
            layer = adapter.layers[name]
            dense = layer.merged_weight().double() - layer.base.weight.double()
            wanted = (layer.ia3_l.detach() - 1).norm() if method == "ia3" else dense.norm()
            assert change == pytest.approx(float(wanted), rel=1e-4) and change > 0.1


# ---- trained wholly, or with something beside it


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("saved", ["v_proj", "self_attn", "layers.1"])
def test_no_module_is_trained_wholly_and_by_an_adapter(options: Make, method: str, saved: str) -> None:
    model = tiny_model()
    before = our_logits(model)
    with pytest.raises(ConfigError, match=r"modules_to_save: .* is to be trained wholly and .* of it by an adapter"):
        put_on(model, method, options, modules_to_save=[saved])
    assert set(model.state_dict()) == set(tiny_model().state_dict()) and torch.equal(our_logits(model), before)
    put_on(model, method, options, modules_to_save=["norm"])  # elsewhere it may be


@pytest.mark.parametrize("method", LINEAR)
def test_nor_by_a_file_that_says_so(options: Make, method: str) -> None:
    adapter = put_on(tiny_model(), method, options)
    config = {**adapter.config, "modules_to_save": ["v_proj"]}
    file, model = "f.json", tiny_model()
    for read in (
        lambda: type(adapter).expected_shapes(model, config, file=file),
        lambda: type(adapter).from_peft(model, config, adapter.state_tensors(), trainable=False, file=file),
    ):
        with pytest.raises(AdapterError, match=r"f\.json: modules_to_save: .*v_proj is to be trained wholly"):
            read()
    assert set(model.state_dict()) == set(tiny_model().state_dict())


# ---- on one model

ON_IT = {
    "lora": r"model\.layers\.0\.self_attn\.q_proj: already carries an adapter",
    "ia3": r"model\.layers\.0\.self_attn\.k_proj: already carries an adapter",
    "prefix": "has virtual tokens already", "prompt": "has virtual tokens already",
    "freeze": r"model\.layers\.1\.self_attn\.q_proj: is already trained wholly",
    "bitfit": r"model\.layers\.0\.input_layernorm: is already trained wholly",
    "full": r"model\.embed_tokens: is already trained wholly",
}  # fmt: skip


@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("first", ON_IT)
def test_a_second_adapter_is_refused_and_told_what_is_there(options: Make, first: str, second: str) -> None:
    model = tiny_model()
    adapter = put_on(model, first, options)
    train_a_little(adapter)
    before, trained = our_logits(model), {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(AdapterError, match=ON_IT[first] if second not in LINEAR else "already"):
        put_on(model, second, options)
    assert torch.equal(our_logits(model), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    adapter.remove()
    put_on(model, second, options)  # and then it is free


@pytest.mark.parametrize("first", LINEAR)
def test_linears_without_one_may_get_one(options: Make, first: str) -> None:
    model = tiny_model()
    put_on(model, first, options)
    put_on(model, "dora", options, lora_target_modules=["o_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(AdapterError, match=r"model\.embed_tokens: is already trained wholly"):
        put_on(model, "lora", options, lora_target_modules=["up_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(AdapterError, match="already carries an adapter"):
        put_on(model, "lora", options, lora_target_modules=["up_proj"], modules_to_save=["layers.0.self_attn"])
    put_on(model, "lora", options, lora_target_modules=["up_proj"])


def test_one_head_belongs_to_one_adapter(options: Make) -> None:
    model = tiny_model()
    attach_score(model, 2, seed=0)
    first = put_on(model, "lora", options)
    with pytest.raises(AdapterError, match="score: is already trained wholly"):
        put_on(model, "lora", options, lora_target_modules=["o_proj"])
    first.remove()
    put_on(model, "lora", options, lora_target_modules=["o_proj"])


def test_what_lies_in_a_part_of_the_model_counts(options: Make) -> None:
    user = nn.ModuleDict({"one": nn.Sequential(nn.Linear(3, 3)), "two": nn.Linear(3, 3)})
    frozen = put_on(user["one"], "freeze", options, trained_modules=["0"])
    with pytest.raises(AdapterError, match=r"one\.0: is already trained wholly"):
        put_on(user, "lora", options, lora_target_modules=["two"])
    frozen.merge()
    assert isinstance(put_on(user, "lora", options, lora_target_modules=["two"]), Lora)


def test_a_loaded_adapter_counts_as_one_that_is_trained(options: Make) -> None:
    for method in ("freeze", "prefix", "lora"):
        adapter = put_on(tiny_model(), method, options)
        model = tiny_model()
        type(adapter).from_peft(model, adapter.config, adapter.state_tensors(), trainable=False, file="f")
        for other in ("full", "prompt"):
            with pytest.raises(AdapterError, match="already"):
                put_on(model, other, options)
