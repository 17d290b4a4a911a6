"""Where AdamW keeps its two running averages, of gradients and of their squares, over one flat buffer of weights.

    float32   8 bytes for each number, in memory
    int8      2 bytes: a code of the dynamic map and a share of the block's scale (Dettmers et al. 2022, "8-bit
              Optimizers via Block-wise Quantization"), blocks of 256; an update takes a part of them out, in float32,
              and quantizes it again, so nothing dense stays
    disk      none that stays: float32 in a file that is mapped into memory; a part is given back after its update, and
              the system writes it out when it wants to

Knows numbers and places, no parameters.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from alpaca_lora.errors import MachineError
from alpaca_lora.quantization.dynamic_map import dequantize_blockwise, dynamic_map, quantize_blockwise

Kind = Literal["float32", "int8", "disk"]
BLOCK = 256
NAMES = ("exp_avg", "exp_avg_sq")  # torch's names of both
SCALES = "scales"
SIGNED = (True, False)


class Averages(ABC):
    """Both averages of ``count`` numbers, zero at first. A part is a slice that begins at a multiple of `BLOCK`."""

    def __init__(self, count: int, device: torch.device, folder: Path | None) -> None:
        """``folder``: for files; None: the system's folder for temporary ones."""
        self.count, self.device, self.folder = count, device, folder

    def empty(self, count: int) -> Averages:
        """Of the same kind, of ``count`` numbers, all zero."""
        return type(self)(count, self.device, self.folder)

    @abstractmethod
    def read(self, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, square) of a part in float32; may be changed, and given to `write`."""

    @abstractmethod
    def write(self, part: slice, mean: torch.Tensor, square: torch.Tensor) -> None:
        """Put a part in its place."""

    @abstractmethod
    def tensors(self, part: slice, shape: torch.Size) -> Mapping[str, torch.Tensor]:
        """All that is kept of a part of this ``shape``, by name: views, exactly as they go into a checkpoint."""

    def release(self) -> None:  # noqa: B027
        """Give memory back that looking at `tensors` took."""


class InMemory(Averages):
    """float32."""

    def __init__(self, count: int, device: torch.device, folder: Path | None) -> None:
        super().__init__(count, device, folder)
        self.mean, self.square = (torch.zeros(count, dtype=torch.float32, device=device) for _ in NAMES)

    def read(self, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mean[part], self.square[part]

    def write(self, part: slice, mean: torch.Tensor, square: torch.Tensor) -> None:
        for flat, values in ((self.mean, mean), (self.square, square)):
            if values.data_ptr() != flat[part].data_ptr():  # else it was changed in place
                flat[part].copy_(values)

    def tensors(self, part: slice, shape: torch.Size) -> Mapping[str, torch.Tensor]:
        return dict(zip(NAMES, (self.mean[part].view(shape), self.square[part].view(shape)), strict=True))


class InEightBits(Averages):
    """codes uint8, one for each number; scales float32, one for each block. The square's map has no negative values."""

    def __init__(self, count: int, device: torch.device, folder: Path | None) -> None:
        super().__init__(count, device, folder)
        blocks = -(-count // BLOCK)
        # the code of zero, also between the parts: what is never written there counts in a block's largest
        zeros = (int(dynamic_map(signed).abs().argmin()) for signed in SIGNED)
        self.codes = [torch.full((count,), zero, dtype=torch.uint8, device=device) for zero in zeros]
        self.scales = [torch.zeros(blocks, dtype=torch.float32, device=device) for _ in NAMES]

    def read(self, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        mean, square = (
            dequantize_blockwise(codes[part], scales[_blocks(part)], BLOCK, signed)
            for codes, scales, signed in zip(self.codes, self.scales, SIGNED, strict=True)
        )
        return mean, square

    def write(self, part: slice, mean: torch.Tensor, square: torch.Tensor) -> None:
        for i, (values, signed) in enumerate(zip((mean, square), SIGNED, strict=True)):
            codes, self.scales[i][_blocks(part)] = quantize_blockwise(values.contiguous(), BLOCK, signed)
            if not signed:
                # a square that was rounded to zero would make the update hundreds of times too large
                codes.clamp_(min=1).mul_(values > 0)
            self.codes[i][part] = codes

    def tensors(self, part: slice, shape: torch.Size) -> Mapping[str, torch.Tensor]:
        found = {name: codes[part].view(shape) for name, codes in zip(NAMES, self.codes, strict=True)}
        return found | {
            f"{name}_{SCALES}": scales[_blocks(part)] for name, scales in zip(NAMES, self.scales, strict=True)
        }


class OnDisk(Averages):
    """float32 in a file without a name, so that nothing stays behind, however the process ends."""

    def __init__(self, count: int, device: torch.device, folder: Path | None) -> None:
        """MachineError when the disk has no room for all of it."""
        super().__init__(count, device, folder)
        size = max(1, count) * 4
        where = folder or Path(tempfile.gettempdir())
        try:
            where.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=where) as file:
                # taken now: a page that finds no room later would kill the process
                os.posix_fallocate(file.fileno(), 0, 2 * size)
                self._map = mmap.mmap(file.fileno(), 2 * size)
        except OSError as error:
            raise MachineError(
                f"cannot hold the optimizer's state: {error.strerror}", file=where, field="optimizer_state",
                fix=f"{2 * size:,} bytes are needed; make room, or set it to int8",
            ) from error  # fmt: skip
        self._mean, self._square = (
            torch.frombuffer(self._map, dtype=torch.float32, count=count, offset=at) if count else torch.zeros(0)
            for at in (0, size)
        )
        self._starts = (0, size)

    def read(self, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return self._mean[part].to(self.device), self._square[part].to(self.device)

    def write(self, part: slice, mean: torch.Tensor, square: torch.Tensor) -> None:
        for flat, values in ((self._mean, mean), (self._square, square)):
            if values.data_ptr() != flat[part].data_ptr():
                flat[part].copy_(values)
        self._give_back(part)

    def tensors(self, part: slice, shape: torch.Size) -> Mapping[str, torch.Tensor]:
        return dict(zip(NAMES, (self._mean[part].view(shape), self._square[part].view(shape)), strict=True))

    def release(self) -> None:
        self._give_back(slice(0, self.count))

    def _give_back(self, part: slice) -> None:
        """Take the part's pages out of the process; what was written stays in the file."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for start in self._starts:
            first = (start + 4 * part.start) // mmap.PAGESIZE * mmap.PAGESIZE
            last = start + 4 * part.stop
            if last > first:
                self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


KINDS: Mapping[str, type[Averages]] = {"float32": InMemory, "int8": InEightBits, "disk": OnDisk}


def _blocks(part: slice) -> slice:
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))
