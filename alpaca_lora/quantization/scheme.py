"""What every quantization scheme is, and the table of schemes.

A new scheme is one file here, one line in `SCHEMES`, one test file. A scheme knows matrices; it knows neither models
nor files nor adapters.
"""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch

from alpaca_lora.errors import ConfigError, ModelFileError, NumericalError, nearest
from alpaca_lora.kernels.tiled import spans, tiled_linear

SCHEMES: Mapping[str, str] = {
    "nf4": "alpaca_lora.quantization.nf4:NF4",
    "fp4": "alpaca_lora.quantization.fp4:FP4",
    "fp8": "alpaca_lora.quantization.fp8:FP8",
    "int8": "alpaca_lora.quantization.int8:Int8",
    "int4": "alpaca_lora.quantization.int4:Int4",
    "int8_dynamic": "alpaca_lora.quantization.int8_dynamic:Int8Dynamic",
    "int8_static": "alpaca_lora.quantization.int8_static:Int8Static",
}

Parts = Mapping[str, torch.Tensor]  # name of a part (codes, scales, ...) -> tensor


class Part(NamedTuple):
    """Shape and dtype of one stored tensor of a packed weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


class Grid(Protocol):
    """What each element of one weight (out, in) may become: the scales are fixed, the codes not chosen yet."""

    def choose(self, column_O: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(nearest codes, what they decode to), (out,) each, of a float32 column that may have changed since."""
        ...

    def parts(self, codes_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of codes (out, in) that `choose` gave."""
        ...


@dataclass(frozen=True)
class Scheme(ABC):
    """A way to store a weight matrix W (out, in) in fewer bits; the fields of a subclass are its settings.

    The decoded weight is a pure function of the parts: `tile` gives the same numbers for a part of W, whatever the
    rest of the tile is.
    """

    name: ClassVar[str]
    # whether it can only be made from sample rows (quantization/calibrate.py)
    needs_calibration: ClassVar[bool] = False
    # how its codes may be chosen (quantization/calibrate.py); gptq needs a `grid`
    roundings: ClassVar[frozenset[str]] = frozenset(("nearest",))
    has_kernel_in_c: ClassVar[bool] = False  # kernels/cpu

    @abstractmethod
    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        """The tensors that hold a weight of this shape. ConfigError when the settings do not fit it."""

    @abstractmethod
    def quantize(self, weight_OI: torch.Tensor, *, name: str) -> dict[str, torch.Tensor]:
        """The parts of a finite weight in any floating dtype; ``name`` is for messages."""

    def quantize_calibrated(
        self, weight_OI: torch.Tensor, inputs: Sequence[torch.Tensor], *, name: str
    ) -> dict[str, torch.Tensor]:
        """As `quantize`, for schemes that look at ``inputs``: what the linear saw on sample rows, chunks (T, in)."""
        return self.quantize(weight_OI, name=name)

    def grid(self, weight_OI: torch.Tensor, *, name: str) -> Grid:
        """What a finite weight's elements may become, for whoever chooses the codes column by column."""
        raise NotImplementedError(f"{self.name} is not made column by column")

    @abstractmethod
    def tile(
        self, parts: Parts, shape: tuple[int, int], rows: slice, columns: slice, dtype: torch.dtype
    ) -> torch.Tensor:
        """W[rows, columns] in ``dtype``, of a weight of ``shape`` (out, in)."""

    def apply(self, x_TI: torch.Tensor, parts: Parts, shape: tuple[int, int]) -> torch.Tensor:
        """x W^T (T, out) in the dtype of x, differentiable in x. Schemes that quantize activations too override it."""
        dtype = x_TI.dtype  # not read inside: the function would keep x alive until the backward pass
        return tiled_linear(x_TI, lambda rows, columns: self.tile(parts, shape, rows, columns, dtype), shape[0])

    def check_parts(self, parts: Parts, *, name: str, file: str | PathLike[str]) -> None:
        """NumericalError naming tensor and file when a scale is NaN or infinite. Shapes were compared before."""
        for part, tensor in parts.items():
            if tensor.is_floating_point() and tensor.element_size() > 1 and not bool(torch.isfinite(tensor).all()):
                raise NumericalError(
                    "NaN or infinite", file=file, field=f"{name}.{part}", fix="quantize the model again"
                )

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits of all parts over the number of weights."""
        size = sum(part.num_bytes for part in self.parts(out_features, in_features).values())
        return 8 * size / (out_features * in_features)

    def to_json(self) -> dict[str, Any]:
        """``{"scheme": name, setting: value, ...}``; `scheme_from_json` reads it back."""
        return {"scheme": self.name, **dataclasses.asdict(self)}

    @classmethod
    def make(cls, settings: Mapping[str, Any], *, file: str | PathLike[str] | None = None) -> Self:
        """From settings as they stand in a plan; those left out have their defaults. An error names what is wrong."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        values = {}
        for key, value in settings.items():
            if key not in known:
                raise _wrong(f"unknown setting of {cls.name}", file, key, f"one of {', '.join(known) or 'none'}")
            wanted = type(known[key].default)
            values[key] = float(value) if wanted is float and type(value) is int else value
            if type(values[key]) is not wanted:
                raise _wrong(f"is {value!r}", file, key, wanted.__name__)
        scheme = cls(**values)
        if problem := scheme.problem():
            raise _wrong(problem[1], file, problem[0], None)
        return scheme

    def problem(self) -> tuple[str, str] | None:
        """(setting, what is wrong with its value), whatever the weight; None: nothing."""
        return None


def by_rows(
    weight_OI: torch.Tensor, name: str, quantize: Callable[[torch.Tensor], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The parts of a weight whose rows are quantized apart from each other: ``quantize`` sees some rows at a time, in
    float32, so that nothing of the weight's size stands beside it. NumericalError naming the weight when it is not
    finite.
    """
    pieces = []
    for rows in spans(*weight_OI.shape):
        some = weight_OI[rows].float()
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(some)):  # NaN wins in both
            raise NumericalError("weights that are NaN or infinite", field=name)
        pieces.append(quantize(some))
    return {part: torch.cat([piece[part] for piece in pieces]) for part in pieces[0]}


def _wrong(
    what: str, file: str | PathLike[str] | None, field: str, expected: str | None
) -> ConfigError | ModelFileError:
    if file is None:
        return ConfigError(what, field=field, expected=expected)
    return ModelFileError(what, file=file, field=field, expected=expected)


def scheme_class(name: str, *, file: str | PathLike[str] | None = None) -> type[Scheme]:
    """The class of scheme ``name``; an error naming the nearest when there is none."""
    if name not in SCHEMES:
        hint = nearest(str(name), SCHEMES)
        shown = f"one of {', '.join(SCHEMES)}" + (f"; did you mean {hint[0]!r}?" if hint else "")
        raise _wrong(f"unknown scheme {name!r}", file, "scheme", shown)
    module, _, attribute = SCHEMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def scheme_from_json(content: Mapping[str, Any], *, file: str | PathLike[str] | None = None) -> Scheme:
    """What `Scheme.to_json` gave, or what a user wrote in a plan. ConfigError, or ModelFileError naming ``file``."""
    settings = dict(content)
    name = settings.pop("scheme", None)
    if not isinstance(name, str):
        raise _wrong("names no scheme", file, "scheme", f"one of {', '.join(SCHEMES)}")
    return scheme_class(name, file=file).make(settings, file=file)
