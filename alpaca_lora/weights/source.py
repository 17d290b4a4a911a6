"""What a weight file is to the rest of the house: names and shapes without reading, then one tensor at a time.

Knows no format. `huggingface.py` and `gguf.py` are the two that exist; `hub.py` finds the file of a name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from alpaca_lora.errors import NumericalError

# keys of config.json that change when a model is only re-saved
VOLATILE_CONFIG_KEYS = frozenset(
    {"transformers_version", "torch_dtype", "dtype", "use_cache", "auto_map", "architectures", "name_or_path"}
)
SAMPLE_BYTES = 4096
SERIAL_ELEMENTS = 32_768
INFINITY_BITS: Mapping[torch.dtype, int] = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


class TensorSource(Protocol):
    """A model's weights on disk, under Hugging Face's names.

    path: the folder or file. config: the keys of a Hugging Face ``config.json``. notices: things the user should be
    told. fingerprint: 64 hexadecimal digits, see `fingerprint_of`.
    """

    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    notices: list[str]

    @property
    def fingerprint(self) -> str: ...

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor in ``dtype``; None: as it is stored (float32 when it is stored in blocks). Only this tensor is in
        memory.

        ModelFileError names file and tensor when it cannot be read, NumericalError when it holds NaN or infinity.
        """
        ...

    def where(self, name: str) -> str:
        """The file that holds the tensor, for messages."""
        ...

    def close(self) -> None: ...


def check_finite(tensor: torch.Tensor, name: str, file: str) -> None:
    """NumericalError naming file and tensor when a weight is NaN or infinite. Call it on slices: 16 bit types take a
    copy."""
    if not tensor.numel() or not tensor.is_floating_point() or tensor.element_size() == 1:
        return
    if tensor.dtype in INFINITY_BITS:
        # an exponent of all ones, read as an integer without the sign
        finite = (tensor.contiguous().view(torch.int16).numpy() & 0x7FFF).max() < INFINITY_BITS[tensor.dtype]
    else:
        values = tensor.numpy()  # NaN wins in both minimum and maximum
        finite = np.isfinite(values.min()) and np.isfinite(values.max())
    if not finite:
        raise NumericalError("weights that are NaN or infinite", file=file, field=name, fix="fetch the file again")


def copy_serially(target: torch.Tensor, source: torch.Tensor) -> None:
    """``target.copy_(source)`` of two vectors, with conversion, on this thread alone.

    torch wakes its threads for more than 32,768 elements. For work as small as a slice of a file their barriers cost
    more than they save, and ten times the work itself when other programs hold the processors.
    """
    for target_part, source_part in zip(target.split(SERIAL_ELEMENTS), source.split(SERIAL_ELEMENTS), strict=True):
        target_part.copy_(source_part)


def fingerprint_of(config: Mapping[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    """A cheap name for a base model, equal for equal models and wherever they lie.

    sha256 over the configuration (without the keys that re-saving changes) and, tensor by tensor in the order of names,
    the name, the stored dtype, the shape and the 4096 bytes in the middle of its data. One read per tensor, so it takes
    milliseconds; a model whose tensors were trained, merged, requantized or resized gets another one. It is no proof
    against a forger, and how the tensors are spread over shards does not count.
    """
    kept = {k: v for k, v in config.items() if k not in VOLATILE_CONFIG_KEYS and not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode("utf-8"))
    for name, dtype, shape, sample in sorted(tensors):
        digest.update(f"\n{name} {dtype} {list(shape)} ".encode())
        digest.update(sample)
    return digest.hexdigest()


def middle(start: int, end: int) -> tuple[int, int]:
    """(offset, size) of the sample of a tensor whose bytes are [start, end)."""
    size = min(SAMPLE_BYTES, end - start)
    return start + (end - start - size) // 2, size
