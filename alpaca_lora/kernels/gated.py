"""SwiGLU and GeGLU as one autograd node: keeps gate and up, not the activation between them.

y = act(g) u;   du = dy act(g),  dg = dy u act'(g)
silu'(g) = s (1 + g (1 - s)), s = sigmoid(g)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from alpaca_lora.kernels.reference import Activation


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
        act_TF = _act(gate_TF, ctx.activation)
        if ctx.activation == "silu":
            dgate_TF = torch.ops.aten.silu_backward(dy_TF * up_TF, gate_TF)
        else:
            dgate_TF = torch.ops.aten.gelu_backward(dy_TF * up_TF, gate_TF, approximate="tanh")
        return dgate_TF, act_TF.mul_(dy_TF), None


def _act(gate_TF: torch.Tensor, activation: Activation) -> torch.Tensor:
    return F.silu(gate_TF) if activation == "silu" else F.gelu(gate_TF, approximate="tanh")


def gated(gate_TF: torch.Tensor, up_TF: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
    """As `reference.gated`."""
    return _Gated.apply(gate_TF, up_TF, activation)  # pyright: ignore[reportReturnType]
