"""GPT-Neo: learned positions, LayerNorm, attention without scaling, every other layer local.

The same outer interface as `CausalLM`; knows as little of files, adapters and caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from alpaca_lora.errors import UserError
from alpaca_lora.models.attention import AttentionPlan
from alpaca_lora.models.config import ModelConfig
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.layers import Device, Embedding, LayerNorm
from alpaca_lora.models.linear import Linear, project
from alpaca_lora.models.recompute import Level, made_again, rerun


class NeoSelfAttention(nn.Module):
    """out_proj(attend(q, k, v)), multi-head, scale 1."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype | None, device: Device) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer, self.head_dim = layer, config.head_dim
        self.scale, self.window = config.attention_scale, config.windows[layer]
        self.k_proj = Linear(width, width, dtype=dtype, device=device)
        self.v_proj = Linear(width, width, dtype=dtype, device=device)
        self.q_proj = Linear(width, width, dtype=dtype, device=device)
        self.out_proj = Linear(width, width, bias=True, dtype=dtype, device=device)

    def forward(self, x_TD: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        q, k, v = project(x_TD, (self.q_proj, self.k_proj, self.v_proj))
        q_THE, k_THE, v_THE = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        out_THE = plan.attend(self.layer, q_THE, k_THE, v_THE, self.scale, self.window)
        return self.out_proj(out_THE.flatten(-2))


class NeoAttention(nn.Module):
    """The level that Hugging Face's names have between a layer and its attention."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype | None, device: Device) -> None:
        super().__init__()
        self.attention = NeoSelfAttention(config, layer, dtype=dtype, device=device)

    def forward(self, x_TD: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        return self.attention(x_TD, plan)


class NeoMLP(nn.Module):
    """c_proj(act(c_fc(x)))."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None, device: Device) -> None:
        super().__init__()
        self.activation = config.activation
        self.c_fc = Linear(config.hidden_size, config.intermediate_size, bias=True, dtype=dtype, device=device)
        self.c_proj = Linear(config.intermediate_size, config.hidden_size, bias=True, dtype=dtype, device=device)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        inner_TF = self.c_fc(x_TD)
        return self.c_proj(F.gelu(inner_TF, approximate="tanh") if self.activation == "gelu_tanh" else F.silu(inner_TF))


class NeoLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype | None, device: Device) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype, device=device)
        self.attn = NeoAttention(config, layer, dtype=dtype, device=device)
        self.ln_2 = LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype, device=device)
        self.mlp = NeoMLP(config, dtype=dtype, device=device)

    def forward(self, x_TD: torch.Tensor, plan: AttentionPlan, level: Level = "none") -> torch.Tensor:
        with made_again(level):
            x_TD = self.add_attention(x_TD, plan)
            return rerun(self.add_mlp, x_TD) if level == "mlp" else self.add_mlp(x_TD)

    def add_attention(self, x_TD: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        return x_TD + self.attn(self.ln_1(x_TD), plan)

    def add_mlp(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD + self.mlp(self.ln_2(x_TD))


class NeoDecoder(nn.Module):
    """The parts of `GPTNeo` under Hugging Face's name ``transformer``."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None, device: Device) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.wpe = Embedding(config.max_position_embeddings, config.hidden_size, dtype=dtype, device=device)
        self.h = nn.ModuleList(
            NeoLayer(config, layer, dtype=dtype, device=device) for layer in range(config.num_layers)
        )
        self.ln_f = LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype, device=device)


class GPTNeo(CausalLM):
    """GPT-Neo with the names ``transformer.wte``, ``transformer.h.0.attn.attention.q_proj``, ..."""

    def _build(self, config: ModelConfig, dtype: torch.dtype | None, device: Device) -> None:
        self.transformer = NeoDecoder(config, dtype=dtype, device=device)

    @property
    def embeddings(self) -> Embedding:
        return self.transformer.wte

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.transformer.h  # pyright: ignore[reportReturnType]

    def run_layers(
        self, x_TD: torch.Tensor, positions_T: torch.Tensor, plan: AttentionPlan, first_position: int = 0
    ) -> torch.Tensor:
        """As `CausalLM.run_layers`. UserError for a position beyond the table: learned positions end there."""
        last, limit = int(positions_T.max()), self.config.max_position_embeddings
        if last >= limit:
            virtual = f" ({first_position} of them virtual)" if first_position else ""
            raise UserError(
                f"a sequence of {last + 1} tokens{virtual} is longer than this model's {limit} positions",
                fix="shorten it or lower cutoff_len",
            )
        x_TD = x_TD + self.transformer.wpe(positions_T)
        for layer, level in zip(self.layers, self.levels(), strict=True):
            x_TD = self.run_layer(layer, level, x_TD, plan)
        return x_TD

    def final_norm(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.transformer.ln_f(x_TD)
