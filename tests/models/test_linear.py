"""The linear's contract, and projections that share an input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from alpaca_lora.models.linear import Linear, LinearContract, project


def filled(inner: int, outer: int, *, bias: bool = False) -> Linear:
    linear = Linear(inner, outer, bias=bias)
    generator = torch.Generator().manual_seed(inner * outer)
    for parameter in linear.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


def test_forward_is_the_formula_and_weights_are_frozen() -> None:
    linear, x_TD = filled(5, 3, bias=True), torch.randn(7, 5)
    assert isinstance(linear, LinearContract)
    assert linear.bias is not None
    torch.testing.assert_close(linear(x_TD), x_TD @ linear.dense_weight().T + linear.bias)
    assert linear.dense_weight() is linear.weight
    assert not any(parameter.requires_grad for parameter in linear.parameters())


def test_project_is_each_linear_on_its_own() -> None:
    linears, x_TD = (filled(5, 3), filled(5, 4)), torch.randn(7, 5)
    for together, linear in zip(project(x_TD, linears), linears, strict=True):
        assert torch.equal(together, linear(x_TD))


def test_the_first_linear_that_can_do_the_whole_group_does_it() -> None:
    class Grouping(nn.Module):
        @staticmethod
        def project_together(x_TD: torch.Tensor, linears: Sequence[nn.Module]) -> tuple[torch.Tensor, ...]:
            return tuple(torch.full((len(x_TD), 1), float(i)) for i in range(len(linears)))

    outputs = project(torch.zeros(2, 5), (filled(5, 3), Grouping(), filled(5, 4)))
    assert [float(output[0, 0]) for output in outputs] == [0.0, 1.0, 2.0]
