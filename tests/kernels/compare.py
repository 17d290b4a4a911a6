"""Runs a fast op and its definition on the same inputs and compares outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

# Largest error allowed, as a share of the result's largest value (of 1 where all are smaller: inputs are of order 1,
# and a gradient that is zero in theory is a difference of such). float32: a hundred roundings. bfloat16 has 8 bits of
# fraction, one rounding is 2^-9 of the value; the two sides round at different places, a handful of times.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.5e-2}


def outputs_and_gradients(op: Callable, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = op(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    kept = [g.clone() for g in upstream]
    torch.autograd.backward(results, upstream)
    assert all(torch.equal(x, leaf) for x, leaf in zip(inputs, leaves, strict=True)), "an input was written to"
    assert all(torch.equal(a, b) for a, b in zip(kept, upstream, strict=True)), "a gradient from above was written to"
    return [*(r.detach() for r in results), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_same(fast: Callable, plain: Callable, inputs: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    """Both ops agree forward and backward; every input got a gradient from both or from neither."""
    got, wanted = outputs_and_gradients(fast, inputs), outputs_and_gradients(plain, inputs)
    assert len(got) == len(wanted)
    for place, (g, w) in enumerate(zip(got, wanted, strict=True)):
        assert g.dtype == w.dtype and g.shape == w.shape
        worst = (g.float() - w.float()).abs().max() / w.float().abs().max().clamp(min=1)
        assert worst <= TOLERANCE[dtype], f"result {place} of {tuple(g.shape)}: off by {worst:.2e} of the largest value"


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)
