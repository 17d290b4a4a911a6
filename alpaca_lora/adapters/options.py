"""What a user may choose about the adapter. No torch here: `--help` and configuration errors must not pay for it."""

from __future__ import annotations

from pydantic import Field

from alpaca_lora.config import Options


class AdapterOptions(Options):
    """The adapter's part of the configuration."""

    method: str = Field("lora", description="adaptation method")
    lora_r: int = Field(8, ge=1, le=16384, description="rank of the update")
    lora_alpha: float = Field(
        16.0, gt=0, le=1_000_000, description="the update is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank))"
    )
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="share of the adapter's input dropped in training")
    lora_target_modules: list[str] = Field(
        ["q_proj", "v_proj"],
        min_length=1,
        description="linears to adapt: ends of names, whole names, regular expressions, or all-linear",
    )
    use_rslora: bool = Field(
        False, description="scale by alpha / sqrt(rank), which suits high ranks (rank-stabilized LoRA)"
    )
