"""The keys of the configuration that say which model runs, where and in which dtype. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alpaca_lora.config import Options


class ModelOptions(Options):
    base_model: str = Field(
        min_length=1, description="a folder, a .gguf file, a hub id or an alias such as smollm2-135m"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="how frozen weights are stored and multiplied; auto: bfloat16 where that is fast"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where the model runs")
    num_threads: int = Field(0, ge=0, le=1024, description="threads of the processor; 0: one per physical core")
