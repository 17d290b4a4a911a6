"""Typed reading of a config.json, with errors that name file and key, and the keys of rotations, old and new.

Knows JSON values; what a family makes of them stands in `families.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from typing import Any

from alpaca_lora.errors import ModelFileError
from alpaca_lora.models.rope import ROPE_KINDS, RopeConfig

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
# Said by us or by the program that writes the file, never carried over.
NOT_CARRIED = frozenset(
    {"architectures", "model_type", "dtype", "torch_dtype", "auto_map", "_name_or_path", "transformers_version"}
)


MAX_SIZE, MAX_LAYERS = 2**24, 1000  # a lying file is refused before anything of its size is made


class HfReader:
    """Typed access to the keys of one config.json, which remembers what was read."""

    def __init__(self, hf: Mapping[str, Any], file: str | PathLike[str] | None) -> None:
        self._hf, self._file, self._read = hf, file, set(NOT_CARRIED)

    def error(self, key: str, what: str, expected: str | None = None) -> ModelFileError:
        return ModelFileError(what, file=self._file, field=key, expected=expected)

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as it is; ``default`` when the key is missing or null."""
        self._read.add(key)
        value = self._hf.get(key)
        return default if value is None else value

    def has(self, key: str) -> bool:
        """Whether the file says anything of ``key``, be it null."""
        return key in self._hf

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_SIZE) -> int:
        """A whole number from ``least`` to ``most``."""
        value = self.raw(key, default)
        if value is None:
            raise self.error(key, "is missing", "a whole number")
        if isinstance(value, bool) or not isinstance(value, int | float) or value % 1:
            raise self.error(key, f"is {value!r}", "a whole number")
        if not least <= value <= most:
            raise self.error(key, f"is {value!r}", f"{least} to {most}")
        return int(value)

    def number(self, key: str, default: float) -> float:
        return self._positive(key, self.raw(key, default))

    def optional_number(self, key: str) -> float | None:
        value = self.raw(key)
        return None if value is None else self._positive(key, value)

    def _positive(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(key, f"is {value!r}", "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is {value!r}", "true or false")
        return value

    def table(self, key: str) -> Mapping[str, Any]:
        """A JSON object; empty when missing or null."""
        if not isinstance(value := self.raw(key, {}), Mapping):
            raise self.error(key, f"is {value!r}", "an object")
        return value

    def words(self, key: str, default: list[str], *known: str) -> list[str]:
        """A list of some of the ``known`` words."""
        value = self.raw(key, default)
        if not isinstance(value, list | tuple) or not all(isinstance(word, str) and word in known for word in value):
            raise self.error(key, f"is {str(value)[:100]}", f"a list of {' or '.join(known)}")
        return list(value)

    def activation(self, *keys: str, default: str) -> str:
        value = next((v for key in keys if (v := self.raw(key)) is not None), default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.error(keys[0], f"unknown activation {value!r}", f"one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def refuse(self, key: str, *harmless: Any) -> None:
        """Error if ``key`` asks for something we do not have."""
        if (value := self.raw(key)) is not None and value not in harmless:
            raise self.error(key, f"{value!r} is not supported")

    def unread(self) -> dict[str, Any]:
        return {key: value for key, value in self._hf.items() if key not in self._read}


def read_rope(reader: HfReader, parameters: Mapping[str, Any], theta: float, positions: int) -> RopeConfig:
    """One `RopeConfig` from a ``rope_parameters`` / ``rope_scaling`` dictionary (either age of transformers)."""
    field = "rope_scaling" if reader.has("rope_scaling") else "rope_parameters"

    def number(key: str, default: float | None) -> float:
        value = parameters.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise reader.error(
                f"{field}.{key}", "is missing" if value is None else f"is {value!r}", "a positive number"
            )
        return float(value)

    def optional(key: str) -> float | None:
        return None if parameters.get(key) is None else number(key, None)

    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise reader.error(f"{field}.rope_type", f"unsupported {kind!r}", f"one of {', '.join(ROPE_KINDS)}")
    if parameters.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise reader.error(
            f"{field}.partial_rotary_factor", "a rotation of a part of each head is not supported", "1.0"
        )
    theta = number("rope_theta", theta)
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", number("factor", None))
    if kind == "dynamic":
        return RopeConfig(theta, "dynamic", number("factor", None), positions)
    outer = reader.integer("original_max_position_embeddings", positions)
    trained = int(number("original_max_position_embeddings", outer))
    if kind == "llama3":
        return RopeConfig(
            theta,
            "llama3",
            number("factor", None),
            trained,
            low_freq_factor=number("low_freq_factor", None),
            high_freq_factor=number("high_freq_factor", None),
        )
    return RopeConfig(
        theta,
        "yarn",
        number("factor", positions / trained),
        trained,
        attention_factor=optional("attention_factor"),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=bool(parameters.get("truncate", True)),
    )


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = rope.trained_positions
    if rope.kind == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        yarn = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
        parameters |= {key: value for key in yarn if (value := getattr(rope, key)) is not None}
    return parameters


def one_rope(reader: HfReader, positions: int) -> tuple[RopeConfig, ...]:
    theta = reader.number("rope_theta", 10_000.0)
    newer, older = reader.table("rope_parameters"), reader.table("rope_scaling")
    parameters = older or newer
    reader.refuse("partial_rotary_factor", 1.0)
    return (read_rope(reader, parameters, theta, positions),)
