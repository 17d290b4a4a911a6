"""A GGUF file as a source of Hugging Face tensors: names, the layout of q and k, Gemma's norms, blocks to floats.

The header is read by `gguf_header.py`, the configuration by `gguf_config.py`; the block formats are the `gguf`
package's.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from alpaca_lora.errors import ModelFileError
from alpaca_lora.weights.gguf_config import config_from_gguf, find_architecture
from alpaca_lora.weights.gguf_header import Block, read_gguf_header
from alpaca_lora.weights.names import gguf_to_hf
from alpaca_lora.weights.source import check_finite, copy_serially, fingerprint_of, middle

# The package works on 16 rows at a time, with a price per call; rows are one after another in the file, so they may be
# cut anywhere between blocks. 16 rows of 4096 elements are two to four times faster than 16 rows of 576, and stay in
# the second-level cache.
ROW_ELEMENTS = 4096
CHUNK_ELEMENTS = 4 * 16 * ROW_ELEMENTS
# made anew by every reader from the configuration, so they are no weights
NOT_WEIGHTS = frozenset({"rope_freqs.weight"})


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Open and check a GGUF file; no weight is read yet. ModelFileError names what is damaged or not supported."""
    return GgufFile(Path(path))


class GgufFile:
    """A `TensorSource`. Reads by offset, never more than one chunk beyond the tensor asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_gguf_header(path)
        self.architecture = find_architecture(path, self.header)
        self.notices: list[str] = []
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        self._blocks: dict[str, Block] = {}
        try:
            self.config: dict[str, Any] = config_from_gguf(path, self.header, self._small_floats)
            self._name_blocks()
            self._check_types()
        except BaseException:
            self.close()
            raise
        self.shapes = {name: block.shape for name, block in self._blocks.items()}

    def _name_blocks(self) -> None:
        gemma = self.architecture == "gemma3"
        for name, block in self.header.blocks.items():
            if name in NOT_WEIGHTS:
                continue
            if (hf_name := gguf_to_hf(name, gemma=gemma)) is None:
                what = f"{self.architecture} models have no tensor of this name"
                raise ModelFileError(
                    what, file=self.path, field=name[:200], fix="the file needs a newer version, or is damaged"
                )
            self._blocks[hf_name] = block

    def _check_types(self) -> None:
        """Every block type of the file can be turned into floats: found out on one block of zeros each."""
        for type_ in {block.type for block in self._blocks.values()}:
            try:
                dequantize(np.zeros((1, GGML_QUANT_SIZES[type_][1]), dtype=np.uint8), type_)
            except NotImplementedError as error:
                name = next(name for name, block in self._blocks.items() if block.type == type_)
                what = f"block type {type_.name} cannot be read"
                raise ModelFileError(
                    what, file=self.path, field=name, fix="take the model in another quantization"
                ) from error

    @property
    def tokenizer_fields(self) -> dict[str, Any]:
        """The ``tokenizer.*`` keys of the file as plain Python values, and ``general.name`` where there is one."""
        fields = self.header.fields
        return {k: v for k, v in fields.items() if k.startswith("tokenizer.") or k == "general.name"}

    @cached_property
    def fingerprint(self) -> str:
        """See `fingerprint_of`; the dtype is the block type, so another quantization of the same model is another
        base."""
        samples = (
            (name, block.type.name, block.shape, bytes(self._bytes(name, *middle(block.start, block.end))))
            for name, block in self._blocks.items()
        )
        return fingerprint_of(self.config, samples)

    def where(self, name: str) -> str:
        return str(self.path)

    def close(self) -> None:
        self._file.close()

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor in ``dtype``; None: float32, or float16 and bfloat16 where the file stores plain ones. Errors:
        `TensorSource.read`."""
        if name not in self._blocks:
            raise ModelFileError("is not in the file", file=self.path, field=name)
        block = self._blocks[name]
        offset = 1.0 if self.architecture == "gemma3" and name.endswith("norm.weight") else 0.0
        out = torch.empty(block.shape, dtype=dtype or _plain_dtype(block.type))
        flat = out.view(-1)
        block_elements, block_bytes = GGML_QUANT_SIZES[block.type]
        for first in range(0, flat.numel(), CHUNK_ELEMENTS):
            size = min(CHUNK_ELEMENTS, flat.numel() - first)
            start = block.start + first // block_elements * block_bytes
            part = torch.from_numpy(self._floats(name, block.type, start, size))
            check_finite(part, name, str(self.path))
            # llama.cpp keeps 1 + w of Gemma's norms; the subtraction must come before any rounding
            copy_serially(flat[first : first + size], part - offset if offset else part)
        heads = self._permuted_heads(name)
        return _unpermute(out, heads) if heads else out

    def _floats(self, name: str, type_: GGMLQuantizationType, start: int, size: int) -> np.ndarray:
        """``size`` elements from byte ``start`` on, as float32 or as they are stored."""
        block_elements, block_bytes = GGML_QUANT_SIZES[type_]
        raw = np.frombuffer(self._bytes(name, start, size // block_elements * block_bytes), dtype=np.uint8)
        if type_ == GGMLQuantizationType.F16:
            return raw.view(np.float16)
        if size % ROW_ELEMENTS:
            return dequantize(raw.reshape(1, -1), type_).reshape(-1)
        return dequantize(raw.reshape(size // ROW_ELEMENTS, -1), type_).reshape(-1)

    def _bytes(self, name: str, start: int, size: int) -> bytearray:
        data = bytearray(size)
        self._file.seek(start)
        view, done = memoryview(data), 0
        while done < size:
            try:
                count = self._file.readinto(view[done:])
            except OSError as error:
                raise ModelFileError(f"cannot be read: {error.strerror}", file=self.path, field=name) from error
            if not count:
                what = f"the file ends at byte {start + done}, inside of this tensor"
                raise ModelFileError(what, file=self.path, field=name, fix="the file was cut short: fetch it again")
            done += count
        return data

    def _small_floats(self, name: str) -> np.ndarray:
        block = self.header.blocks[name]
        size = int(np.prod(block.shape))
        if size > 4096 or block.type != GGMLQuantizationType.F32:
            raise ModelFileError(f"{block.type.name} of shape {block.shape}", file=self.path, field=name)
        return self._floats(name, block.type, block.start, size)

    def _permuted_heads(self, name: str) -> int:
        """Heads of a q or k projection whose rows llama.cpp reordered; 0 for all other tensors."""
        if self.config["model_type"] not in ("llama", "mistral"):
            return 0
        module = name.rpartition(".")[0]
        if module.endswith(".q_proj"):
            return self.config["num_attention_heads"]
        return self.config["num_key_value_heads"] if module.endswith(".k_proj") else 0


def _plain_dtype(type_: GGMLQuantizationType) -> torch.dtype:
    plain = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
    return plain.get(type_, torch.float32)


def _unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from rotation pairs (0, 1), (2, 3) ... (llama.cpp) to pairs (i, i + E/2) (Hugging Face)."""
    rows, rest = tensor.shape[0], tensor.shape[1:]
    return tensor.view(heads, rows // heads // 2, 2, *rest).transpose(1, 2).reshape(rows, *rest)
