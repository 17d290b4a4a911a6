"""Guards that look at a whole run: each is shown a run that is not what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from alpaca_lora.errors import NumericalError
from alpaca_lora.training.guards import FrozenCheck, check_acted
from tests.tiny import tiny_model
from tests.training.tiny_run import tiny_trainer

# ---- frozen weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["one element", "two that are exchanged for others", "sign of a zero"])
def test_a_frozen_weight_that_changes_is_named(dtype: torch.dtype, change: str) -> None:
    model = tiny_model().to(dtype)
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight").data
    weight[3, 3] = 0
    frozen = FrozenCheck(model)
    frozen.check()
    if change == "one element":
        weight[5, 7] = torch.nextafter(weight[5, 7], torch.ones((), dtype=dtype))
    elif change == "sign of a zero":
        weight[3, 3] = -weight[3, 3]
    else:
        weight[5, 7] += 1
        weight[6, 8] -= 1
    with pytest.raises(NumericalError, match=r"1 of 21 frozen weights were changed: model\.layers\.1\.mlp\.up_proj,"):
        frozen.check()


def test_weights_that_are_trained_may_change_and_names_are_the_base_s() -> None:
    trainer = tiny_trainer(adapter={"modules_to_save": ["norm"]}, validation=False)
    frozen = FrozenCheck(trainer.model)
    trainer.train()
    frozen.check()
    base: Any = trainer.model.get_submodule("model.layers.0.self_attn.q_proj.base")
    base.weight.data[0, 0] += 1
    with pytest.raises(NumericalError, match=r"changed: model\.layers\.0\.self_attn\.q_proj, "):
        frozen.check()


def test_any_shape_and_dtype_has_a_checksum() -> None:
    """Sizes that do not divide into 64 bits, views into one memory, an empty one, a scalar."""
    whole = torch.arange(40, dtype=torch.bfloat16)
    tensors = [
        whole[3:8], whole[8:11], whole[12:36].view(4, 6).t(), torch.zeros(0), torch.tensor(3.0),
        torch.arange(7, dtype=torch.uint8), torch.randn(3, 5, dtype=torch.float64),
    ]  # fmt: skip
    model = nn.ParameterList([nn.Parameter(tensor, requires_grad=False) for tensor in tensors])
    for number, parameter in enumerate(model):
        frozen = FrozenCheck(model)
        frozen.check()
        parameter.data.reshape(-1)[-1:].add_(1)
        if parameter.is_contiguous() and parameter.numel():
            with pytest.raises(NumericalError, match=rf"changed: {number},"):
                frozen.check()


# ---- the learning rates


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_plus_that_the_optimizer_does_not_know_of_is_noticed(method: str) -> None:
    adapter = {"method": method, "lora_plus_ratio": 16.0}
    plus, plain = tiny_trainer(adapter=adapter, validation=False), tiny_trainer(adapter={"method": method})
    for trainer in (plus, plain):
        trainer.train()
        check_acted(trainer.adapter, trainer.state.step, trainer.optimizer)
    with pytest.raises(NumericalError, match=rf"lora_B.weight: was trained at 1 times .* method {method} asks for 16"):
        check_acted(plus.adapter, 6, plain.optimizer)


def test_a_ratio_changes_what_is_trained() -> None:
    """In the first step lora_A has no gradient yet, and AdamW moves each element of lora_B by its learning rate."""
    moved = {}
    for ratio in (1.0, 16.0):
        trainer = tiny_trainer(adapter={"lora_plus_ratio": ratio, "lora_dropout": 0.0}, validation=False)
        trainer.train_step()
        moved[ratio] = torch.cat([layer.lora_B.detach().abs().view(-1) for layer in trainer.adapter.layers.values()])  # pyright: ignore
    assert float(moved[16.0].median() / moved[1.0].median()) == pytest.approx(16, rel=1e-3)


# ---- parts that stand still


@pytest.mark.parametrize(
    ("adapter", "still", "told"),
    [
        ({}, "q_proj.lora_A.weight", "lora_A did not move in 2 modules"),
        ({"method": "dora"}, "v_proj.lora_A.weight", "lora_A did not move in 2 modules"),
        (
            {"method": "prefix", "prefix_projection": True, "num_virtual_tokens": 4}, "transform.0.weight",
            "prompt_encoder.transform.0.weight did not move in 1 modules",
        ),
        (
            {"method": "adalora", "adalora_init_r": 5, "lora_r": 3, "adalora_tinit": 1, "adalora_tfinal": 1},
            "v_proj.lora_A", "lora_A did not move in 2 modules",
        ),
    ],
)  # fmt: skip
def test_a_run_in_which_a_part_stood_still_fails(adapter: dict[str, Any], still: str, told: str) -> None:
    trainer = tiny_trainer(adapter=adapter, validation=False)
    kept = {n: p.detach().clone() for n, p in trainer.optimizer.named_parameters() if n.endswith(still)}
    step = trainer.optimizer.step

    def all_but_one(learning_rate: float) -> None:
        step(learning_rate)
        for name, parameter in trainer.optimizer.named_parameters():
            if name in kept:
                parameter.data.copy_(kept[name])

    trainer.optimizer.step = all_but_one
    with pytest.raises(NumericalError, match=told):
        trainer.train()
    tiny_trainer(adapter=adapter, validation=False).train()


def test_the_best_weights_may_be_those_of_a_step_before_all_had_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one step lora_A is where it was: that is no defect of a run that went on."""
    trainer = tiny_trainer(eval_steps=1)
    losses = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(trainer, "evaluate", lambda: (next(losses), {}))
    start = {n: p.detach().clone() for n, p in trainer.optimizer.named_parameters()}
    state = trainer.train()
    assert state.best_step == 1
    now = dict(trainer.optimizer.named_parameters())
    assert all(torch.equal(now[name], tensor) == ("lora_A" in name) for name, tensor in start.items())
