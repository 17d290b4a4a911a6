"""One safetensors file: a bounded look at its header, reading, and a durable, deterministic writer.

Knows the file format (https://huggingface.co/docs/safetensors, "Format"); knows nothing of folders, shards or models.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from alpaca_lora.errors import MachineError, ModelFileError
from alpaca_lora.weights.source import check_finite, copy_serially

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
# A tensor has one brace, two brackets and about eight commas; many more can only be an attempt to exhaust the memory.
MAX_SIGNS: Mapping[bytes, int] = {
    b'"data_offsets"': MAX_TENSORS, b"{": 2 * MAX_TENSORS, b"[": 3 * MAX_TENSORS, b",": 12 * MAX_TENSORS,
}  # fmt: skip
MAX_DIMENSIONS = 8
READ_ELEMENTS = 2**20

# size in bytes and torch's name, in the order of the official writer (widest first), which keeps every tensor aligned
DTYPES: Mapping[str, tuple[int, torch.dtype]] = {
    "U64": (8, torch.uint64),
    "I64": (8, torch.int64),
    "F64": (8, torch.float64),
    "F32": (4, torch.float32),
    "U32": (4, torch.uint32),
    "I32": (4, torch.int32),
    "BF16": (2, torch.bfloat16),
    "F16": (2, torch.float16),
    "U16": (2, torch.uint16),
    "I16": (2, torch.int16),
    "F8_E4M3": (1, torch.float8_e4m3fn),
    "F8_E5M2": (1, torch.float8_e5m2),
    "I8": (1, torch.int8),
    "U8": (1, torch.uint8),
    "BOOL": (1, torch.bool),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its dtype by the format's name, its shape, and its bytes [start, end) counted from the
    file's begin."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says about itself, checked against the size of the file."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """The checked header of a safetensors file, in bounded time and memory whatever the file says.

    ModelFileError names the file, and the tensor where one is at fault: header over 16 MB or over 100,000 tensors, not
    JSON, unknown dtypes, shapes that disagree with the byte counts, bytes outside of the file, holes, overlaps, a file
    cut short.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw, data_start = _header_bytes(path, file, size)
    except OSError as error:
        raise ModelFileError(f"cannot be read: {error.strerror or error}", file=path) from error
    fields = _parse(path, raw)
    metadata = fields.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ModelFileError("is not a table of strings", file=path, field="__metadata__")
    if len(fields) > MAX_TENSORS:
        raise ModelFileError(f"{len(fields)} tensors in one file", file=path, expected=f"at most {MAX_TENSORS}")
    tensors = {name: _entry(path, name, field, data_start, size) for name, field in fields.items()}
    _check_layout(path, tensors, data_start, size)
    return Header(tensors, metadata)


def _header_bytes(path: str | os.PathLike[str], file: BinaryIO, size: int) -> tuple[bytes, int]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ModelFileError(f"{size} bytes are too few for a safetensors file", file=path, fix="fetch the file again")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise ModelFileError(
            f"header of {length} bytes", file=path, expected=f"at most {MAX_HEADER_BYTES}",
            fix="this is not a safetensors file, or it is damaged",
        )  # fmt: skip
    if 8 + length > size:
        raise ModelFileError(
            f"the header says it is {length} bytes long but the file ends after {size}", file=path,
            fix="the file was cut short: fetch it again",
        )  # fmt: skip
    return file.read(length), 8 + length


def _parse(path: str | os.PathLike[str], raw: bytes) -> dict[str, Any]:
    """JSON to a table. Counting before parsing keeps a hostile header from becoming millions of Python objects."""
    for sign, most in MAX_SIGNS.items():
        if raw.count(sign) > most:
            raise ModelFileError(
                "the header holds too many items", file=path, expected=f"at most {MAX_TENSORS} tensors"
            )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ModelFileError("stands twice in the header", file=path, field=twice[:200])
        return table

    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(
            f"the header is not JSON ({str(error)[:120]})", file=path, fix="the file is damaged: fetch it again"
        ) from error
    if not isinstance(fields, dict):
        raise ModelFileError("the header is not a table", file=path)
    return fields


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _entry(path: str | os.PathLike[str], name: str, field: Any, data_start: int, size: int) -> Entry:
    subject = name[:200]
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        raise ModelFileError("bad entry", file=path, field=subject, expected="dtype, shape and data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelFileError(
            f"dtype {str(dtype)[:40]!r}", file=path, field=subject, expected=f"one of {', '.join(DTYPES)}"
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise ModelFileError(f"bad shape {str(shape)[:80]}", file=path, field=subject)
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(map(_is_count, offsets))
        or offsets[0] > offsets[1]
    ):
        raise ModelFileError(f"bad data_offsets {str(offsets)[:80]}", file=path, field=subject)
    start, end = offsets[0] + data_start, offsets[1] + data_start
    if end > size:
        raise ModelFileError(
            f"its bytes reach to {end} but the file ends after {size}", file=path, field=subject,
            fix="the file was cut short: fetch it again",
        )  # fmt: skip
    if prod(shape) * DTYPES[dtype][0] != end - start:
        raise ModelFileError(
            f"{end - start} bytes do not hold {dtype} of shape {tuple(shape)}", file=path, field=subject,
            fix="the header is damaged: fetch the file again",
        )  # fmt: skip
    return Entry(dtype, tuple(shape), start, end)


