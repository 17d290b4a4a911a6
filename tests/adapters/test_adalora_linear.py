"""The AdaLoRA layer and its penalty against the plain formulas, forward and backward, down to no rank at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alpaca_lora.adapters.adalora_linear import AdaLoRALinear, deviation
from alpaca_lora.adapters.lora_linear import DropoutRows
from alpaca_lora.adapters.rank_allocator import Triplets
from alpaca_lora.kernels.dropout import DropoutKey, keep_mask
from alpaca_lora.models.linear import Linear, project

KEYS = torch.arange(11, dtype=torch.int32) * 7919


def make_layers(dtype: torch.dtype, p: float) -> list[nn.Module]:
    """Adapted with rank 3, not at all, with rank 5, and with nothing left."""
    generator = torch.Generator().manual_seed(0)
    rows = DropoutRows(p, KEYS if p else None)
    layers: list[nn.Module] = []
    for i, (rank, out) in enumerate(((3, 10), (None, 6), (5, 7), (0, 4))):
        base = Linear(13, out, bias=True, dtype=dtype)
        for parameter in base.parameters():
            parameter.data.normal_(generator=generator)
        shapes = ((rank or 0, 13), (out, rank or 0), (rank or 0, 1))
        triplets = Triplets(*(torch.randn(shape, generator=generator) for shape in shapes))
        layers.append(base if rank is None else AdaLoRALinear(base, triplets, 0.5 + i, rows, "same"))
    return layers


def plain_formula(x: torch.Tensor, layers: list[nn.Module], p: float) -> list[torch.Tensor]:
    """y = x W^T + b + s drop(x) (diag(E) A)^T B^T, in the dtype of x, by autograd."""
    salt = next(layer.salt for layer in layers if isinstance(layer, AdaLoRALinear))
    dropped = x * keep_mask(DropoutKey(KEYS, p, salt), 13) / (1 - p) if p else x
    outputs = []
    for layer in layers:
        base: Any = layer.base if isinstance(layer, AdaLoRALinear) else layer
        y = F.linear(x, base.weight.to(x.dtype), base.bias.to(x.dtype))
        if isinstance(layer, AdaLoRALinear):
            y = y + layer.scale * (dropped @ (layer.lora_E * layer.lora_A).t() @ layer.lora_B.t())
        outputs.append(y)
    return outputs


def gradients(outputs: Any, x: torch.Tensor, layers: list[nn.Module]) -> list[torch.Tensor]:
    wanted = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad and p.numel())]
    weights = [torch.linspace(-1, 1, y.numel()).reshape(y.shape) for y in outputs]
    loss = sum(((y.float() * w).sum() for y, w in zip(outputs, weights, strict=True)), torch.zeros(()))
    return list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_formula(dtype: torch.dtype, p: float) -> None:
    layers = make_layers(dtype, p)
    x = torch.randn(11, 13, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    exact_x = x.detach().float().requires_grad_()
    got, want = project(x, layers), plain_formula(exact_x, layers, p)
    got_grads, want_grads = gradients(got, x, layers), gradients(want, exact_x, layers)
    assert all(y.dtype == dtype for y in got) and len(got_grads) == 7
    # float32: rounding of sums over at most 13 terms. bfloat16: 2^-8 for each of the four roundings in a row.
    tolerance = 2e-6 if dtype == torch.float32 else 4 * 2**-8
    for one, other in zip([*got, *got_grads], [*want, *want_grads], strict=True):
        assert (one.float() - other).abs().max() <= tolerance * other.abs().max()


def test_a_module_without_rank_is_its_base() -> None:
    layer = make_layers(torch.float32, 0.0)[3]
    assert isinstance(layer, AdaLoRALinear)
    x = torch.randn(2, 13, requires_grad=True)
    assert torch.equal(layer(x), layer.base(x)) and torch.equal(layer.merged_weight(), layer.base.weight)  # pyright: ignore
    assert layer.change() == 0 and layer.rank == 0


@pytest.mark.parametrize("trained", [False, True])
def test_what_is_kept_for_inference_follows_the_weights(trained: bool) -> None:
    """Of factors that are trained nothing is kept: the optimizer writes where no version counts."""
    layer = make_layers(torch.float32, 0.0)[0].requires_grad_(trained)
    assert isinstance(layer, AdaLoRALinear)
    x = torch.randn(4, 13)
    with torch.no_grad():
        before = layer(x)
        assert (layer.down() is layer.down()) is not trained  # made once
        layer.lora_E.mul_(2)
        assert not torch.equal(layer(x), before)
        layer.lora_E.data.mul_(0.5)
        if not trained:
            layer.weights_changed()
        assert torch.equal(layer(x), before)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), before)
    assert layer(x).requires_grad is trained


def test_change_is_the_norm_of_the_dense_update() -> None:
    layer = make_layers(torch.float32, 0.0)[2]
    assert isinstance(layer, AdaLoRALinear)
    dense = layer.merged_weight() - layer.base.weight  # pyright: ignore
    assert layer.change() == pytest.approx(float(dense.detach().norm()), rel=1e-5)


def test_penalty_is_the_plain_formula_with_its_gradient() -> None:
    adapted = [layer for _ in range(2) for layer in make_layers(torch.float32, 0.0) if isinstance(layer, AdaLoRALinear)]
    adapted[0].lora_A.data[1] = 2.0
    wanted = [p for layer in adapted if layer.rank for p in (layer.lora_A, layer.lora_B)]
    plain = torch.zeros(())
    for layer in adapted:
        if layer.rank:
            eye = torch.eye(layer.rank)
            plain = (
                plain + (layer.lora_A @ layer.lora_A.t() - eye).norm() + (layer.lora_B.t() @ layer.lora_B - eye).norm()
            )
    plain = plain / len(wanted)
    fast = deviation(adapted)
    torch.testing.assert_close(fast, plain)
    for one, other in zip(torch.autograd.grad(fast, wanted), torch.autograd.grad(plain, wanted), strict=True):
        torch.testing.assert_close(one, other)
