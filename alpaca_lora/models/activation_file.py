"""What layers keep for their backward pass, in a file instead of in memory: each tensor is written when the forward
pass saves it and read when the backward pass asks for it, byte for byte.

A step of a billion parameters takes seconds, and in them a disk takes gigabytes; making an activation again takes a
product. The file has no name, so nothing stays behind, however the process ends, and each step writes over the last.
Knows tensors and bytes, not models.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import BinaryIO

import torch

from alpaca_lora.errors import MachineError

SMALLEST = 1 << 16  # bytes; what is smaller stays in memory
READ_AHEAD = (
    1 << 27
)  # bytes that the system is asked for before they are: a layer of LLaMA-7B at 1,024 tokens has 94 MB


class StoredTensor:
    """A tensor in the file, for as long as this lives."""

    __slots__ = ("device", "dtype", "file", "shape", "start", "stride")

    def __init__(self, file: ActivationFile, tensor: torch.Tensor, start: int) -> None:
        self.file, self.start, self.device = file, start, tensor.device
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.stride = tensor.stride() if is_dense(tensor) else None

    def read(self) -> torch.Tensor:
        return self.file.read(self)

    def __del__(self) -> None:
        self.file.forget()


class ActivationFile:
    """Room in ``folder``, or in the nearest folder above it that there is. ``num_written``: bytes, of all steps."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.num_written = folder, 0
        self._file: BinaryIO | None = None
        self._end = self._num_stored = self._asked_from = 0

    def write(self, tensor: torch.Tensor) -> StoredTensor:
        """MachineError when the disk does not take it."""
        flat = _flat(tensor.detach()).cpu().view(torch.uint8).numpy()
        stored = StoredTensor(self, tensor, self._end)
        self._num_stored += 1
        try:
            if self._file is None:
                self._file = _open(self.folder)
            done = 0
            while done < flat.nbytes:  # one call takes at most 2 GiB
                done += os.pwrite(self._file.fileno(), flat[done:].data, self._end + done)
        except OSError as error:
            raise MachineError(
                f"cannot hold what layers keep for the backward pass: {error.strerror}", file=self.folder,
                field="gradient_checkpointing", fix="make room, or set it to auto",
            ) from error  # fmt: skip
        self._end += flat.nbytes
        self._asked_from = self._end
        self.num_written += flat.nbytes
        return stored

    def read(self, stored: StoredTensor) -> torch.Tensor:
        """The tensor as it was; a dense one with its strides. MachineError when the disk does not give it."""
        assert self._file is not None
        self._ask_ahead(stored.start)
        flat = torch.empty(stored.shape.numel(), dtype=stored.dtype)
        room, done = flat.view(torch.uint8).numpy(), 0
        while done < room.nbytes:
            try:
                count = os.preadv(self._file.fileno(), [room[done:].data], stored.start + done)
            except OSError as error:
                raise MachineError(f"cannot read an activation back: {error.strerror}", file=self.folder) from error
            if count == 0:
                raise MachineError("the file of activations has become shorter", file=self.folder)
            done += count
        flat = flat.to(stored.device)
        return flat.view(stored.shape) if stored.stride is None else flat.as_strided(stored.shape, stored.stride)

    def forget(self) -> None:
        """A stored tensor is gone; with the last one the file begins anew."""
        self._num_stored -= 1
        if self._num_stored == 0:
            self._end = 0

    def _ask_ahead(self, start: int) -> None:
        """Backward passes go through the file from its end to its beginning, which no system foresees."""
        if hasattr(os, "posix_fadvise") and self._file is not None and start - READ_AHEAD // 2 < self._asked_from:
            first = max(0, start - READ_AHEAD)
            if first < self._asked_from:
                size = self._asked_from - first
                os.posix_fadvise(self._file.fileno(), first, size, os.POSIX_FADV_WILLNEED)
                self._asked_from = first

    def __deepcopy__(self, _: object) -> ActivationFile:
        return ActivationFile(self.folder)

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self._file.close()  # pyright: ignore[reportOptionalMemberAccess]


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its numbers lie side by side in memory, in whatever order."""
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    if is_dense(tensor):
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.contiguous().view(-1)


def _open(folder: Path) -> BinaryIO:
    found = next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
    return tempfile.TemporaryFile(dir=found, buffering=0)
