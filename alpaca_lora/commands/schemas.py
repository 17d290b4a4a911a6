"""What each command can be told: the options of the rooms it uses, composed. No torch.

A key belongs to one room; `tests/commands/test_schemas.py` holds it. A command may only describe it anew.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from alpaca_lora.adapters.options import AdapterOptions
from alpaca_lora.config import Options
from alpaca_lora.data.options import DataOptions
from alpaca_lora.inference.options import GenerationOptions
from alpaca_lora.models.options import ModelOptions
from alpaca_lora.text.options import TextOptions
from alpaca_lora.training.options import TrainingOptions


class FinetuneConfig(ModelOptions, DataOptions, TextOptions, AdapterOptions, TrainingOptions):
    """Everything a training run depends on."""


class CheckConfig(FinetuneConfig):
    """The same keys as finetune: what is checked is what would run."""


class GenerateConfig(ModelOptions, GenerationOptions, TextOptions):
    """A base model, perhaps an adapter, and how to answer."""


class MergeOptions(Options):
    """What is merged and where it is written."""

    lora_weights: str = Field(min_length=1, description="adapter folder in PEFT's format")
    output_dir: str = Field(min_length=1, description="Hugging Face folder to write; it must not hold a model yet")
    max_logit_difference: float | None = Field(
        None,
        gt=0,
        description="refuse to publish when merged and base + adapter differ by more; none: what rounding explains",
    )
    max_shard_gb: float = Field(4.0, gt=0, le=1_000_000, description="size of a weight file, in GB (1e9 bytes)")


class MergeConfig(ModelOptions, MergeOptions):
    """A base model, an adapter, and where the merged model goes."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="dtype of the merged weights, computed in float32; auto: bfloat16 only if every base weight is "
        "exactly a bfloat16 number, else float32",
    )


class PullOptions(Options):
    """What to fetch."""

    positional_key: ClassVar[str | None] = "name"
    name: str = Field("smollm2-135m", description="alias or hub id of a model; folders and .gguf files need no pull")


class PullConfig(PullOptions):
    """The model to fetch into the cache."""


SCHEMAS: dict[str, type[Options]] = {
    "finetune": FinetuneConfig,
    "check": CheckConfig,
    "generate": GenerateConfig,
    "merge": MergeConfig,
    "pull": PullConfig,
}
