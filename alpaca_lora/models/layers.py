"""The pieces of a decoder layer: embedding, norms, attention, feed-forward; frozen until somebody wants a gradient.

They know sizes and formulas; which tokens see which is the plan's, how a weight is stored is the linear's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from alpaca_lora.kernels.gated import gated
from alpaca_lora.kernels.norm import rms_norm
from alpaca_lora.kernels.rotary import rotate
from alpaca_lora.models.attention import AttentionPlan
from alpaca_lora.models.config import Activation, ModelConfig
from alpaca_lora.models.linear import Linear, project
from alpaca_lora.weights.file_rows import FileRows

Device = torch.device | str | None
Rotation = tuple[torch.Tensor, torch.Tensor]  # cos_TE, sin_TE


def frozen(*shape: int, dtype: torch.dtype | None, device: Device) -> nn.Parameter:
    """An uninitialised parameter that asks for no gradient."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


class Embedding(nn.Module):
    """Rows of a table: ids_T -> x_TD."""

    _rows: FileRows | None = None
    _unchanged: tuple[int, int] | None = None  # what tells that the table is still the one in the file

    def __init__(self, num_rows: int, width: int, *, dtype: torch.dtype | None = None, device: Device = None) -> None:
        super().__init__()
        self.weight = frozen(num_rows, width, dtype=dtype, device=device)

    def stay_in_file(self, rows: FileRows) -> None:
        """Take the table from its file, where its rows are read as long as nobody trains, replaces or writes to it."""
        self.weight = nn.Parameter(rows.weight, requires_grad=False)
        self._rows, self._unchanged = rows, _state_of(self.weight)

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        if self._rows is not None and self._is_as_stored():
            return self._rows.read(ids_T)
        return F.embedding(ids_T, self.weight)

    def release(self) -> None:
        """Give back the memory that looking at ``weight`` took, where its rows are read from a file."""
        if self._rows is not None and self._is_as_stored():
            self._rows.release()

    def _is_as_stored(self) -> bool:
        return not self.weight.requires_grad and _state_of(self.weight) == self._unchanged


def _state_of(weight: torch.Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight), in float32 inside, over the last axis."""

    def __init__(
        self, width: int, eps: float, offset: float = 0.0, *, dtype: torch.dtype | None = None, device: Device = None
    ) -> None:
        super().__init__()
        self.weight = frozen(width, dtype=dtype, device=device)
        self.eps, self.offset = eps, offset

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_TD, self.weight, self.eps, self.offset)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias, over the last axis; in float32 inside where the weights are while x is not."""

    def __init__(self, width: int, eps: float, *, dtype: torch.dtype | None = None, device: Device = None) -> None:
        super().__init__()
        self.weight = frozen(width, dtype=dtype, device=device)
        self.bias = frozen(width, dtype=dtype, device=device)
        self.eps = eps

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        dtype = torch.promote_types(x_TD.dtype, torch.promote_types(weight.dtype, bias.dtype))
        y_TD = F.layer_norm(x_TD.to(dtype), (x_TD.shape[-1],), weight.to(dtype), bias.to(dtype), self.eps)
        return y_TD.to(x_TD.dtype)


class Attention(nn.Module):
    """o_proj(attend(rotate(q), rotate(k), v)); q and k are normalised per head first where the family does."""

    def __init__(
        self, config: ModelConfig, layer: int, *, dtype: torch.dtype | None = None, device: Device = None
    ) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.scale, self.window = config.attention_scale, config.windows[layer]
        width, query_width = config.hidden_size, config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(width, query_width, bias=config.qkv_bias, dtype=dtype, device=device)
        self.k_proj = Linear(width, key_width, bias=config.qkv_bias, dtype=dtype, device=device)
        self.v_proj = Linear(width, key_width, bias=config.qkv_bias, dtype=dtype, device=device)
        self.o_proj = Linear(query_width, width, bias=config.output_bias, dtype=dtype, device=device)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps, config.norm_offset, dtype=dtype, device=device)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps, config.norm_offset, dtype=dtype, device=device)

    def forward(self, x_TD: torch.Tensor, rotation: Rotation, plan: AttentionPlan) -> torch.Tensor:
        q, k, v = project(x_TD, (self.q_proj, self.k_proj, self.v_proj))
        q_THE, k_TKE, v_TKE = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q_THE, k_TKE = self.q_norm(q_THE), self.k_norm(k_TKE)
        q_THE, k_TKE = rotate(q_THE, *rotation), rotate(k_TKE, *rotation)
        out_THE = plan.attend(self.layer, q_THE, k_TKE, v_TKE, self.scale, self.window)
        return self.o_proj(out_THE.flatten(-2))


class MLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None, device: Device = None) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation: Activation = config.activation
        self.gate_proj = Linear(width, inner, bias=bias, dtype=dtype, device=device)
        self.up_proj = Linear(width, inner, bias=bias, dtype=dtype, device=device)
        self.down_proj = Linear(inner, width, bias=bias, dtype=dtype, device=device)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        gate_TF, up_TF = project(x_TD, (self.gate_proj, self.up_proj))
        return self.down_proj(gated(gate_TF, up_TF, self.activation))
