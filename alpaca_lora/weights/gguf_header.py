"""The header of a GGUF file, read with limits: metadata to plain Python values, tensors to byte ranges.

The stock reader makes an array object per element of the vocabulary (seconds for a large one) and trusts every count in
the file. This one reads each count against what is left of the file first. Source: the GGUF specification, versions 2
and 3, little-endian.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from alpaca_lora.errors import ModelFileError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 65_536
MAX_TENSORS = 100_000
MAX_NAME_BYTES = 65_535
MAX_STRING_BYTES = 2**26
MAX_ARRAY_ITEMS = 2**22  # vocabulary, its types and its merges together; the largest known have a million
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass(frozen=True, slots=True)
class Block:
    """One tensor: its block type, its shape (rows first, as torch has it) and its bytes [start, end) of the file."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """``fields``: metadata by key, arrays as lists; ``blocks``: tensors by the file's own names, in its order."""

    version: int
    fields: dict[str, Any]
    blocks: dict[str, Block]


def read_gguf_header(path: str | os.PathLike[str]) -> GgufHeader:
    """Parse and check; ModelFileError names file, byte and key or tensor of what does not hold."""
    try:
        with open(path, "rb") as file:
            return _HeaderReader(Path(path), file).read()
    except OSError as error:
        raise ModelFileError(f"cannot be read: {error.strerror or error}", file=path) from error


