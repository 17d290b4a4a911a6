"""Quantization layer by layer over sample rows: each linear is made from what it sees, behind layers that are quantized
already.

One dense layer is there at a time. The rows' activations go through it twice: dense, to collect what its linears see,
and quantized, to become the inputs of the next. Knows linears and the order of layers; no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alpaca_lora.device import Compute
from alpaca_lora.errors import ConfigError
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.load import Base, Source, load_base, load_tokenizer, read_weights
from alpaca_lora.quantization.awq import awq
from alpaca_lora.quantization.gptq import gptq, hessian
from alpaca_lora.quantization.int4 import Int4
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.plan import Plan
from alpaca_lora.text.tokenizer import Tokenizer

LEAST_TOKENS = 128
STREAM_TOKENS = 2048  # of one pass through a layer
METHODS = ("round", "gptq", "awq")  # ways to choose int4 codes

OnProgress = Callable[[int, int, str], None]  # done, in all, what
Rows = Sequence[torch.Tensor]  # int64 token ids (T,) each


def quantize_model(
    base: Base, plan: Plan, rows: Rows, *, int4_method: str = "round", on_progress: OnProgress | None = None
) -> tuple[Plan, dict[str, float]]:
    """Quantize the linears of a base that is loaded dense, in place -> (the plan as it was carried out, linear ->
    relative error of its weight, or with rows of its output). Without rows each linear is made from its weight alone.

    ConfigError when the plan needs rows and there are fewer than 128 tokens of them.
    """
    needed = int4_method != "round" or any(scheme.needs_calibration for scheme in plan.schemes.values())
    if not needed:
        return plan, _from_weights(base.model, plan, on_progress)
    work = _Work(base.model, plan, int4_method, on_progress)
    with torch.no_grad():
        work.run(_checked(rows), lambda names: {n: base.model.get_submodule(n).weight for n in names})  # pyright: ignore
    return work.carried_out(), work.errors


def quantize_source(
    path: Path, compute: Compute, plan_of: Callable[[CausalLM], Plan], rows_of: Callable[[Tokenizer], Rows], *,
    int4_method: str = "round", on_progress: OnProgress | None = None,
) -> tuple[Base, Plan, dict[str, float]]:  # fmt: skip
    """As `quantize_model`, of a file: each layer is read when its turn comes, so the dense model never exists. The base
    that is returned has the dense file's fingerprint.
    """
    done: list[_Work] = []

    def fill(source: Source, model: CausalLM, dtype: torch.dtype, device: torch.device) -> None:
        prefixes = [f"{prefix}." for prefix in _layer_names(model)]
        outside = [n for n, _ in model.named_parameters() if not n.startswith(tuple(prefixes))]
        read_weights(source, model, dtype, device, outside)
        work = _Work(model, plan_of(model), int4_method, on_progress)
        done.append(work)

        def read_layer(index: int) -> None:
            inside = [n for n, _ in model.named_parameters() if n.startswith(prefixes[index])]
            read_weights(source, model, dtype, device, inside)

        def weights(names: Sequence[str]) -> Mapping[str, torch.Tensor]:
            return {
                name: source.read(f"{name}.weight").to(device) for name in names
            }  # as stored: the model's is rounded

        with torch.no_grad():
            work.run(_checked(rows_of(load_tokenizer(source))), weights, read_layer)

    base = load_base(str(path), compute, fill=fill)
    return base, done[0].carried_out(), done[0].errors


def _checked(rows: Rows) -> Rows:
    count = sum(map(len, rows))
    if count < LEAST_TOKENS:
        raise ConfigError(
            f"{count} tokens to calibrate on", field="calibration_data", expected=f"at least {LEAST_TOKENS} tokens"
        )
    return rows


def _from_weights(model: CausalLM, plan: Plan, on_progress: OnProgress | None) -> dict[str, float]:
    errors = {}
    for number, (name, scheme) in enumerate(plan.schemes.items()):
        dense: Any = model.get_submodule(name)
        packed = QuantizedLinear.from_dense(dense, scheme, name=name)
        errors[name] = packed.relative_error(dense.weight.detach())
        _put(model, name, packed)
        if on_progress is not None:
            on_progress(number + 1, len(plan.schemes), name)
    return errors


def _put(model: CausalLM, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _layer_names(model: CausalLM) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in model.layers]


@dataclass
class _Stream:
    """Some of the rows on their way: activations in front of the next layer, and what each layer gets besides."""

    x_TD: torch.Tensor
    context: list[tuple[Any, ...]] = field(default_factory=list)


class _Capture(nn.Module):
    """Stands in a layer's place and notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, x_TD: torch.Tensor, *context: Any) -> torch.Tensor:
        self.seen.append((x_TD, context))
        return x_TD


