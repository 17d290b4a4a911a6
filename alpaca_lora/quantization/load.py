"""A base model with packed linears: quantized while it is loaded, or from a folder that `quantize` wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from alpaca_lora.device import Compute
from alpaca_lora.errors import ConfigError
from alpaca_lora.kernels.cpu.library import library
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.linear import Linear
from alpaca_lora.models.load import Base, Source, open_source
from alpaca_lora.models.load import load_base as load_dense
from alpaca_lora.quantization.calibrate import made_on_rows
from alpaca_lora.quantization.folder import Origin, check_stored, is_quantized, read_origin, read_plan
from alpaca_lora.quantization.linear import OnRead, QuantizedLinear
from alpaca_lora.quantization.plan import Plan, linear_shapes
from alpaca_lora.weights.hub import resolve


def load_base(
    path_or_name: str, compute: Compute, *, dtype: torch.dtype | None = None, quantize: str | None = None,
    settings: dict[str, Any] | None = None, plan_of: Callable[[CausalLM], Plan] | None = None,
    on_read: OnRead | None = None, on_plan: Callable[[Plan, str], None] | None = None,
) -> Base:  # fmt: skip
    """As `models.load.load_base`, and folders of quantized models.

    ``quantize``: a scheme (with ``settings``) for every linear but the head; ``plan_of``: what makes the plan of the
    empty model (`Plan.from_file`), in its place. Each linear is quantized as it is read, so the dense model never
    exists. ConfigError, besides, when the model is quantized already, or the plan does not fit it or needs rows.
    ``on_plan`` is called with the plan and the dense base's fingerprint before the first weight is read, ``on_read``
    for each linear.
    """
    plans: list[Plan] = []
    key = "quantize" if quantize is not None else "quantization_plan"

    def pack(model: CausalLM, source: Source, _: Compute) -> tuple[str | None, list[str]]:
        stored = is_quantized(source.path)
        if not stored and quantize is None and plan_of is None:
            return None, []
        if stored and (quantize is not None or plan_of is not None):
            raise ConfigError(
                f"{source.path} is quantized already", field=key, fix="leave it out, or give the dense model"
            )
        if stored:
            plan, fingerprint, _origin = read_plan(source.path, model)
        else:
            plan = plan_of(model) if plan_of is not None else Plan.uniform(model, quantize or "", settings)
            fingerprint = packed_fingerprint(Origin(path_or_name, source.fingerprint), plan)
            if on_plan is not None:
                on_plan(plan, source.fingerprint)
            _refuse_rows(plan, key)
        plans.append(plan)
        put_on(model, plan, dtype or compute.dtype, is_stored=stored, on_read=on_read)
        if stored:
            check_stored(source, model)
        return fingerprint, []

    base = load_dense(path_or_name, compute, dtype=dtype, pack=pack)
    for plan in plans:
        summary = plan.summary(linear_shapes(base.model))
        base = replace(base, description=f"{base.description}, quantized: {summary}")
        if compute.device.type == "cpu" and any(scheme.has_kernel_in_c for scheme in plan.schemes.values()):
            base.notices.extend(_slow_kernels())
    return base


def _slow_kernels() -> list[str]:
    found = library()
    if found.handle is not None:
        return []
    return [f"4-bit weights are decoded by {found.reason}, which is slower; a C compiler (gcc, clang) makes it fast"]


def _refuse_rows(plan: Plan, field: str) -> None:
    if name := plan.made_on_rows():
        raise ConfigError(
            f"{name}: scheme {plan.schemes[name].name} is made by running the model on rows", field=field,
            fix="give the folder that `alpaca-lora quantize --calibration_data` makes",
        )  # fmt: skip


def put_on(model: CausalLM, plan: Plan, dtype: torch.dtype, *, is_stored: bool, on_read: OnRead | None = None) -> None:
    """Put an empty `QuantizedLinear` in the place of each linear of an empty model that the plan names."""
    for name, scheme in plan.schemes.items():
        linear: Any = model.get_submodule(name)
        assert isinstance(linear, Linear), name
        packed = QuantizedLinear(
            linear.in_features, linear.out_features, scheme, dtype=dtype, is_stored=is_stored, bias=linear.bias,
            on_read=on_read,
        )  # fmt: skip
        replace_module(model, name, packed)


def replace_module(model: CausalLM, name: str, module: torch.nn.Module) -> None:
    """Put ``module`` where ``name`` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


@contextmanager
def dense_source(base: Base, field: str) -> Iterator[Source]:
    """The weight file that the packed linears of ``base`` were made of. ConfigError naming ``field`` when what is
    there by now is another one; errors as `weights.hub.resolve` when nothing is.
    """
    origin = read_origin(base.path) if is_quantized(base.path) else None
    source = open_source(base.path if origin is None else resolve(origin.base_model))
    try:
        if origin is not None and (what := origin.why_not(source.fingerprint)):
            raise ConfigError(f"needs the dense weights that {base.path} was made of: {what}", field=field)
        yield source
    finally:
        source.close()


def by_rows(rounding: str, plan: Plan) -> bool:
    """Whether the weights that a plan makes depend on calibration rows."""
    return any(made_on_rows(scheme, rounding) for scheme in plan.schemes.values())


def packed_fingerprint(origin: Origin, plan: Plan) -> str:
    """The fingerprint of the base that a plan makes of a dense base; the same wherever and whenever it is made."""
    rows = origin.calibration_sha256 if by_rows(origin.rounding, plan) else ""
    identity = [origin.base_fingerprint, plan.digest(), origin.rounding, rows, origin.adapter_sha256]
    return hashlib.sha256("\n".join(identity).encode()).hexdigest()