class _HeaderReader:
    """A position in the file and what was found before it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.items_left = MAX_ARRAY_ITEMS

    def read(self) -> GgufHeader:
        if self.file.read(4) != MAGIC:
            raise self.bad("is not a GGUF file (it does not begin with GGUF)")
        version = self.scalar(_UINT32)
        if version & 0xFFFF == 0:
            raise self.bad("is a big-endian GGUF file", expected="little-endian")
        if version not in VERSIONS:
            raise self.bad(f"GGUF version {version}", expected=f"one of {', '.join(map(str, VERSIONS))}")
        num_tensors, num_keys = self.scalar(10), self.scalar(10)
        if num_tensors > MAX_TENSORS:
            raise self.bad(f"says it holds {num_tensors} tensors", expected=f"at most {MAX_TENSORS}")
        if num_keys > MAX_KEYS:
            raise self.bad(f"says it holds {num_keys} keys", expected=f"at most {MAX_KEYS}")
        fields = self.read_fields(num_keys)
        infos = self.read_infos(num_tensors)
        return GgufHeader(version, fields, self.place(infos, fields))

    def bad(self, what: str, *, field: str | None = None, expected: str | None = None) -> ModelFileError:
        fix = "the file is damaged or no model: fetch it again"
        return ModelFileError(what, file=self.path, field=field, expected=expected, fix=fix)

    def take(self, count: int, limit: int, field: str | None = None) -> bytes:
        """The next ``count`` bytes; the count comes from the file, so it is held against limit and file before memory
        is asked for."""
        at = self.file.tell()
        if count > limit or at + count > self.size:
            raise self.bad(f"{count} bytes wanted at byte {at}, but the file ends after {self.size}", field=field)
        data = self.file.read(count)
        if len(data) != count:
            raise self.bad(f"ends inside of its header, at byte {at + len(data)}", field=field)
        return data

    def scalar(self, kind: int, field: str | None = None) -> Any:
        layout = _SCALARS[kind]
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout), 8, field))
        return bool(value) if kind == _BOOL else value

    def string(self, limit: int, field: str | None = None) -> str:
        raw = self.take(self.scalar(10, field), limit, field)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.bad(f"text that is not UTF-8 before byte {self.file.tell()}", field=field) from error

    def read_fields(self, count: int) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for _ in range(count):
            key = self.string(MAX_NAME_BYTES)
            if key in fields:
                raise self.bad("stands twice in the metadata", field=key[:200])
            fields[key] = self.value(self.scalar(_UINT32, key), key)
        return fields

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(kind, key)
        if kind == _STRING:
            return self.string(MAX_STRING_BYTES, key)
        if kind == _ARRAY:
            return self.array(key)
        raise self.bad(f"unknown value type {kind}", field=key[:200])

    def array(self, key: str) -> list[Any]:
        kind, count = self.scalar(_UINT32, key), self.scalar(10, key)
        if count > self.items_left:
            raise self.bad(f"an array of {count} items", field=key[:200], expected=f"at most {MAX_ARRAY_ITEMS} in all")
        self.items_left -= count
        if kind in _SCALARS:
            layout = np.dtype(_SCALARS[kind])
            values = np.frombuffer(self.take(count * layout.itemsize, self.size, key), dtype=layout)
            return (values != 0).tolist() if kind == _BOOL else values.tolist()
        if kind == _STRING:
            return self.strings(count, key)
        raise self.bad(f"an array of value type {kind}", field=key[:200], expected="numbers or strings")

    def strings(self, count: int, key: str) -> list[str]:
        if count * 8 > self.size:
            raise self.bad(f"an array of {count} strings in a file of {self.size} bytes", field=key[:200])
        read, unpack, size = self.file.read, struct.Struct("<Q").unpack, self.size
        values: list[str] = []
        try:
            for _ in range(count):
                (length,) = unpack(read(8))
                # inlined `string`: a vocabulary has hundreds of thousands of these
                raw = read(length) if length <= MAX_NAME_BYTES else self.take(length, min(size, MAX_STRING_BYTES), key)
                if len(raw) != length:
                    raise self.bad(f"ends inside of item {len(values)}", field=key[:200])
                values.append(raw.decode("utf-8"))
        except struct.error as error:
            raise self.bad(f"ends after {len(values)} of {count} items", field=key[:200]) from error
        except UnicodeDecodeError as error:
            raise self.bad(f"item {len(values)} is not UTF-8", field=key[:200]) from error
        return values

    def read_infos(self, count: int) -> dict[str, tuple[int, tuple[int, ...], int]]:
        infos: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(count):
            name = self.string(MAX_NAME_BYTES)
            if name in infos:
                raise self.bad("stands twice among the tensors", field=name[:200])
            num_dimensions = self.scalar(_UINT32, name)
            if not 1 <= num_dimensions <= MAX_DIMENSIONS:
                raise self.bad(f"{num_dimensions} dimensions", field=name[:200], expected=f"1 to {MAX_DIMENSIONS}")
            dims = tuple(self.scalar(10, name) for _ in range(num_dimensions))
            kind, offset = self.scalar(_UINT32, name), self.scalar(10, name)
            infos[name] = (kind, dims[::-1], offset)
        return infos

    def place(self, infos: dict[str, tuple[int, tuple[int, ...], int]], fields: dict[str, Any]) -> dict[str, Block]:
        alignment = fields.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise self.bad(f"alignment {alignment!r}", field="general.alignment", expected="a power of two")
        data_start = -(-self.file.tell() // alignment) * alignment
        blocks = {name: self.block(name[:200], *info, data_start, alignment) for name, info in infos.items()}
        reached = data_start
        for name, block in sorted(blocks.items(), key=lambda item: item[1].start):
            if block.start < reached:
                raise self.bad(f"its bytes begin at {block.start}, inside of another tensor", field=name[:200])
            reached = block.end
        return blocks

    def block(
        self, name: str, kind: int, shape: tuple[int, ...], offset: int, data_start: int, alignment: int
    ) -> Block:
        try:
            type_ = GGMLQuantizationType(kind)
        except ValueError as error:
            raise self.bad(f"unknown block type {kind}", field=name) from error
        block_elements, block_bytes = GGML_QUANT_SIZES[type_]
        if 0 in shape or shape[-1] % block_elements:
            expected = f"rows of a multiple of {block_elements} elements"
            raise self.bad(f"{type_.name} of shape {shape}", field=name, expected=expected)
        if offset % alignment:
            raise self.bad(f"offset {offset} is not aligned to {alignment}", field=name)
        start = data_start + offset
        end = start + prod(shape) // block_elements * block_bytes
        if end > self.size:
            raise self.bad(f"{type_.name} of shape {shape} reaches to byte {end} of {self.size}", field=name)
        return Block(type_, shape, start, end)
