"""Quantization layer by layer over sample rows: each linear is made from what it sees, behind layers that are quantized
already.

One dense layer is there at a time. The rows' activations go through it twice: dense, to collect what its linears see,
and quantized, to become the inputs of the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from alpaca_lora.device import Compute
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.load import Base, Source, load_base, load_tokenizer
from alpaca_lora.quantization.awq import awq, mean_magnitude
from alpaca_lora.quantization.gptq import gptq, hessian
from alpaca_lora.quantization.int4 import Int4
from alpaca_lora.quantization.layer_walk import Inputs, LayerWalk, Rows, Stream, check_rows
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.plan import Plan
from alpaca_lora.quantization.scheme import Scheme
from alpaca_lora.text.tokenizer import Tokenizer

ROUNDINGS = ("nearest", "gptq", "awq")  # ways to choose codes, where a scheme has a choice

OnProgress = Callable[[int, int, str], None]  # done, in all, what; an exception that it raises ends the work
Errors = dict[str, float]  # linear -> relative error
Result = TypeVar("Result")


def quantize_model(
    base: Base, plan: Plan, rows: Rows, *, rounding: str = "nearest", on_progress: OnProgress | None = None
) -> tuple[Plan, Errors]:
    """Quantize the linears of a base that is loaded dense, in place -> (the plan as it was carried out, linear ->
    relative error of its weight; of its output on the rows, where a linear of the plan is made on rows).

    ConfigError when the plan needs rows and there are fewer than 128 tokens of them.
    """
    return quantize_layers(LayerWalk(base.model), plan, rows, rounding=rounding, on_progress=on_progress)


def quantize_source(
    path: Path, compute: Compute, plan_of: Callable[[CausalLM], Plan], rows_of: Callable[[Tokenizer], Rows], *,
    rounding: str = "nearest", on_progress: OnProgress | None = None,
) -> tuple[Base, Plan, Errors]:  # fmt: skip
    """As `quantize_model`, of a file: each layer is read when its turn comes, so the dense model never exists. The base
    that is returned has the dense file's fingerprint.
    """

    def work(walk: LayerWalk, tokenizer: Tokenizer) -> tuple[Plan, Errors]:
        plan = plan_of(walk.model)
        return quantize_layers(walk, plan, rows_of(tokenizer), rounding=rounding, on_progress=on_progress)

    base, (plan, errors) = walk_source(path, compute, work)
    return base, plan, errors


def walk_source(path: Path, compute: Compute, work: Callable[[LayerWalk, Tokenizer], Result]) -> tuple[Base, Result]:
    """``work`` on the layers of a file, read when their turn comes; it must leave every layer filled. The base has the
    dense file's fingerprint.
    """
    results: list[Result] = []

    def fill(source: Source, model: CausalLM, dtype: torch.dtype, device: torch.device) -> None:
        results.append(work(LayerWalk(model, source, dtype, device), load_tokenizer(source)))

    return load_base(str(path), compute, fill=fill), results[0]


def made_on_rows(scheme: Scheme, rounding: str) -> bool:
    """Whether a linear of this scheme is made from what it sees."""
    return scheme.needs_calibration or compensates(scheme, rounding)


def compensates(scheme: Scheme, rounding: str) -> bool:
    """Whether the codes of this scheme are chosen by what they change of outputs; others keep to the nearest."""
    return rounding != "nearest" and rounding in scheme.roundings


def quantize_layers(
    walk: LayerWalk, plan: Plan, rows: Rows, *, rounding: str = "nearest", on_progress: OnProgress | None = None
) -> tuple[Plan, Errors]:
    """As `quantize_model`, layer by layer; every layer is filled afterwards."""
    streams: list[Stream] = []
    if any(made_on_rows(scheme, rounding) for scheme in plan.schemes.values()):
        check_rows(rows)
        streams = walk.streams(rows)
    return pass_quantizing(walk, plan, streams, rounding=rounding, on_progress=on_progress)


@torch.no_grad()
def pass_quantizing(
    walk: LayerWalk, plan: Plan, streams: Sequence[Stream], *, rounding: str = "nearest",
    on_progress: OnProgress | None = None,
) -> tuple[Plan, Errors]:  # fmt: skip
    """Quantize the linears of each layer, then put the streams through it. Without streams linears are made of their
    weights alone.
    """
    assert rounding in ROUNDINGS, rounding
    work = _Work(walk, dict(plan.schemes), rounding)
    for index in range(len(walk)):
        started = time.perf_counter()
        walk.fill(index)
        names = walk.inside(index, list(plan.schemes))
        work.quantize(names, walk.inputs(index, names, streams) if streams and names else {})
        walk.advance(index, streams)
        if on_progress is not None:
            on_progress(index + 1, len(walk), work.said_of(index, names, time.perf_counter() - started))
    heads = walk.outside(list(plan.schemes))
    seen = [walk.model.final_norm(stream.x_TD) for stream in streams] if heads else []
    work.quantize(heads, dict.fromkeys(heads, seen) if streams else {})
    return Plan(work.schemes), work.errors


def quantized_parts(
    scheme: Scheme, weight_OI: torch.Tensor, inputs: Inputs, rounding: str, hessian_II: torch.Tensor | None, *,
    name: str,
) -> tuple[Scheme, dict[str, torch.Tensor]]:  # fmt: skip
    """(the scheme as it was carried out, parts) of a linear. ``hessian_II``: of the inputs, where they are needed."""
    if hessian_II is not None and compensates(scheme, rounding):
        if rounding == "gptq":
            return scheme, gptq(weight_OI, hessian_II, scheme, name=name)
        assert isinstance(scheme, Int4)
        return awq(weight_OI, hessian_II, mean_magnitude(inputs), scheme, name=name)
    if scheme.needs_calibration:
        return scheme, scheme.quantize_calibrated(weight_OI, inputs, name=name)
    return scheme, scheme.quantize(weight_OI, name=name)


class _Work:
    """Makes linears. schemes: as they were carried out (AWQ adds input scales). errors: linear -> relative error."""

    def __init__(self, walk: LayerWalk, schemes: dict[str, Scheme], rounding: str) -> None:
        self.walk, self.schemes, self.rounding = walk, schemes, rounding
        self.errors: Errors = {}
        self.rounding_errors: Errors = {}  # of the linears that are made by gptq or awq, if they were rounded

    def quantize(self, names: Sequence[str], seen: Mapping[str, Inputs]) -> None:
        """Put quantized linears in the place of dense ones, one at a time; ``seen``: empty, or of each of them."""
        last: Inputs = []
        hessian_II: torch.Tensor | None = None
        for name in names:
            scheme, weight_OI, inputs = self.schemes[name], self.walk.weight(name), seen.get(name, [])
            compensated = compensates(scheme, self.rounding)
            if not compensated:
                last, hessian_II = [], None
            elif not (last and all(a is b for a, b in zip(last, inputs, strict=True))):
                last, hessian_II = inputs, hessian(inputs)
            made, parts = quantized_parts(scheme, weight_OI, inputs, self.rounding, hessian_II, name=name)
            packed = self._packed(name, made, parts)
            if compensated:
                rounded = self._packed(name, scheme, scheme.quantize(weight_OI, name=name))
                self.rounding_errors[name] = output_error(rounded, weight_OI, inputs[0])
            self.schemes[name] = made
            self.errors[name] = (
                output_error(packed, weight_OI, inputs[0]) if inputs else packed.relative_error(weight_OI)
            )
            self.walk.put(name, packed)

    def _packed(self, name: str, scheme: Scheme, parts: dict[str, torch.Tensor]) -> QuantizedLinear:
        linear: Any = self.walk.model.get_submodule(name)
        packed = QuantizedLinear(
            linear.in_features, linear.out_features, scheme, dtype=linear.weight.dtype, bias=linear.bias
        )
        packed.set_parts(parts)
        return packed

    def said_of(self, index: int, names: Sequence[str], seconds: float) -> str:
        """``layer 3, 1.2 s, error 4.1% (rounded: 6.3%)``, the means over its linears."""
        text = f"layer {index + 1}, {seconds:.1f} s"
        if names:
            text += f", error {sum(self.errors[name] for name in names) / len(names):.1%}"
        if compensated := [name for name in names if name in self.rounding_errors]:
            text += f" (rounded: {sum(self.rounding_errors[name] for name in compensated) / len(compensated):.1%})"
        return text


def output_error(packed: QuantizedLinear, weight_OI: torch.Tensor, x_TI: torch.Tensor) -> float:
    """Norm of what quantizing changed of the outputs, over the outputs' norm."""
    exact_TO = x_TI.float() @ weight_OI.float().t()
    made_TO = packed.scheme.apply(x_TI.float(), packed.stored_parts(), packed.shape)
    return float((made_TO - exact_TO).norm() / exact_TO.norm().clamp_min(torch.finfo(torch.float32).tiny))
