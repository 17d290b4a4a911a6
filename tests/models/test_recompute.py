"""Levels of recomputation: the same gradient bit for bit, and less kept, in every architecture."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from alpaca_lora.kernels.gated import gated
from alpaca_lora.kernels.norm import rms_norm
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.recompute import LEVELS, Level, is_made_again, made_again, rerun
from tests.models.hf_models import hf_model, ours_from

ARCHITECTURES = ("llama2-grouped-query", "gemma3", "qwen3", "gpt-neo")
LENGTHS = (17, 6, 200, 3)  # short ones by plain products, a long one by flash


def gradients(model: CausalLM, levels: Any) -> dict[str, torch.Tensor]:
    lengths = [min(length, model.config.max_position_embeddings) for length in LENGTHS]
    model.gradient_checkpointing = levels
    model.zero_grad()
    ids_T = torch.arange(sum(lengths)) % 90
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    hidden_TD = model(ids_T, positions_T, Packed(lengths))
    weight_TV = torch.randn(len(ids_T), 97, generator=torch.Generator().manual_seed(5))
    (model.logits(hidden_TD) * weight_TV.to(hidden_TD.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_level_gives_the_same_gradient(name: str, dtype: torch.dtype) -> None:
    model = ours_from(hf_model(name)).to(dtype).requires_grad_(True)
    plain = gradients(model, False)
    assert all(bool(one.any()) for one in plain.values())
    layers = model.config.num_layers
    mixes = [True, *((level,) * layers for level in LEVELS), tuple(LEVELS[i % 5] for i in range(1, layers + 1)),
             tuple(LEVELS[-1 - i % 5] for i in range(layers))]  # fmt: skip
    for levels in mixes:
        found = gradients(model, levels)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[key], plain[key]) for key in plain), levels


def test_a_level_is_nothing_without_gradients() -> None:
    model = ours_from(hf_model("llama2-grouped-query"))
    model.gradient_checkpointing = True
    assert set(model.levels()) == {"layer"}
    with torch.no_grad():
        assert set(model.levels()) == {"none"}
    model.gradient_checkpointing = False
    assert set(model.levels()) == {"none"}


def outlives(level: Level) -> tuple[bool, list[torch.Tensor]]:
    """Whether a norm's output is there after the forward pass in which a product saved it; the gradients."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(5, 8, generator=generator).requires_grad_()
    weight = torch.randn(8, 3, generator=generator).requires_grad_()
    with made_again(level):
        y_TD = rms_norm(x_TD, torch.ones(8), 1e-6)
        seen = weakref.ref(y_TD)
        out = (y_TD @ weight).sum()
    del y_TD
    gc.collect()
    kept = seen() is not None
    out.backward()
    assert x_TD.grad is not None and weight.grad is not None
    return kept, [x_TD.grad, weight.grad]


def test_a_norms_output_is_not_kept() -> None:
    kept, expected = outlives("none")
    again, found = outlives("norms")
    assert kept and not again
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def bytes_held(run: Callable[[], torch.Tensor]) -> int:
    """Sizes of what the graph of ``run`` packs as tensors."""
    held: list[int] = []
    run_with_hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: held.append(t.numel() * t.element_size()) or t, lambda t: t
    )
    with run_with_hooks:
        run()
    return sum(held)


def test_what_can_be_made_again_is_known_by_the_kernel_that_made_it() -> None:
    x_TD = torch.randn(3, 4, requires_grad=True)
    normal_TD = rms_norm(x_TD, torch.ones(4), 1e-6)
    assert is_made_again(normal_TD) and is_made_again(gated(normal_TD, normal_TD))
    assert not is_made_again(x_TD) and not is_made_again(normal_TD * 1) and not is_made_again(normal_TD.detach())


def test_rerun_keeps_its_input_alone_and_stops_where_nothing_more_is_asked_for() -> None:
    calls: list[str] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        calls.append("begin")
        y = x.exp()
        z = y.sin()  # the last that is kept is its input
        calls.append("end")
        return z

    x = torch.randn(4, requires_grad=True)
    result = rerun(function, x)
    assert bytes_held(lambda: rerun(function, x)) == 16 and bytes_held(lambda: function(x)) == 32
    calls.clear()
    result.sum().backward()
    assert calls == ["begin"]
    assert x.grad is not None and torch.equal(x.grad, x.detach().exp() * x.detach().exp().cos())
