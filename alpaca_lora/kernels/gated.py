"""SwiGLU and GeGLU as one autograd node: keeps gate and up, not the activation between them.

y = act(g) u;   du = dy act(g),  dg = dy u act'(g)
silu'(g) = s (1 + g (1 - s)), s = sigmoid(g)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from alpaca_lora.kernels import few_rows
from alpaca_lora.kernels.reference import Activation

PIECE = 2**20  # elements of the backward pass at a time: large temporaries are new pages for the system to clear


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TF: torch.Tensor, up_TF: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        ctx.activation = activation
        return _act(gate_TF, activation).mul_(up_TF)

    @staticmethod
    def remake(ctx: Any) -> torch.Tensor:
        """The output once more, bit for bit, from what is kept (models/recompute.py)."""
        gate_TF, up_TF = ctx.saved_tensors
        return _act(gate_TF, ctx.activation).mul_(up_TF)

    @staticmethod
    def backward(ctx: Any, dy_TF: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate_TF, up_TF = ctx.saved_tensors
        dgate_TF, dup_TF = torch.empty_like(gate_TF), torch.empty_like(up_TF)
        step = max(1, PIECE // gate_TF.shape[-1])
        whole = (gate_TF, up_TF, dy_TF, dgate_TF, dup_TF)
        for gate, up, dy, dgate, dup in zip(*(x.split(step) for x in whole), strict=True):
            dup.copy_(_act(gate, ctx.activation).mul_(dy))
            if ctx.activation == "silu":
                dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
            else:
                dgate.copy_(torch.ops.aten.gelu_backward(dy * up, gate, approximate="tanh"))
        return dgate_TF, dup_TF, None


def _act(gate_TF: torch.Tensor, activation: Activation) -> torch.Tensor:
    return F.silu(gate_TF) if activation == "silu" else F.gelu(gate_TF, approximate="tanh")


def gated(gate_TF: torch.Tensor, up_TF: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
    """As `reference.gated`."""
    if (y_TF := few_rows.gate(gate_TF, up_TF, activation)) is not None:
        return y_TF
    return _Gated.apply(gate_TF, up_TF, activation)  # pyright: ignore[reportReturnType]
