"""A Hugging Face model folder, both directions: ``config.json`` and one or several ``.safetensors`` files.

Opens nothing but JSON and safetensors; reads one tensor at a time. Knows no model.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from alpaca_lora.errors import ModelFileError, UserError
from alpaca_lora.weights.contained import contained_file, read_json
from alpaca_lora.weights.file_rows import FileRows
from alpaca_lora.weights.safetensors_file import (
    DTYPES,
    Header,
    disk_error,
    opened,
    read_entry,
    read_header,
    sync_folder,
    write_safetensors,
)
from alpaca_lora.weights.source import fingerprint_of, middle

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# read by the text room, which knows no folders that end somewhere: links out of this one are refused here
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
MAX_SHARD_BYTES = 2 * 10**9
LEAST_FILE_ROWS = 32 * 2**20  # bytes of a matrix that is worth leaving in its file
SAFETENSORS_HINT = (
    "have the program that made it save it as safetensors (transformers does so with save_pretrained); "
    "pickle files can run code, so they are never opened here"
)


def open_folder(path: str | os.PathLike[str]) -> HuggingFaceFolder:
    """Open and check a model folder; no weight is read yet.

    UserError: no such folder, or a folder that holds an adapter. ModelFileError: only pickle weights, a shard that is
    missing, cut short, damaged or outside of the folder, an index that disagrees with its shards; the shard and a
    tensor of it are named.
    """
    return HuggingFaceFolder(Path(path))


class HuggingFaceFolder:
    """A `TensorSource`. Each tensor is read into memory of its own; what `rows_in_file` gives stays in its file."""

    def __init__(self, path: Path) -> None:
        self.path = self.tokenizer_folder = path
        self.notices: list[str] = []
        if not path.is_dir():
            raise UserError("is not a folder", file=path, fix="give the folder that holds config.json")
        if not (path / "config.json").exists():
            raise _no_config(path)
        self.config: dict[str, Any] = read_json(contained_file(path, "config.json"))
        if self.config.pop("auto_map", None) is not None:
            self.notices.append(f"{path}: auto_map is ignored: no code of a model is run")
        for name in TOKENIZER_FILES:
            if (path / name).is_symlink():
                contained_file(path, name)
        self._shard_of, self._headers = _find_tensors(path, self.notices)
        self.shapes = {name: self._entry(name).shape for name in self._shard_of}
        self._files: dict[str, Any] = {}

    def _entry(self, name: str) -> Any:
        return self._headers[self._shard_of[name]].tensors[name]

    @cached_property
    def fingerprint(self) -> str:
        """See `fingerprint_of`."""
        return fingerprint_of(self.config, self._samples())

    def _samples(self) -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
        for shard, header in self._headers.items():
            with open(self.path / shard, "rb", buffering=0) as file:
                for name, entry in header.tensors.items():
                    if self._shard_of.get(name) == shard:
                        offset, size = middle(entry.start, entry.end)
                        file.seek(offset)
                        yield name, entry.dtype, entry.shape, file.read(size)

    def where(self, name: str) -> str:
        return str(self.path / self._shard_of.get(name, ""))

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor in ``dtype``; None: as stored. Errors: `TensorSource.read`."""
        if name not in self._shard_of:
            raise ModelFileError("is not in the folder", file=self.path, field=name)
        shard = self._shard_of[name]
        try:
            if shard not in self._files:
                self._files[shard] = open(self.path / shard, "rb", buffering=0)  # noqa: SIM115 - closed by close()
            return read_entry(self._files[shard], name, self._entry(name), dtype=dtype)
        except OSError as error:
            raise ModelFileError(f"cannot be read: {error.strerror}", file=self.path / shard, field=name) from error

    def rows_in_file(self, name: str, dtype: torch.dtype) -> FileRows | None:
        """A matrix that is stored in ``dtype`` as it lies in its file; None where it is another dtype, small, or where
        the system cannot read by offset.
        """
        shard, entry = self._shard_of[name], self._entry(name)
        is_large = entry.end - entry.start >= LEAST_FILE_ROWS
        is_matrix = DTYPES[entry.dtype][1] == dtype and len(entry.shape) == 2 and entry.start % dtype.itemsize == 0
        if not (is_large and is_matrix and hasattr(os, "preadv")):
            return None
        return FileRows(self.path / shard, name, entry.start, entry.shape, dtype)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def _no_config(path: Path) -> UserError | ModelFileError:
    if (path / "adapter_config.json").exists():
        fix = "give it as --lora_weights, and its base model as --base_model"
        return UserError("is the folder of an adapter, not of a model", file=path, fix=fix)
    return ModelFileError(
        "is missing", file=path / "config.json", fix="give the folder of a model in Hugging Face's layout"
    )