def _check_layout(path: str | os.PathLike[str], tensors: dict[str, Entry], data_start: int, size: int) -> None:
    """Tensors follow one another without hole or overlap and fill the file to its end."""
    reached = data_start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != reached:
            what = "overlaps the tensor before it" if entry.start < reached else "leaves a hole before it"
            raise ModelFileError(f"{what} (at byte {entry.start}, not {reached})", file=path, field=name[:200])
        reached = entry.end
    if reached != size:
        raise ModelFileError(f"{size - reached} bytes after the last tensor belong to none", file=path)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """All tensors of a file, in memory of their own (the file may be replaced afterwards). ModelFileError as
    `read_header`."""
    header = read_header(path)
    with opened(path) as file:
        return {name: file.get_tensor(name).clone() for name in header.tensors}


def read_entry(file: BinaryIO, name: str, entry: Entry, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One tensor of an open file, in ``dtype`` (None: as stored), in memory of its own.

    Reads by offset and converts in slices, so nothing but the result grows, and a file that shrinks meanwhile is an
    error, not a crash. ModelFileError naming file and tensor, also for integers where a floating ``dtype`` is wanted;
    NumericalError when a weight is NaN or infinite.
    """
    if dtype is not None and dtype.is_floating_point and not DTYPES[entry.dtype][1].is_floating_point:
        fix = "quantized models of this kind are not read: take the one they were made of"
        raise ModelFileError(
            f"is stored as {entry.dtype}", file=file.name, field=name, expected="floating point numbers", fix=fix
        )
    out = torch.empty(entry.shape, dtype=dtype or DTYPES[entry.dtype][1])
    flat, stored = out.view(-1), DTYPES[entry.dtype][1]
    scratch = None if out.dtype == stored else torch.empty(min(flat.numel(), READ_ELEMENTS), dtype=stored)
    file.seek(entry.start)
    for first in range(0, flat.numel(), READ_ELEMENTS):
        place = flat[first : first + READ_ELEMENTS]
        part = place if scratch is None else scratch[: place.numel()]
        view = part.view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            if not (count := file.readinto(view[done:])):  # type: ignore[attr-defined]
                raise ModelFileError("the file ends inside of this tensor", file=file.name, field=name)
            done += count
        check_finite(part, name, file.name)
        if scratch is not None:
            copy_serially(place, part)
    return out


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The ``__metadata__`` strings of a file."""
    return read_header(path).metadata


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The official reader on a file whose header was checked; what it raises comes out as ModelFileError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"cannot be read as safetensors: {error}", file=path) from error


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write ``tensors`` to ``path`` durably (sibling file, fsync, rename, fsync of the folder); returns the sha256 of
    the file.

    The same tensors and metadata give the same bytes, in whatever order they come (the official writer orders metadata
    at random). Tensors that share storage are written once per name. MachineError on a full or read-only disk; ``path``
    is then as it was.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    header, order = _make_header(target, tensors, metadata or {"format": "pt"})
    try:
        with open(temporary, "xb") as file:
            digest = _write_hashed(file, header, (tensors[name] for name in order))
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        needed = len(header) + sum(t.numel() * t.element_size() for t in tensors.values())
        raise disk_error(error, target, needed) from error
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def _make_header(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    names = {dtype: name for name, (_, dtype) in DTYPES.items()}
    ranks = {dtype: rank for rank, (_, dtype) in enumerate(DTYPES.values())}
    for name, tensor in tensors.items():
        if tensor.dtype not in names:
            raise ModelFileError(f"safetensors cannot hold {tensor.dtype}", file=path, field=name)
    order = sorted(tensors, key=lambda name: (ranks[tensors[name].dtype], name))
    fields: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        fields[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES or len(order) > MAX_TENSORS:
        raise ModelFileError(f"{len(order)} tensors are too many for one file", file=path)
    return len(raw).to_bytes(8, "little") + raw, order


def _write_hashed(file: BinaryIO, header: bytes, tensors: Iterator[torch.Tensor]) -> str:
    digest = hashlib.sha256(header)
    file.write(header)
    for tensor in tensors:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        file.write(raw)
        digest.update(raw)
    file.flush()
    os.fsync(file.fileno())
    return digest.hexdigest()


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames and new names inside of ``folder`` durable. Does nothing where folders cannot be opened
    (Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: OSError, target: Path, needed: int) -> MachineError:
    """The MachineError for a write that failed, with the bytes needed and free."""
    folder = next(p for p in (target.parent, *target.parent.parents, Path("/")) if p.exists())
    free = shutil.disk_usage(folder).free
    return MachineError(
        f"cannot be written: {error.strerror or error}", file=target, fix=f"{needed} bytes are needed, {free} are free"
    )
