"""torch.optim.AdamW is the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alpaca_lora.errors import ModelFileError
from alpaca_lora.training.optimizer import FlatAdamW

SHAPES = ((5, 3), (1,), (17, 2), (64, 8))


def parameters(seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    return [(f"p{i}", nn.Parameter(torch.randn(shape, generator=generator))) for i, shape in enumerate(SHAPES)]


def give_gradients(named: list[tuple[str, nn.Parameter]], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for _, parameter in named:
        gradient = torch.randn(parameter.shape, generator=generator)
        (parameter * gradient).sum().backward()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_same_trajectory_as_torch(weight_decay: float) -> None:
    ours, theirs = parameters(), parameters()
    flat = FlatAdamW(ours, beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=weight_decay)
    oracle = torch.optim.AdamW([p for _, p in theirs], betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    for step in range(50):
        learning_rate = 0.05 / (step + 1)
        flat.zero_grad()
        oracle.zero_grad()
        give_gradients(ours, step)
        give_gradients(theirs, step)
        norm = flat.grad_norm()
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_([p for _, p in theirs], 3.0)), rel=1e-6)
        flat.clip(norm, 3.0)
        oracle.param_groups[0]["lr"] = learning_rate
        flat.step(learning_rate)
        oracle.step()
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() <= 1e-6


def test_parameters_and_gradients_stay_views() -> None:
    named = parameters()
    flat = FlatAdamW(named)
    for step in range(2):
        flat.zero_grad()
        give_gradients(named, step)
        flat.step(0.1)
    total = sum(float(p.detach().sum()) for _, p in named)
    assert float(flat.weights().sum()) == pytest.approx(total, rel=1e-5)
    assert all(p.grad is not None and p.grad.data_ptr() % 64 == 0 for _, p in named)


def test_a_moved_parameter_is_noticed() -> None:
    named = parameters()
    flat = FlatAdamW(named)
    named[0][1].data = named[0][1].data.clone()
    with pytest.raises(AssertionError, match="p0 was moved"):
        flat.step(0.1)


def test_state_is_by_name_and_survives_another_order() -> None:
    named = parameters()
    flat = FlatAdamW(named)
    give_gradients(named, 0)
    flat.step(0.1)
    saved = {name: tensor.clone() for name, tensor in flat.state_tensors().items()}
    other_named = list(reversed(parameters(seed=9)))
    other = FlatAdamW(other_named)
    other.load_state(saved, updates=flat.updates, file="f")
    for optimizer, order in ((flat, named), (other, other_named)):
        optimizer.zero_grad()
        give_gradients(sorted(order, key=lambda pair: pair[0]), 1)
        optimizer.step(0.1)
    assert all(torch.equal(a, dict(other_named)[name]) for name, a in named)


def test_state_that_does_not_fit_is_named() -> None:
    flat = FlatAdamW(parameters())
    state = dict(flat.state_tensors())
    del state["exp_avg.p1"]
    state["exp_avg.q"] = torch.zeros(1)
    state["weight.p0"] = torch.zeros(3, 5)
    with pytest.raises(ModelFileError, match=r"f: exp_avg.p1 is missing; exp_avg.q is unknown; weight.p0 is \(3, 5\)"):
        flat.load_state(state, updates=1, file="f")


def test_flat_weights_are_those_of_the_state() -> None:
    flat = FlatAdamW(parameters())
    saved = {name: tensor.clone() for name, tensor in flat.state_tensors().items()}
    before = flat.weights()
    flat.load_weights(torch.zeros_like(before))
    assert torch.equal(flat.flat_weights(saved), before)


def test_nonfinite_gradients_are_named_and_clip_0_is_off() -> None:
    named = parameters()
    flat = FlatAdamW(named)
    give_gradients(named, 0)
    before = flat.grad_norm()
    flat.clip(before, 0)
    assert flat.grad_norm() == before
    assert named[2][1].grad is not None
    named[2][1].grad[3, 1] = torch.inf
    assert flat.nonfinite() == ["p2"]
    assert not torch.isfinite(torch.tensor(flat.grad_norm()))
