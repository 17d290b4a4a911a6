"""Files that are whole or absent after a crash: hash while writing, fsync, rename. Knows bytes and folders, not what
they mean.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

CHUNK = 4 << 20
TEMPORARY = ".tmp-"  # every name that begins so is nobody's and may be deleted by the holder of the folder's lock


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a manifest says of a file."""

    size: int
    sha256: str


def write_file(path: Path, data: bytes) -> FileRecord:
    """Write, flush and fsync ``data``; the digest is of what was handed to the system, so a reader can tell what the
    disk did.
    """
    digest, view = hashlib.sha256(), memoryview(data)
    with open(path, "xb") as file:
        for start in range(0, len(view), CHUNK):
            chunk = view[start : start + CHUNK]
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), digest.hexdigest())


def hash_file(path: Path) -> FileRecord:
    """Size and digest as read."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def sync_file(path: Path) -> None:
    """Make durable what somebody else wrote, file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_folder(parent: Path, name: str) -> Path:
    """A new, empty ``.tmp-NAME-<uuid>`` in ``parent``, which is made if it is not there."""
    folder = parent / f"{TEMPORARY}{name}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    return folder


def publish(temporary: Path, final: Path) -> None:
    """Give a finished folder its name, durably. What had the name before is moved away first and then deleted."""
    sync_file(temporary)
    if final.exists():
        remove_folder(final)
    os.rename(temporary, final)
    sync_file(final.parent)


def remove_folder(folder: Path) -> None:
    """Delete so that no half of it ever bears its name."""
    doomed = folder.with_name(f"{TEMPORARY}removed-{uuid.uuid4().hex[:8]}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def remove_temporaries(parent: Path) -> list[str]:
    """Delete what dead runs left half done; their names. Call only while holding the folder's lock."""
    dead = sorted(parent.glob(f"{TEMPORARY}*"))
    for path in dead:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in dead]


def replace_file(path: Path, data: bytes) -> None:
    """Atomically put ``data`` in the place of what is at ``path``."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        write_file(temporary, data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def probe(folder: Path, size: int) -> None:
    """Prove that ``size`` bytes can be written here now: statvfs, then a real write. OSError where they cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(28, f"No space left on device ({free} bytes free)")
    trial = temporary_folder(folder, "probe")
    try:
        write_file(trial / "probe", b"\0" * 4096)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
