"""A matrix of which only rows are wanted, such as the token embedding: it stays in its file.

As a tensor it is a private map of the file: no memory until it is touched, and writing to it changes memory alone. Rows
are read by offset, not through the map, which would keep every page that it once saw, and their neighbours.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import torch

from alpaca_lora.errors import ModelFileError


class FileRows:
    """``weight`` (rows, width), and `read` for some rows of it; the file stays open while this lives."""

    def __init__(
        self, path: str | os.PathLike[str], name: str, start: int, shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        """``start``: of the tensor's bytes in the file. ModelFileError when the file cannot be opened."""
        self.path, self.name, self.start = path, name, start
        self.num_rows, self.width = shape
        self.dtype, self._row_bytes = dtype, self.width * dtype.itemsize
        first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = start - first + self.num_rows * self._row_bytes
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - as long as the matrix
            self._map = mmap.mmap(self._file.fileno(), length, access=mmap.ACCESS_COPY, offset=first)
        except (OSError, ValueError) as error:
            raise ModelFileError(f"cannot be read: {error}", file=path, field=name) from error
        flat = torch.frombuffer(self._map, dtype=dtype, count=self.num_rows * self.width, offset=start - first)
        self.weight = flat.view(self.num_rows, self.width)

    def read(self, ids_N: torch.Tensor) -> torch.Tensor:
        """(N, width), row ids_N[i] of the file at i. ModelFileError when the file has become shorter."""
        ids = ids_N.tolist()
        out_ND = torch.empty(len(ids), self.width, dtype=self.dtype)
        rows, size = out_ND.view(torch.uint8).numpy(), self._row_bytes
        place_of: dict[int, int] = {}
        for place, row in enumerate(ids):
            if not 0 <= row < self.num_rows:
                raise IndexError(f"row {row} of {self.num_rows}")
            if (before := place_of.setdefault(row, place)) != place:
                rows[place] = rows[before]
            elif os.preadv(self._file.fileno(), [rows[place].data], self.start + row * size) != size:
                raise ModelFileError("the file ends inside of this tensor", file=self.path, field=self.name)
        return out_ND

    def release(self) -> None:
        """Give back the memory that looking at ``weight`` took. Whoever has written to it loses that."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def __deepcopy__(self, _: object) -> FileRows:
        return self  # nothing in it changes

    def __del__(self) -> None:
        if (file := getattr(self, "_file", None)) is not None:
            file.close()
