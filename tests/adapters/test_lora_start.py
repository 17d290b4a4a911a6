"""A LoRA that does not begin at an update of zero: what it computes, and that change is measured from the start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alpaca_lora.adapters.lora import Lora
from alpaca_lora.errors import AdapterError, NumericalError
from tests.adapters.conftest import our_logits, train_a_little
from tests.tiny import tiny_model

Make = Callable[..., Any]


def begun(options: Make, **more: Any) -> Lora:
    """An adapter of rank 4 whose q projections begin at a pair of rank 3."""
    adapter = Lora.attach(tiny_model(), options(lora_r=4, lora_dropout=0.0, **more), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, layer in adapter.layers.items():
        if name.endswith("q_proj"):
            a = torch.randn(3, layer.in_features, generator=generator)
            layer.begin_at(a, torch.randn(layer.out_features, 3, generator=generator) * 0.1)
    return adapter


def test_the_update_is_the_pair_whatever_the_scale(options: Make) -> None:
    adapter = begun(options, lora_alpha=12)
    generator = torch.Generator().manual_seed(1)
    for name, layer in adapter.layers.items():
        update = layer.scale * layer.lora_B @ layer.lora_A
        expected = torch.zeros_like(update)
        if name.endswith("q_proj"):
            a = torch.randn(3, layer.in_features, generator=generator)
            expected = torch.randn(layer.out_features, 3, generator=generator) * 0.1 @ a
        torch.testing.assert_close(update, expected)
    assert not torch.equal(our_logits(adapter.model), our_logits(tiny_model()))


def test_change_is_measured_from_the_start(options: Make) -> None:
    adapter = begun(options)
    assert set(adapter.moved().values()) == {0.0}
    assert "start" in dict(adapter.facts())
    before = {name: (layer.lora_B @ layer.lora_A).detach().clone() for name, layer in adapter.layers.items()}
    train_a_little(adapter)
    for name, layer in adapter.layers.items():
        changed = layer.scale * (layer.lora_B @ layer.lora_A - before[name])
        assert adapter.moved()[name] == pytest.approx(float(changed.detach().norm()), rel=1e-4)


def test_the_file_is_a_plain_lora(options: Make) -> None:
    """What it began at is no tensor of its own."""
    plain = Lora.attach(tiny_model(), options(lora_r=4), seed=0)
    adapter = begun(options)
    assert adapter.state_tensors().keys() == plain.state_tensors().keys()
    assert adapter.config == {**plain.config, "lora_dropout": 0.0}
    assert adapter.model.state_dict().keys() == plain.model.state_dict().keys()


def test_a_checkpoint_brings_the_start_back(options: Make) -> None:
    adapter = begun(options)
    adapter.begin(4)
    train_a_little(adapter)
    other = Lora.attach(tiny_model(), options(lora_r=4, lora_dropout=0.0), seed=0)
    other.begin(4)
    other.load_state_tensors(adapter.state_tensors())
    other.load_extra_state(adapter.extra_state())
    assert other.moved() == adapter.moved() and other.movement and adapter.movement
    assert other.movement.norms == adapter.movement.norms
    assert other.extra_state().keys() == adapter.extra_state().keys()
    assert all(torch.equal(one, other.extra_state()[key]) for key, one in adapter.extra_state().items())


def test_a_part_that_stays_where_it_began_is_noticed(options: Make) -> None:
    adapter = begun(options)
    adapter.begin(4)
    for step in range(4):
        with torch.no_grad():
            for layer in adapter.layers.values():
                layer.lora_B.add_(0.1)
        adapter.after_step(step)
    with pytest.raises(NumericalError, match="lora_A did not move in 4 modules"):
        adapter.check_acted()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop(next(iter(state))),
        lambda state: state.update({"nobody.start_A": torch.zeros(4, 32), "nobody.start_B": torch.zeros(32, 4)}),
        lambda state: state.update({next(iter(state)): torch.zeros(5, 32)}),
        lambda state: state.update({"nonsense": torch.zeros(1)}),
    ],
    ids=["half", "other module", "shape", "nonsense"],
)
def test_another_state_is_refused(options: Make, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = begun(options).extra_state()
    change(state)
    with pytest.raises(AdapterError, match="not the state of this adapter"):
        Lora.attach(tiny_model(), options(lora_r=4), seed=0).load_extra_state(state)
