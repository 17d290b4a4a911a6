"""The pair that makes up for what quantizing took: as good as any can be, layer by layer, on every architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alpaca_lora.errors import ConfigError, NumericalError
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.load import Base
from alpaca_lora.quantization import rounding_error
from alpaca_lora.quantization.int4 import Int4
from alpaca_lora.quantization.layer_walk import LayerWalk
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.load import replace_module
from alpaca_lora.quantization.nf4 import NF4
from alpaca_lora.quantization.plan import Plan
from alpaca_lora.quantization.rounding_error import A_NORM, Wanted, fit_rounding_errors
from alpaca_lora.quantization.scheme import Scheme
from tests.quantization.calibration_models import ARCHITECTURES, load, rows, save
from tests.quantization.test_gptq import correlated_inputs, weight

RANK = 8


class Corrected(nn.Module):
    """A packed linear with a pair beside it, as an adapter will have it."""

    def __init__(self, base: QuantizedLinear) -> None:
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.pair: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        return y if self.pair is None else y + x @ self.pair[0].t() @ self.pair[1].t()


def corrected(base: Base, scheme: Scheme) -> tuple[dict[str, Corrected], dict[str, torch.Tensor]]:
    """Quantize the linears of a loaded base -> (linear -> what is in its place, name -> dense weight)."""
    plan = Plan.uniform(base.model, "nf4")
    linears, dense = {}, {}
    for name in plan.schemes:
        linear: Any = base.model.get_submodule(name)
        dense[f"{name}.weight"] = linear.weight.detach().clone()
        linears[name] = Corrected(QuantizedLinear.from_dense(linear, scheme, name=name))
        replace_module(base.model, name, linears[name])
    return linears, dense


def fit(base: Base, linears: dict[str, Corrected], dense: dict[str, torch.Tensor], **more: Any) -> dict[str, float]:
    rank = more.pop("rank", RANK)
    wanted = {f"{name}.base": Wanted(f"{name}.weight", rank) for name in linears}

    def put(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        linears[name.removesuffix(".base")].pair = a, b

    return fit_rounding_errors(LayerWalk(base.model), wanted, dense.__getitem__, more.pop("rows", rows()), put, **more)


@torch.no_grad()
def logits(base: Base) -> torch.Tensor:
    ids_T = rows(1, seed=3)[0]
    return base.model.logits(base.model(ids_T, torch.arange(len(ids_T)), Packed([len(ids_T)])))


class TestOneLinear:
    def test_no_pair_of_its_rank_leaves_less(self) -> None:
        """The best there is comes from the singular values of the outputs' error itself (Eckart and Young)."""
        x_TI, weight_OI = correlated_inputs(4000, 64), weight(96, 64)
        packed = QuantizedLinear(64, 96, scheme := Int4(64), dtype=torch.float32)
        packed.set_parts(scheme.quantize(weight_OI, name="w"))
        ((_, lower_II),) = rounding_error._factors({"w": [x_TI[:1000], x_TI[1000:]]})
        a, b, left = rounding_error._fit(packed, Wanted("w", RANK), weight_OI, lower_II)
        outputs_TO = x_TI @ (weight_OI - packed.dense_weight()).t()
        values = torch.linalg.svdvals(outputs_TO.double()).square()
        best = float(values[RANK:].sum() / values.sum())
        reached = float((outputs_TO - x_TI @ a.t() @ b.t()).square().sum() / outputs_TO.square().sum())
        assert best <= reached < 1.01 * best < 0.5  # the damping of H costs a little
        assert reached <= left < reached + 0.01  # counted with the damping
        u, s, vt = torch.linalg.svd(weight_OI - packed.dense_weight())
        plain_OI = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
        assert float((outputs_TO - x_TI @ plain_OI.t()).square().sum() / outputs_TO.square().sum()) > 1.3 * reached

    def test_rows_of_a_are_as_long_as_those_of_a_fresh_adapter(self) -> None:
        x_TI, weight_OI = correlated_inputs(500, 64), weight(96, 64)
        packed = QuantizedLinear(64, 96, scheme := NF4(), dtype=torch.float32)
        packed.set_parts(scheme.quantize(weight_OI, name="w"))
        ((_, lower_II),) = rounding_error._factors({"w": [x_TI]})
        a, b, _ = rounding_error._fit(packed, Wanted("w", RANK), weight_OI, lower_II)
        torch.testing.assert_close(a.norm(dim=1), torch.full((RANK,), A_NORM))
        assert a.is_contiguous() and b.is_contiguous() and a.dtype == b.dtype == torch.float32

    def test_a_weight_without_error_starts_at_nothing(self) -> None:
        scheme, packed = NF4(), QuantizedLinear(64, 96, NF4(), dtype=torch.float32)
        packed.set_parts(scheme.quantize(weight(96, 64), name="w"))
        whole = slice(0, 96), slice(0, 64)
        exact_OI = scheme.tile(packed.stored_parts(), (96, 64), *whole, torch.float32)
        ((_, lower_II),) = rounding_error._factors({"w": [correlated_inputs(500, 64)]})
        a, b, left = rounding_error._fit(packed, Wanted("w", 4), exact_OI, lower_II)
        assert left == 0.0 and not b.any() and bool(torch.isfinite(a).all())

    def test_inputs_that_are_not_finite_are_named(self) -> None:
        with pytest.raises(NumericalError, match=r"layers\.0\.q"):
            rounding_error._factors({"layers.0.q": [torch.full((200, 4), float("nan"))]})


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("scheme", [NF4(), Int4(16)], ids=["nf4", "int4"])
def test_the_model_comes_nearer_to_the_dense_one(name: str, scheme: Scheme, tmp_path: Path) -> None:
    base = load(save(name, tmp_path / "model"))
    exact = logits(base)
    linears, dense = corrected(base, scheme)
    before = float((logits(base) - exact).norm())
    seen: list[tuple[int, int]] = []
    left = fit(base, linears, dense, on_progress=lambda done, total, _: seen.append((done, total)))
    assert left.keys() == {f"{name}.base" for name in linears} and all(0 <= part < 0.95 for part in left.values())
    assert float((logits(base) - exact).norm()) < 0.9 * before
    assert seen == [(done + 1, len(LayerWalk(base.model))) for done in range(len(LayerWalk(base.model)))]


def test_a_pair_of_full_rank_leaves_nothing(tmp_path: Path) -> None:
    """A rank above the weight's own gives what there is; behind layers that are exact the next ones become so."""
    base = load(save("llama2-grouped-query", tmp_path / "model"))
    exact = logits(base)
    linears, dense = corrected(base, Int4(16))
    left = fit(base, linears, dense, rank=1000)
    assert max(left.values()) < 1e-5
    torch.testing.assert_close(logits(base), exact, rtol=1e-3, atol=1e-4)
    for linear in linears.values():
        assert linear.pair is not None
        assert len(linear.pair[0]) == linear.pair[1].shape[1] == min(linear.out_features, linear.in_features)


def test_is_a_function_of_its_arguments(tmp_path: Path) -> None:
    folder, found = save("llama2-grouped-query", tmp_path / "model"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        base = load(folder)
        linears, dense = corrected(base, NF4())
        fit(base, linears, dense)
        found.append([tensor for linear in linears.values() if linear.pair for tensor in linear.pair])
    assert all(map(torch.equal, *found))


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    base = load(save("llama2-grouped-query", tmp_path / "model"))
    linears, dense = corrected(base, NF4())
    with pytest.raises(ConfigError, match=r"init_lora_weights: 59 tokens to calibrate on, expected at least 128"):
        fit(base, linears, dense, rows=rows(2)[:2])
