"""A base model with packed linears: quantized while it is loaded, or from a folder that `quantize` wrote."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from alpaca_lora.device import Compute
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.linear import Linear
from alpaca_lora.models.load import Base, Source
from alpaca_lora.models.load import load_base as load_dense
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.plan import Plan
from alpaca_lora.quantization.scheme import Scheme


def load_base(
    path_or_name: str, compute: Compute, *, dtype: torch.dtype | None = None, scheme: Scheme | None = None
) -> Base:
    """As `models.load.load_base`; ``scheme`` quantizes every linear but the head, one by one, as it is read."""
    if scheme is None:
        return load_dense(path_or_name, compute, dtype=dtype)

    def pack(model: CausalLM, source: Source, _: Compute) -> tuple[str | None, list[str]]:
        plan = Plan.uniform(model, scheme)
        put_on(model, plan, dtype or compute.dtype, is_stored=False)
        return packed_fingerprint(source.fingerprint, plan), []

    return load_dense(path_or_name, compute, dtype=dtype, pack=pack)


def put_on(model: CausalLM, plan: Plan, dtype: torch.dtype, *, is_stored: bool) -> None:
    """Put an empty `QuantizedLinear` in the place of each linear of an empty model that the plan names."""
    for name, scheme in plan.schemes.items():
        linear: Any = model.get_submodule(name)
        assert isinstance(linear, Linear), name
        packed = QuantizedLinear(
            linear.in_features, linear.out_features, scheme, dtype=dtype, is_stored=is_stored, bias=linear.bias
        )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed)


def packed_fingerprint(fingerprint: str, plan: Plan) -> str:
    """The fingerprint of the base that ``plan`` makes of a dense base with ``fingerprint``."""
    return hashlib.sha256(f"{fingerprint}\n{plan.digest()}".encode()).hexdigest()