class _Work:
    """One quantization of one model. errors: linear -> relative error of its output on the rows."""

    def __init__(self, model: CausalLM, plan: Plan, int4_method: str, on_progress: OnProgress | None) -> None:
        assert int4_method in METHODS, int4_method
        self.model, self.plan, self.int4_method, self.on_progress = model, plan, int4_method, on_progress
        self.schemes = dict(plan.schemes)
        self.errors: dict[str, float] = {}

    def carried_out(self) -> Plan:
        """The plan with what was decided on the way (AWQ's input scales)."""
        return Plan(self.schemes)

    def run(
        self, rows: Rows, weights: Callable[[Sequence[str]], Mapping[str, torch.Tensor]],
        read_layer: Callable[[int], None] = lambda index: None,
    ) -> None:  # fmt: skip
        """``weights``: the dense weights of these linears; ``read_layer`` fills a layer that is empty."""
        streams = self._streams(rows)
        prefixes = [f"{name}." for name in _layer_names(self.model)]
        for index, layer in enumerate(self.model.layers):
            read_layer(index)
            names = [name for name in self.schemes if name.startswith(prefixes[index])]
            seen = self._inputs(layer, names, streams, index)
            dense = weights(names)
            for name in names:
                _put(self.model, name, self._quantized(name, dense[name], seen[name]))
            del seen, dense
            for stream in streams:
                stream.x_TD = layer(stream.x_TD, *stream.context[index])
            if self.on_progress is not None:
                self.on_progress(index + 1, len(prefixes), f"layer {index + 1}")
        for name in [name for name in self.schemes if not name.startswith(tuple(prefixes))]:
            self._head(name, streams, weights)

    def _streams(self, rows: Rows) -> list[_Stream]:
        """The rows as streams of about `STREAM_TOKENS`, embedded, with each layer's context."""
        streams, pack = [], list[torch.Tensor]()
        for place, row in enumerate(rows):
            pack.append(row)
            if sum(map(len, pack)) >= STREAM_TOKENS or place == len(rows) - 1:
                streams.append(self._stream(pack))
                pack = []
        return streams

    def _stream(self, pack: Sequence[torch.Tensor]) -> _Stream:
        device = self.model.embeddings.weight.device
        positions_T = torch.cat([torch.arange(len(row)) for row in pack]).to(device)
        with _captured(self.model) as captures:
            ids_T = torch.cat(list(pack)).to(device)
            self.model.run_layers(self.model.embed(ids_T), positions_T, Packed([len(row) for row in pack]))
        return _Stream(captures[0].seen[0][0], [capture.seen[0][1] for capture in captures])

    def _inputs(
        self, layer: nn.Module, names: Sequence[str], streams: Sequence[_Stream], index: int
    ) -> dict[str, list[torch.Tensor]]:
        """Linear -> what it sees in each stream; linears that share an input share its tensor."""
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}

        def note(name: str) -> Callable[..., None]:
            return lambda _module, given: seen[name].append(given[0])

        handles = [self.model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
        try:
            for stream in streams:
                layer(stream.x_TD, *stream.context[index])
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _quantized(self, name: str, weight_OI: torch.Tensor, inputs: Sequence[torch.Tensor]) -> QuantizedLinear:
        linear: Any = self.model.get_submodule(name)
        scheme = self.schemes[name]
        parts: dict[str, torch.Tensor]
        if isinstance(scheme, Int4) and self.int4_method == "gptq":
            parts = gptq(weight_OI, hessian(inputs), scheme, name=name)
            if scheme.input_scales:
                parts["input_scales"] = torch.ones(weight_OI.shape[1])
        elif isinstance(scheme, Int4) and self.int4_method == "awq":
            magnitude_I = torch.stack([chunk.float().abs().mean(0) for chunk in inputs]).mean(0)
            scheme, parts = awq(weight_OI, hessian(inputs), magnitude_I, scheme, name=name)
            self.schemes[name] = scheme
        else:
            parts = scheme.quantize_calibrated(weight_OI, inputs, name=name)
        packed = QuantizedLinear(
            linear.in_features, linear.out_features, scheme, dtype=linear.weight.dtype, bias=linear.bias,
            device=weight_OI.device,
        )  # fmt: skip
        packed.set_parts(parts)
        self.errors[name] = _output_error(packed, weight_OI, inputs[0])
        return packed

    def _head(
        self, name: str, streams: Sequence[_Stream], weights: Callable[[Sequence[str]], Mapping[str, torch.Tensor]]
    ) -> None:
        """A linear behind the last layer (lm_head), where a plan names one."""
        inputs = [self.model.final_norm(stream.x_TD) for stream in streams]
        _put(self.model, name, self._quantized(name, weights([name])[name], inputs))


def _output_error(packed: QuantizedLinear, weight_OI: torch.Tensor, x_TI: torch.Tensor) -> float:
    """Norm of the outputs' change over the outputs' norm, on one stream."""
    exact_TO = x_TI.float() @ weight_OI.float().t()
    made_TO = packed.scheme.apply(x_TI.float(), packed.stored_parts(), packed.shape)
    return float((made_TO - exact_TO).norm() / exact_TO.norm().clamp_min(torch.finfo(torch.float32).tiny))


@contextmanager
def _captured(model: CausalLM) -> Iterator[list[_Capture]]:
    """The model with a `_Capture` in the place of each layer."""
    layers: Any = model.layers
    own, captures = list(layers), [_Capture() for _ in layers]
    try:
        for index, capture in enumerate(captures):
            layers[index] = capture
        yield captures
    finally:
        for index, layer in enumerate(own):
            layers[index] = layer
