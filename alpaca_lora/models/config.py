"""What a model is: sizes and the choices in which families differ. Reads and writes Hugging Face's config.json keys.

Knows no tensors. What a family means by its keys stands in `families.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

from alpaca_lora.errors import ModelFileError
from alpaca_lora.models.families import FAMILIES, find_family
from alpaca_lora.models.hf_config import MAX_SIZE, HfReader
from alpaca_lora.models.rope import RopeConfig

Activation = Literal["silu", "gelu_tanh"]

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class ModelConfig:
    """One decoder. Sizes count channels, heads, layers or tokens.

    ``ropes`` are the distinct rotations, ``rope_of_layer`` which of them a layer uses; both empty: positions are
    learned (GPT-Neo).
    ``windows``: per layer, how many tokens a token sees, itself among them; None: all before it.
    ``extra``: keys of the file we have no use for (token ids, initializer_range, ...), written back by `to_hf`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    ropes: tuple[RopeConfig, ...] = ()
    rope_of_layer: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = ()
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    activation: Activation = "silu"
    attention_scale: float = 0.0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    tie_word_embeddings: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def __post_init__(self) -> None:
        if not self.attention_scale:
            object.__setattr__(self, "attention_scale", self.head_dim**-0.5)
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if self.ropes and not self.rope_of_layer:
            object.__setattr__(self, "rope_of_layer", (0,) * self.num_layers)
        self._validate()

    def _validate(self) -> None:
        for name in SIZES:
            if not 1 <= (value := getattr(self, name)) <= MAX_SIZE:
                raise ModelFileError(f"is {value}", field=name, expected=f"1 to {MAX_SIZE}")
        if self.num_attention_heads * self.head_dim > MAX_SIZE:
            wide = f"{self.num_attention_heads} heads of {self.head_dim}"
            raise ModelFileError(f"{wide} are too wide", field="head_dim", expected=f"{MAX_SIZE} channels at most")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelFileError(
                f"is {self.num_key_value_heads}",
                field="num_key_value_heads",
                expected=f"a divisor of num_attention_heads = {self.num_attention_heads}",
            )
        if self.ropes and self.head_dim % 2:
            raise ModelFileError(
                f"is {self.head_dim}", field="head_dim", expected="an even number: channels turn in pairs"
            )
        for name, per_layer in (("windows", self.windows), ("rope_of_layer", self.rope_of_layer)):
            if per_layer and len(per_layer) != self.num_layers:
                raise ModelFileError(
                    f"has {len(per_layer)} entries", field=name, expected=f"one per layer, {self.num_layers}"
                )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], *, file: str | PathLike[str] | None = None) -> ModelConfig:
        """From the keys of a config.json. ModelFileError (naming ``file`` and the key) for what we cannot run."""
        family = find_family(hf, file)
        reader = HfReader(hf, file)
        try:
            return cls(model_type=str(hf["model_type"]), **family.read(reader), extra=reader.unread())
        except ModelFileError as error:
            if error.file is not None or file is None:
                raise
            raise ModelFileError(
                error.what, file=file, field=error.field, expected=error.expected, fix=error.fix
            ) from None

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers reads as this model; `from_hf` gives the same `ModelConfig` back."""
        family = FAMILIES[self.model_type]
        return {
            **self.extra,
            "architectures": [family.architecture],
            "model_type": self.model_type,
            **family.write(self),
        }
