"""Encoded rows on disk: a folder whose name is the hash of all that went into it. Knows no options and no text.

    <home>/cache/data/<key>/  tokens.i32  supervised.u1  examples.bin  events.bin  meta.json  MANIFEST.json

Written in a folder of another name, fsynced, the manifest (sizes and sha256 of the rest) last, then renamed: an entry
is there whole or not at all. Each opening checks every byte against the manifest; a damaged entry is built anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from alpaca_lora.data.files import CHUNK_BYTES
from alpaca_lora.data.ledger import EVENT_DTYPE, Ledger
from alpaca_lora.data.table import COLUMNS, EncodedRows, ExampleTable
from alpaca_lora.home import home

__all__ = ["DamagedEntry", "EntryWriter", "ExampleTable", "cache_folder", "entry_key", "open_entry"]

FORMAT = 4  # raise it when what is written, or how rows are read, cleaned or encoded, changes
_PARTS = ("tokens.i32", "supervised.u1", "examples.bin", "events.bin", "meta.json")
_MANIFEST = "MANIFEST.json"
_STALE_SECONDS = 24 * 3600


class DamagedEntry(Exception):
    """An entry that does not match its manifest; the message says where. Never reaches the user: the entry is
    rebuilt.
    """


def cache_folder() -> Path:
    """Where the entries are."""
    return home() / "data"


def entry_key(parts: Mapping[str, Any]) -> str:
    """sha256 of ``parts`` (JSON values) and of this file's FORMAT."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class EntryWriter:
    """Writes one entry: `append` per example, `finish` once; leaving the ``with`` without it removes everything.

    Raises OSError when the disk does not take it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._temporary = folder.with_name(f".tmp-{folder.name[:16]}-{uuid.uuid4().hex}")
        self._files: dict[str, _HashedFile] = {}
        self.num_examples = 0

    def __enter__(self) -> EntryWriter:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(self.folder.parent)
        self._temporary.mkdir()
        self._files = {name: _HashedFile(self._temporary / name) for name in _PARTS}
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def append(self, ids: list[np.ndarray], supervised: list[np.ndarray], columns: list[tuple[int, ...]]) -> None:
        """Some examples at once: their ids, their masks, and for each the values of COLUMNS."""
        if not columns:
            return
        self._files["tokens.i32"].write(np.concatenate(ids).astype("<i4", copy=False).tobytes())
        self._files["supervised.u1"].write(np.concatenate(supervised).astype(np.uint8).tobytes())
        self._files["examples.bin"].write(np.array(columns, COLUMNS).tobytes())
        self.num_examples += len(columns)

    def finish(self, ledger: Ledger, meta: Mapping[str, Any]) -> None:
        """Make the entry durable under its name. A second process that was faster wins: both wrote the same."""
        events, codes = ledger.event_array()
        self._files["events.bin"].write(events.tobytes())
        record = {**meta, "ledger": ledger.to_record(), "codes": codes, "rejects": ledger.rejects}
        self._files["meta.json"].write(json.dumps(record, ensure_ascii=True).encode())
        manifest = {"format": FORMAT, "files": {name: file.seal() for name, file in self._files.items()}}
        final = _HashedFile(self._temporary / _MANIFEST)
        final.write(json.dumps(manifest, indent=1).encode())
        final.seal()
        _sync_folder(self._temporary)
        try:
            os.rename(self._temporary, self.folder)
        except OSError:
            if not (self.folder / _MANIFEST).is_file():
                raise
        _sync_folder(self.folder.parent)


def open_entry(
    folder: Path, files: list[str], *, in_memory: bool = False
) -> tuple[EncodedRows, Ledger, dict[str, Any]]:
    """(rows, ledger, what else was kept) of an entry; ``files``: names of the data files now, for the ledger.

    in_memory: read the arrays instead of mapping them. Raises FileNotFoundError where there is no entry, DamagedEntry
    where one does not match its manifest.
    """
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        listed = manifest["files"]
        if manifest["format"] != FORMAT or sorted(listed) != sorted(_PARTS):
            raise DamagedEntry(f"{_MANIFEST} is of another format")
        for name in _PARTS:
            _check_part(folder / name, listed[name])
        meta = json.loads((folder / "meta.json").read_bytes())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedEntry(str(error)) from error
    ids_T = _array(folder / "tokens.i32", np.dtype("<i4"), in_memory)
    supervised_T = _array(folder / "supervised.u1", np.dtype(bool), in_memory)
    columns_N = _array(folder / "examples.bin", COLUMNS, in_memory)
    events = _array(folder / "events.bin", EVENT_DTYPE, True)
    if len(ids_T) != len(supervised_T) or len(ids_T) != int(columns_N["length"].sum(dtype=np.int64)):
        raise DamagedEntry("its parts do not fit together")
    ledger = Ledger.from_record(meta["ledger"], files, meta["rejects"], events, meta["codes"])
    return EncodedRows.of(ids_T, supervised_T, columns_N), ledger, meta


def remove_entry(folder: Path) -> None:
    """Delete a damaged entry: renamed first, so that no one opens half of it."""
    doomed = folder.with_name(f".tmp-{folder.name[:16]}-{uuid.uuid4().hex}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed by seal or by the writer)
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def seal(self) -> dict[str, Any]:
        """Flush to the disk and close: (size, hash) for the manifest."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        self._file.close()


def _check_part(path: Path, listed: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    if size != listed["bytes"]:
        raise DamagedEntry(f"{path.name} has {size:,} bytes, its manifest says {listed['bytes']:,}")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != listed["sha256"]:
        raise DamagedEntry(f"{path.name} has changed since it was written")


def _array(path: Path, dtype: np.dtype, in_memory: bool) -> np.ndarray:
    if in_memory or path.stat().st_size == 0:
        return np.fromfile(path, dtype)
    return np.memmap(path, dtype, mode="r")


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle for a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(folder: Path) -> None:
    """Delete what killed processes left behind a day ago or earlier."""
    for path in folder.glob(".tmp-*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:  # another process was faster
            continue