def _find_tensors(path: Path, notices: list[str]) -> tuple[dict[str, str], dict[str, Header]]:
    """(tensor -> shard, shard -> header)."""
    if (path / SINGLE_FILE).exists() or (path / SINGLE_FILE).is_symlink():
        header = _checked_header(contained_file(path, SINGLE_FILE))
        return dict.fromkeys(header.tensors, SINGLE_FILE), {SINGLE_FILE: header}
    if (path / INDEX_FILE).exists() or (path / INDEX_FILE).is_symlink():
        return _read_index(path, notices)
    raise _no_weights(path)


def _checked_header(path: Path) -> Header:
    """Our bounded check first, then the official parser's own."""
    header = read_header(path)
    with opened(path):
        return header


def _no_weights(path: Path) -> ModelFileError:
    names = sorted(p.name for p in path.iterdir())
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        return ModelFileError(f"holds only pickle weights ({', '.join(pickles[:3])})", file=path, fix=SAFETENSORS_HINT)
    return ModelFileError("holds no weights", file=path, expected=f"{SINGLE_FILE} or {INDEX_FILE}")


def _read_index(path: Path, notices: list[str]) -> tuple[dict[str, str], dict[str, Header]]:
    index = path / INDEX_FILE
    shard_of = read_json(contained_file(path, INDEX_FILE)).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(s, str) for s in shard_of.values()):
        raise ModelFileError("is missing or no table of tensor to file", file=index, field="weight_map")
    first_of: dict[str, str] = {}
    for name, shard in shard_of.items():
        first_of.setdefault(shard, name)
    headers: dict[str, Header] = {}
    for shard, name in first_of.items():
        if not shard.endswith(".safetensors"):
            fix = SAFETENSORS_HINT if shard.endswith(PICKLE_SUFFIXES) else None
            raise ModelFileError(
                f"names the file {shard[:200]!r}", file=index, field=name, expected="a .safetensors file", fix=fix
            )
        headers[shard] = _checked_header(contained_file(path, shard, named_by=index, field=name))
    for name, shard in shard_of.items():
        if name not in headers[shard].tensors:
            raise ModelFileError(f"is not in the file, but {INDEX_FILE} says so", file=path / shard, field=name)
    for shard, header in headers.items():
        if extra := [name for name in header.tensors if shard_of.get(name) != shard]:
            notices.append(
                f"{path / shard}: {len(extra)} tensors are not in the index and are ignored ({extra[0]} ...)"
            )
    return shard_of, headers


def write_folder(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: Mapping[str, Any],
    *,
    extra_files: Mapping[str, bytes] | None = None,
    tokenizer_saver: Callable[[Path], object] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a model folder that appears whole or not at all, and is durable when this returns.

    ``tensors`` are taken one by one; at most one shard of them is held. ``tokenizer_saver`` is called with the folder
    being written; ``extra_files`` are plain names to bytes. UserError when ``path`` exists and is not an empty folder,
    MachineError when the disk does not take it; nothing of the attempt stays behind.
    """
    target = Path(path)
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise UserError("exists already", file=target, fix="give another name, or remove it first")
    target = Path(os.path.abspath(target))
    written = 0
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        written = _write_shards(temporary, tensors, max_shard_bytes)
        files = {"config.json": _json_bytes(config), **(extra_files or {})}
        for name, content in files.items():
            if Path(name).name != name:
                raise ValueError(f"not a plain file name: {name!r}")
            (temporary / name).write_bytes(content)
        if tokenizer_saver is not None:
            tokenizer_saver(temporary)
        _sync_tree(temporary)
        if target.exists():
            target.rmdir()
        os.rename(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        raise disk_error(error, target, written) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> int:
    """Write the shards and, for more than one, the index; returns the bytes of all tensors."""
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, max_shard_bytes):
        write_safetensors(folder / f"{len(shards)}.part", shard, {"format": "pt"})
        shards.append(list(shard))
        total += sum(t.numel() * t.element_size() for t in shard.values())
    if not shards:
        raise ModelFileError("no tensors to write", file=folder)
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SINGLE_FILE)
        return total
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        shard_name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{i}.part").rename(folder / shard_name)
        if twice := weight_map.keys() & set(names):
            raise ValueError(f"tensor {min(twice)!r} given twice")
        weight_map |= dict.fromkeys(names, shard_name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_bytes(_json_bytes(index))
    return total


def _shards(tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if name in shard:
            raise ValueError(f"tensor {name!r} given twice")
        num_bytes = tensor.numel() * tensor.element_size()
        if shard and size + num_bytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += num_bytes
    if shard:
        yield shard


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)
