"""Checkpoint folders: written whole, verified by hash, rotated; knows bytes and steps, not models.

    output_dir/checkpoint-N/    adapter_config.json  adapter_model.safetensors  alpaca_lora.json     (a PEFT folder,
    to serve from)
                                training_state.safetensors   weights and AdamW's averages, by parameter name
                                state.json                   where the run stands, and what must not change on resume
                                metrics.jsonl                the log up to here
                                MANIFEST.json                written last: size and sha256 of each file

A folder that bears the name ``checkpoint-N`` was complete when it got it; only safetensors and JSON are written or
read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from alpaca_lora.errors import ConfigError, ModelFileError
from alpaca_lora.training.durable import (
    FileRecord,
    hash_file,
    publish,
    remove_folder,
    sync_file,
    temporary_folder,
    write_file,
)
from alpaca_lora.weights.safetensors_file import write_safetensors

FORMAT_VERSION = 1
MANIFEST = "MANIFEST.json"
TENSORS = "training_state.safetensors"
STATE = "state.json"
LOG = "metrics.jsonl"
Content = bytes | Mapping[str, Tensor]  # of a file; tensors are written one by one, as safetensors
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint: its folder, its step and the content of its manifest."""

    path: Path
    step: int
    manifest: dict[str, Any]

    def state(self) -> dict[str, Any]:
        """The content of state.json."""
        return json.loads((self.path / STATE).read_text(encoding="utf-8"))

    def tensors(self) -> dict[str, Tensor]:
        """The content of training_state.safetensors, on the CPU."""
        try:
            return load_file(self.path / TENSORS)  # mapped: read where they are looked at
        except SafetensorError as error:
            raise ModelFileError(f"not a safetensors file: {error}", file=self.path / TENSORS) from error

    def log_lines(self) -> list[str]:
        """The lines of metrics.jsonl at the time."""
        return (self.path / LOG).read_text(encoding="utf-8").splitlines()


class CheckpointStore:
    """The checkpoints of one output folder. ``keep``: how many of the newest stay, at least two of them good."""

    def __init__(self, folder: Path, *, keep: int = 3) -> None:
        self.folder, self.keep = folder, max(2, keep)

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Steps of all checkpoint folders, good or not, newest first."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def save(
        self, step: int, files: Mapping[str, Content], *, about: Mapping[str, Any],
        write_adapter: Callable[[Path], None] | None = None, pinned: Collection[int] = (),
    ) -> Checkpoint:  # fmt: skip
        """Write ``files`` and what ``write_adapter(folder)`` puts beside them as the checkpoint of ``step``, then
        rotate.

        ``about`` goes into the manifest. ``pinned`` steps are not rotated away. Raises OSError, and then leaves
        nothing behind.
        """
        temporary = temporary_folder(self.folder, f"step-{step}")
        try:
            if write_adapter is not None:
                write_adapter(temporary)
            records: dict[str, FileRecord] = {}
            for path in sorted(temporary.iterdir()):
                sync_file(path)
                records[path.name] = hash_file(path)
            for name, data in files.items():
                records[name] = _write(temporary / name, data)
            manifest = {"format_version": FORMAT_VERSION, "step": step, **about}
            manifest["files"] = {name: asdict(record) for name, record in sorted(records.items())}
            manifest["sha256"] = _manifest_digest(manifest)
            write_file(temporary / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode())
            publish(temporary, self.path(step))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        try:
            checkpoint = verify(self.path(step))
        except ModelFileError as error:  # the disk did not keep what it was given: as bad as a failed write
            raise OSError(errno.EIO, f"read back differently: {error}") from error
        self._rotate(keep={step, *pinned})
        return checkpoint

    def newest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest good checkpoint. Damaged ones before it are renamed ``.corrupt``, said aloud, and passed over.

        None when there never was one; ModelFileError when all are damaged.
        """
        damaged: list[ModelFileError] = []
        for step in self.steps():
            try:
                return verify(self.path(step))
            except ModelFileError as error:
                damaged.append(error)
                aside = _free_name(self.path(step).with_name(f"checkpoint-{step}.corrupt"))
                os.rename(self.path(step), aside)
                say(f"checkpoint-{step} is damaged ({error}); renamed to {aside.name}, trying the one before")
        if damaged or list(self.folder.glob("checkpoint-*.corrupt*")):
            raise ModelFileError(
                "every checkpoint is damaged" + (f": {damaged[0]}" if damaged else ""), file=self.folder,
                field="resume_from_checkpoint", fix="start anew with --fresh",
            )  # fmt: skip
        return None

    def _rotate(self, keep: set[int]) -> None:
        """Delete all but the newest; a folder that lost a file since does not count as one of the two good ones."""
        good = [step for step in self.steps() if _looks_whole(self.path(step))]
        keep = keep | set(good[: self.keep])
        for step in self.steps():
            if step not in keep:
                remove_folder(self.path(step))


def verify(path: Path) -> Checkpoint:
    """Read every file of a checkpoint against its manifest. ModelFileError naming the first file that is not as
    written.
    """
    manifest_path = path / MANIFEST
    try:
        manifest = json.loads(manifest_path.read_bytes())
    except FileNotFoundError:
        raise ModelFileError("missing", file=manifest_path, expected="a checkpoint folder") from None
    except ValueError as error:
        raise ModelFileError(f"not JSON: {error}", file=manifest_path) from error
    except OSError as error:
        raise ModelFileError(f"cannot be read: {error.strerror}", file=manifest_path) from error
    if not isinstance(manifest, dict) or manifest.get("sha256") != _manifest_digest(manifest):
        raise ModelFileError("changed since it was written", file=manifest_path)
    if manifest["format_version"] != FORMAT_VERSION:
        raise ConfigError(
            f"written in format {manifest['format_version']}", file=manifest_path, expected=f"format {FORMAT_VERSION}",
            fix="resume with the version of alpaca-lora that wrote it",
        )  # fmt: skip
    for name, expected in manifest["files"].items():
        file = path / Path(name).name
        if not file.is_file():
            raise ModelFileError("missing", file=file)
        if file.stat().st_size != expected["size"]:
            raise ModelFileError(f"{file.stat().st_size} bytes", file=file, expected=f"{expected['size']}")
        try:
            digest = hash_file(file).sha256
        except OSError as error:
            raise ModelFileError(f"cannot be read: {error.strerror}", file=file) from error
        if digest != expected["sha256"]:
            raise ModelFileError("changed since it was written (sha256 differs)", file=file)
    return Checkpoint(path, int(manifest["step"]), manifest)


def _write(path: Path, content: Content) -> FileRecord:
    if isinstance(content, bytes):
        return write_file(path, content)
    digest = write_safetensors(path, content)
    return FileRecord(path.stat().st_size, digest)


def size_of(content: Content) -> int:
    """Bytes of a file's content."""
    return len(content) if isinstance(content, bytes) else sum(t.numel() * t.element_size() for t in content.values())


def _looks_whole(path: Path) -> bool:
    """All files there with their sizes: no hashing of old checkpoints at each save."""
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
        return all((path / name).stat().st_size == record["size"] for name, record in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _manifest_digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _free_name(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
