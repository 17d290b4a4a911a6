"""The linear whose weight is stored by a `Scheme`. Keeps `models.linear.LinearContract`; knows no scheme by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from alpaca_lora.errors import ModelFileError
from alpaca_lora.kernels.tiled import spans
from alpaca_lora.models.linear import PackedLinear
from alpaca_lora.quantization.scheme import Scheme

OnRead = Callable[[str, "QuantizedLinear", torch.Tensor | None], None]  # name, linear, the dense weight it was made of


class QuantizedLinear(PackedLinear):
    """y = x W^T + b with W stored as the parts of ``scheme``, which are buffers of their own names (codes, scales ...).

    ``dtype``: the compute dtype, that of `dense_weight`; inputs may have another. ``is_stored``: whether the file that
    `read` takes it from holds the parts, or the dense weight that is to be quantized. ``on_read``: told when it is
    read.
    """

    def __init__(
        self, in_features: int, out_features: int, scheme: Scheme, *, dtype: torch.dtype, is_stored: bool = False,
        bias: nn.Parameter | None = None, device: torch.device | str = "meta", on_read: OnRead | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features)
        self.scheme, self.dtype, self.is_stored, self.bias, self._on_read = scheme, dtype, is_stored, bias, on_read
        self.part_names = tuple(scheme.parts(out_features, in_features))
        for name, part in scheme.parts(out_features, in_features).items():
            self.register_buffer(name, torch.empty(part.shape, dtype=part.dtype, device=device))

    @classmethod
    def from_dense(cls, linear: nn.Module, scheme: Scheme, *, name: str) -> QuantizedLinear:
        """Quantize a linear that has a weight; its bias is shared."""
        weight: Any = linear.weight
        packed = cls(
            int(linear.in_features), int(linear.out_features), scheme, dtype=weight.dtype,  # pyright: ignore
            bias=getattr(linear, "bias", None), device=weight.device,
        )  # fmt: skip
        packed.set_parts(scheme.quantize(weight.detach(), name=name))
        return packed

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.out_features, self.in_features

    def stored_parts(self) -> dict[str, torch.Tensor]:
        """Name of a part -> its tensor."""
        return {name: self.get_buffer(name) for name in self.part_names}

    def set_parts(self, parts: dict[str, torch.Tensor]) -> None:
        """Take parts of the right shapes in the place of those that are here."""
        for name in self.part_names:
            old, new = self.get_buffer(name), parts[name]
            assert old.shape == new.shape and old.dtype == new.dtype, f"{name}: {new.shape} {new.dtype}"
            setattr(self, name, new)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TI = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        y_TO = self.scheme.apply(x_TI, self.stored_parts(), self.shape)
        if self.bias is not None:
            y_TO = y_TO + self.bias.to(y_TO.dtype)
        return y_TO if x.ndim == 2 else y_TO.reshape(*x.shape[:-1], self.out_features)

    def dense_weight(self) -> torch.Tensor:
        whole = slice(0, self.out_features), slice(0, self.in_features)
        return self.scheme.tile(self.stored_parts(), self.shape, *whole, self.dtype)

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        if not self.is_stored:
            return {"weight": self.shape}
        return {name: tuple(self.get_buffer(name).shape) for name in self.part_names}

    def read(self, name: str, source: Any, device: torch.device) -> None:
        """As `PackedLinear.read`. ModelFileError for a part of another dtype, NumericalError for scales that are not
        finite; both name tensor and file.
        """
        if not self.is_stored:
            weight = source.read(f"{name}.weight").to(device)
            self.set_parts(self.scheme.quantize(weight, name=name))
            self._tell(name, weight)
            return
        parts = {part: source.read(f"{name}.{part}").to(device) for part in self.part_names}
        file = source.where(f"{name}.{self.part_names[0]}")
        for part, tensor in parts.items():
            if tensor.dtype != (wanted := self.get_buffer(part).dtype):
                found, expected = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, wanted))
                raise ModelFileError(
                    f"is stored as {found}", file=source.where(f"{name}.{part}"), field=f"{name}.{part}",
                    expected=f"{expected} of scheme {self.scheme.name}", fix="quantize the model again",
                )  # fmt: skip
        self.scheme.check_parts(parts, name=name, file=file)
        self.set_parts(parts)
        self._tell(name, None)

    def _tell(self, name: str, weight: torch.Tensor | None) -> None:
        if self._on_read is not None:
            self._on_read(name, self, weight)

    def relative_error(self, weight_OI: torch.Tensor) -> float:
        """Norm of what quantizing changed over the norm of the weight; a tile at a time, in float32."""
        wrong = whole = 0.0
        for rows in spans(*self.shape):
            some = weight_OI[rows].float()
            tile = self.scheme.tile(self.stored_parts(), self.shape, rows, slice(0, self.in_features), torch.float32)
            wrong += float((tile - some).square_().sum(dtype=torch.float64))
            whole += float(some.square().sum(dtype=torch.float64))
        return (wrong / whole) ** 0.5 if whole else 0.0

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme.to_json()}"
