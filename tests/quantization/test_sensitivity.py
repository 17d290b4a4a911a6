"""Sensitivity: against the same sum by plain autograd over the whole model, against measured growth, and of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from alpaca_lora.errors import ConfigError
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.load import open_source
from alpaca_lora.quantization.int4 import Int4
from alpaca_lora.quantization.int8 import Int8
from alpaca_lora.quantization.layer_walk import LayerWalk
from alpaca_lora.quantization.nf4 import NF4
from alpaca_lora.quantization.plan import Plan
from alpaca_lora.quantization.scheme import Scheme
from alpaca_lora.quantization.sensitivity import measure_sensitivity
from tests.quantization.calibration_models import ARCHITECTURES, load, rows, save
from tests.tiny import tiny_model

SCHEMES: tuple[Scheme, ...] = (Int4(4, symmetric=True), NF4(), Int8())


def candidates(model: CausalLM, schemes: tuple[Scheme, ...] = SCHEMES) -> dict[str, tuple[Scheme, ...]]:
    return dict.fromkeys(Plan.uniform(model, "int8").schemes, schemes)


def change(model: CausalLM, name: str, scheme: Scheme) -> torch.Tensor:
    weight_OI = model.get_parameter(f"{name}.weight")
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    parts = scheme.quantize(weight_OI, name=name)
    return scheme.tile(parts, shape, slice(0, shape[0]), slice(0, shape[1]), torch.float32) - weight_OI


def by_autograd(model: CausalLM, name: str, scheme: Scheme) -> float:
    """1/2 sum_rows (sum_t g_t . dW x_t)^2 / tokens, row by row through the whole model, for the rows' own tokens."""
    total, count = 0.0, 0
    for row in rows():
        kept: list[torch.Tensor] = []

        def keep(_linear: Any, given: Any, y_TO: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            leaf = y_TO.detach().requires_grad_()
            kept.extend((given[0], leaf))
            return leaf

        handle = model.get_submodule(name).register_forward_hook(keep)
        hidden_TD = model(row, torch.arange(len(row)), Packed([len(row)]))
        handle.remove()
        loss = F.cross_entropy(model.logits(hidden_TD)[:-1], row[1:], reduction="sum")
        (gradient_TO,) = torch.autograd.grad(loss, kept[1])
        moved_TO = kept[0] @ change(model, name, scheme).t()
        total += float((moved_TO * gradient_TO).double().sum().square())
        count += len(row) - 1
    return total / (2 * count)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_sum_by_autograd(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerWalk, "draw", lambda _walk, stream, *_: stream.next_tokens()[1])
    model = load(save(name, tmp_path / "base")).model
    found, loss = measure_sensitivity(LayerWalk(model), candidates(model), rows())
    linears = list(candidates(model))
    assert list(found) == linears
    for linear in (linears[0], linears[3], linears[-1]):
        for place, scheme in enumerate(SCHEMES):
            assert found[linear][place] == pytest.approx(by_autograd(model, linear, scheme), rel=1e-3)
    losses = []
    for row in rows():
        hidden_TD = model(row, torch.arange(len(row)), Packed([len(row)]))
        losses.append(F.cross_entropy(model.logits(hidden_TD)[:-1], row[1:], reduction="none"))
    assert loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_ranks_linears_as_measured_growth_does() -> None:
    """The second-order part of the measured change, (L(W + dW) + L(W - dW)) / 2 - L(W), over many rows."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    many = [model_row(model, generator) for _ in range(40)]
    found, loss = measure_sensitivity(LayerWalk(model), candidates(model), many)
    measured, predicted = [], []
    for name in found:
        weight = model.get_parameter(f"{name}.weight")
        dense, moved = weight.detach().clone(), change(model, name, SCHEMES[0])
        around = []
        for sign in (1, -1):
            weight.data.copy_(dense + sign * moved)
            around.append(mean_loss(model, many))
        weight.data.copy_(dense)
        measured.append(sum(around) / 2 - loss)
        predicted.append(found[name][0])
    # the model is random, but it drew the rows itself, so that Fisher matrix and Hessian agree
    logs = torch.tensor([measured, predicted]).log()
    assert torch.corrcoef(logs)[0, 1] > 0.9
    ratio = sum(predicted) / sum(measured)
    assert 0.5 < ratio < 2


def model_row(model: CausalLM, generator: torch.Generator, length: int = 24) -> torch.Tensor:
    """Drawn from the model."""
    row = torch.tensor([256])
    for _ in range(length - 1):
        with torch.no_grad():
            logits = model.logits(model(row, torch.arange(len(row)), Packed([len(row)]))[-1:])
        row = torch.cat((row, torch.multinomial(logits.softmax(-1)[0], 1, generator=generator)))
    return row


@torch.no_grad()
def mean_loss(model: CausalLM, rows: list[torch.Tensor]) -> float:
    hidden = [model(row, torch.arange(len(row)), Packed([len(row)]))[:-1] for row in rows]
    return float(F.cross_entropy(model.logits(torch.cat(hidden)).double(), torch.cat([row[1:] for row in rows])))


def test_finer_schemes_cost_less_and_nothing_changes() -> None:
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found, _ = measure_sensitivity(LayerWalk(model), candidates(model, (Int4(16), Int4(4), Int8())), rows())
    totals = [sum(own[place] for own in found.values()) for place in range(3)]
    assert totals[0] > totals[1] > 50 * totals[2] > 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_gives_what_the_loaded_model_gives(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "base")
    loaded, model = load(folder).model, load(folder).model.to("meta")
    source, said = open_source(folder), list[tuple[int, int, str]]()
    expected = measure_sensitivity(LayerWalk(loaded), candidates(loaded), rows(), rounding="gptq")
    walk = LayerWalk(model, source, torch.float32, torch.device("cpu"))
    got = measure_sensitivity(walk, candidates(model), rows(), rounding="gptq", on_progress=lambda *w: said.append(w))
    assert got == expected
    layers = [n for n, parameter in model.named_parameters() if n.startswith(tuple(walk.prefixes))]
    assert all(model.get_parameter(n).is_meta for n in layers)
    assert [done for done, _, _ in said] == list(range(1, 2 * len(walk) + 1)) and said[-1][1] == 2 * len(walk)
    rounded, _ = measure_sensitivity(LayerWalk(loaded), candidates(loaded), rows())
    assert sum(own[0] for own in got[0].values()) < 0.9 * sum(own[0] for own in rounded.values())
    source.close()


def test_too_few_rows() -> None:
    model = tiny_model()
    for few in ([], [torch.tensor([1])] * 500):  # a row of one token has no next token
        with pytest.raises(ConfigError, match=r"^calibration_data: 0 tokens"):
            measure_sensitivity(LayerWalk(model), candidates(model), few)
