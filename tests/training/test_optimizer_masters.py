"""Parameters in bfloat16 with float32 masters, learning-rate ratios, and parameters that shrink; oracle: torch."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from alpaca_lora.adapters.base import Kept
from alpaca_lora.errors import NumericalError
from alpaca_lora.training import optimizer as optimizer_file
from alpaca_lora.training.guards import gradients_watched
from alpaca_lora.training.optimizer import FlatAdamW
from tests.training.test_optimizer import give_gradients, parameters

Named = list[tuple[str, nn.Parameter]]


def mixed() -> Named:
    """p0 and p2 in bfloat16, p1 and p3 in float32."""
    return [
        (name, nn.Parameter(p.detach().bfloat16() if name in ("p0", "p2") else p.detach().clone()))
        for name, p in parameters()
    ]


def masters(flat: FlatAdamW) -> dict[str, torch.Tensor]:
    return {name: flat.state_tensors()[f"weight.{name}"].clone() for name, _ in flat.named_parameters()}


def gradient_of(flat: FlatAdamW, name: str) -> torch.Tensor:
    return flat._slots[name].view(flat._grads)


# ---- masters


def test_masters_are_float32_adamw_on_the_same_gradients() -> None:
    named = mixed()
    flat = FlatAdamW(named, weight_decay=0.1)
    twins = [nn.Parameter(p.detach().float()) for _, p in named]
    oracle = torch.optim.AdamW(twins, weight_decay=0.1)
    for step in range(30):
        flat.zero_grad()
        give_gradients(named, step)
        for (name, _), twin in zip(named, twins, strict=True):
            twin.grad = gradient_of(flat, name).clone()
        oracle.param_groups[0]["lr"] = 0.01 / (step + 1)
        flat.step(0.01 / (step + 1))
        oracle.step()
    for (name, parameter), twin in zip(named, twins, strict=True):
        assert (masters(flat)[name] - twin).abs().max() <= 1e-6
        assert torch.equal(parameter.detach(), masters(flat)[name].to(parameter.dtype))
    assert named[0][1].dtype == torch.bfloat16 and named[1][1].dtype == torch.float32


def test_small_steps_are_not_lost_as_they_are_without_masters() -> None:
    named = [("w", nn.Parameter(torch.ones(8, dtype=torch.bfloat16)))]
    lost = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    flat, naive = FlatAdamW(named), torch.optim.AdamW([lost], lr=1e-3, weight_decay=0.0)
    for _ in range(20):
        flat.zero_grad()
        naive.zero_grad()
        named[0][1].sum().backward()
        lost.sum().backward()
        flat.step(1e-3)
        naive.step()
    assert float(lost.detach()[0]) == 1.0  # each step is less than half of what bfloat16 can tell from 1
    assert float(named[0][1].detach()[0]) == pytest.approx(0.98, abs=0.004)


def test_micro_batches_add_up_in_float32_and_leave_no_gradient() -> None:
    named = [("w", nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)))]
    parameter = named[0][1]
    flat = FlatAdamW(named)
    (parameter * 256).sum().backward()
    for _ in range(8):
        (parameter * 0.5).sum().backward()
        assert parameter.grad is None
    assert torch.equal(gradient_of(flat, "w"), torch.full((4,), 260.0))
    rounded = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))  # the negative control: as torch adds up
    (rounded * 256).sum().backward()
    for _ in range(8):
        (rounded * 0.5).sum().backward()
    assert rounded.grad is not None and float(rounded.grad[0]) == 256.0
    flat.zero_grad()
    assert flat.grad_norm() == 0.0


def test_a_parameter_used_twice_gets_the_sum() -> None:
    named = [("tied", nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16)))]
    flat = FlatAdamW(named)
    tied = named[0][1]
    (tied.sum() * 2 + (tied * 3).sum()).backward()
    assert torch.equal(gradient_of(flat, "tied"), torch.full((3, 2), 5.0))


def test_loading_rounds_the_masters_into_the_parameters() -> None:
    named = mixed()
    flat = FlatAdamW(named)
    saved = {name: tensor.clone() for name, tensor in flat.state_tensors().items()}
    saved["weight.p0"] += 1.003
    flat.load_state(saved, updates=0, file="f")
    assert torch.equal(named[0][1].detach(), saved["weight.p0"].bfloat16())
    assert torch.equal(masters(flat)["p0"], saved["weight.p0"])
    flat.load_weights(torch.full_like(flat.weights(), 1.003))
    assert torch.equal(named[2][1].detach(), torch.full((17, 2), 1.003).bfloat16())
    assert torch.equal(named[3][1].detach(), torch.full((64, 8), 1.003))


def test_a_rounded_parameter_that_was_moved_is_noticed() -> None:
    named = mixed()
    flat = FlatAdamW(named)
    flat.step(0.1)
    named[2][1].data = named[2][1].data.clone()
    with pytest.raises(AssertionError, match="p2 was moved"):
        flat.step(0.1)


def test_gradients_are_watched_and_named_whatever_the_dtype() -> None:
    named = mixed()
    flat = FlatAdamW(named)
    with gradients_watched(flat):
        give_gradients(named, 0)
    with pytest.raises(NumericalError, match=r"1 of 4 trained parameters get no gradient: p0"), gradients_watched(flat):
        give_gradients(named[1:], 0)
    (named[2][1] * torch.inf).sum().backward()
    assert flat.nonfinite() == ["p2"]


def test_the_hooks_do_not_keep_an_optimizer_alive() -> None:
    named = mixed()
    first = FlatAdamW(named)
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
    second = FlatAdamW(named)
    give_gradients(named, 0)
    assert gradient_of(second, "p0").abs().sum() > 0


def test_a_new_optimizer_takes_the_gradient_over_from_an_older_one() -> None:
    named = mixed()
    first = FlatAdamW(named)
    second = FlatAdamW(named)  # while the first is alive
    give_gradients(named, 0)
    assert gradient_of(second, "p0").abs().sum() > 0 and gradient_of(first, "p0").abs().sum() == 0
    before = named[0][1].detach().clone()
    second.step(0.1)
    assert not torch.equal(named[0][1].detach(), before)
    with pytest.raises(AssertionError, match="p0 was taken over by another optimizer"):
        FlatAdamW(named[:1])
        second.step(0.1)


# ---- ratios


def test_ratios_are_groups_of_torch_and_few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_file, "CHUNK", 32)  # so that runs are cut, too
    ours, theirs = parameters(), parameters()

    def ratio(name: str) -> float:
        return 16.0 if name in ("p1", "p3") else 1.0

    flat = FlatAdamW(ours, ratio=ratio, weight_decay=0.1)
    oracle = torch.optim.AdamW([{"params": [p], "lr": 0.01 * ratio(name)} for name, p in theirs], weight_decay=0.1)
    assert len(flat._runs) == 2 and flat.ratios() == {"p0": 1.0, "p1": 16.0, "p2": 1.0, "p3": 16.0}
    for step in range(20):
        flat.zero_grad()
        oracle.zero_grad()
        give_gradients(ours, step)
        give_gradients(theirs, step)
        flat.step(0.01)
        oracle.step()
    assert [name for name, _ in flat.named_parameters()] == ["p0", "p1", "p2", "p3"]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-6


# ---- parameters that shrink


@pytest.mark.parametrize("make", [parameters, mixed])
def test_what_is_left_trains_on_as_if_the_rest_had_never_been(make) -> None:
    named, whole = make(), make()
    kept = {
        "p0": Kept(0, torch.tensor([0, 3])),
        "p2": Kept(1, torch.tensor([1])),
        "p3": Kept(1, torch.tensor([], dtype=torch.int64)),
    }
    flat, oracle = FlatAdamW(named), FlatAdamW(whole)
    for optimizer, order in ((flat, named), (oracle, whole)):
        for step in range(3):
            optimizer.zero_grad()
            give_gradients(order, step)
            optimizer.step(0.05)
    flat.select(kept)
    assert [tuple(p.shape) for _, p in named] == [(2, 3), (1,), (17, 1), (64, 0)]
    assert all(p.grad is None or not p.grad.any() for _, p in named)
    for step in range(3, 6):
        flat.zero_grad()
        oracle.zero_grad()
        give_gradients(whole, step)
        for (name, parameter), (_, other) in zip(named, whole, strict=True):
            gradient = gradient_of(oracle, name).to(other.dtype)
            if name in kept:
                gradient = gradient.index_select(kept[name].dim, kept[name].index)
            (parameter * gradient).sum().backward()
        flat.step(0.05)
        oracle.step(0.05)
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        for name, _ in named:
            expected = oracle.state_tensors()[f"{kind}.{name}"]
            if name in kept:
                expected = expected.index_select(kept[name].dim, kept[name].index)
            assert torch.equal(flat.state_tensors()[f"{kind}.{name}"], expected), (kind, name)
    for name, parameter in named:
        assert torch.equal(parameter.detach(), masters(flat)[name].to(parameter.dtype))
    assert flat.weights().numel() < oracle.weights().numel()


def test_a_state_that_shrank_is_loaded_into_one_that_did_too() -> None:
    named, again = mixed(), mixed()
    kept = {"p3": Kept(0, torch.arange(0, 64, 2))}
    flat, other = FlatAdamW(named), FlatAdamW(again)
    flat.select(kept)
    give_gradients(named, 0)
    flat.step(0.1)
    other.select(kept)
    other.load_state({k: v.clone() for k, v in flat.state_tensors().items()}, updates=1, file="f")
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named, again, strict=True))


def test_what_is_not_trained_cannot_shrink() -> None:
    flat = FlatAdamW(parameters())
    with pytest.raises(AssertionError, match="not trained here"):
        flat.select({"q": Kept(0, torch.tensor([0]))})
