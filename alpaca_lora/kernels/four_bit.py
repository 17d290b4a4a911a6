"""Weights in four bits, decoded: W[o, i] = (table[code] - zero_b) scale_b for the block b that element (o, i) lies in.

The flat matrix (row-major) is cut into blocks of equal length; two codes lie in a byte, the high half first. Scales may
be quantized themselves (Dettmers et al. 2023, "double quantization"). In C where the library is there, else in plain
torch; both give the same bits, those of the definition in `reference.py`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from alpaca_lora.kernels.cpu.library import library


@dataclass(frozen=True, slots=True)
class BlockScales:
    """One scale for each block, float32 (blocks,); or, with ``codes``, scales in eight bits:

    scale_b = map[codes_b] * values[b // block_size] + offset;  codes uint8 (blocks,), map float32 (256,), values
    float32, one for each ``block_size`` of them, offset a scalar tensor.
    """

    values: torch.Tensor
    codes: torch.Tensor | None = None
    map: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    block_size: int = 256

    def expanded(self, first: int, last: int) -> torch.Tensor:
        """float32 scales of blocks [first, last)."""
        if self.codes is None:
            return self.values[first:last].float()
        assert self.map is not None and self.offset is not None
        start = first // self.block_size
        outer = self.values[start : -(-last // self.block_size)].repeat_interleave(self.block_size)
        outer = outer[first - start * self.block_size :][: last - first]
        return self.map[self.codes[first:last].int()] * outer + self.offset


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes below 16 of any shape -> two to a byte, (numel / 2,) rounded up, high half first."""
    flat = codes.reshape(-1)
    if flat.numel() % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    return (flat[::2] << 4) | flat[1::2]


def unpack_codes(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """The inverse of `pack_codes`: uint8 (numel,)."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).view(-1)[:numel]


def decode_four_bit(
    packed: torch.Tensor, table: torch.Tensor, scales: BlockScales, zeros: torch.Tensor | None,
    shape: tuple[int, int], block_size: int, rows: slice, columns: slice, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """W[rows, columns] in ``dtype`` (float32 or bfloat16), of a weight of ``shape`` (out, in).

    packed: uint8, all codes; table: float32 (16,); zeros: float32 (blocks,) or None.
    """
    handle = library().handle if packed.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) else None
    if handle is None:
        return decode_plain(packed, table, scales, zeros, shape, block_size, rows, columns, dtype)
    num_rows, num_columns = rows.stop - rows.start, columns.stop - columns.start
    out = torch.empty(num_rows, num_columns, dtype=dtype)
    # held until the call is over
    tensors = [
        packed,
        table,
        scales.values.float(),
        scales.codes,
        scales.map,
        zeros if zeros is None else zeros.float(),
    ]
    assert all(one is None or one.is_contiguous() for one in tensors)
    packed_at, table_at, values_at, codes_at, map_at, zeros_at = (
        None if one is None else ctypes.c_void_p(one.data_ptr()) for one in tensors
    )
    offset = 0.0 if scales.offset is None else float(scales.offset)
    numbers = [shape[1], block_size, rows.start, num_rows, columns.start, num_columns]
    handle.decode_four_bit(
        packed_at, table_at, values_at, codes_at, map_at, ctypes.c_float(offset), ctypes.c_int64(scales.block_size),
        zeros_at, *map(ctypes.c_int64, numbers), ctypes.c_void_p(out.data_ptr()), int(dtype == torch.bfloat16),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def decode_plain(
    packed: torch.Tensor, table: torch.Tensor, scales: BlockScales, zeros: torch.Tensor | None,
    shape: tuple[int, int], block_size: int, rows: slice, columns: slice, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """As `decode_four_bit`, in torch alone: whole rows are decoded, with the whole blocks that they touch."""
    first, last = rows.start * shape[1], rows.stop * shape[1]  # elements of the flat matrix
    start_block, end_block = first // block_size, -(-last // block_size)
    start, end = start_block * block_size, min(end_block * block_size, shape[0] * shape[1])
    # one look-up for each byte: both of its values at once
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1).view(torch.int64).view(-1)
    skipped = start % 2
    found = pairs.index_select(0, packed[start // 2 : -(-end // 2)].int()).view(torch.float32)
    values = found[skipped : skipped + end - start]
    padding = (end_block - start_block) * block_size - values.numel()
    if padding:
        values = torch.cat((values, values.new_zeros(padding)))
    values = values.view(-1, block_size)
    if zeros is not None:
        values = values - zeros[start_block:end_block, None].float()
    values = values * scales.expanded(start_block, end_block)[:, None]
    whole = values.view(-1)[first - start : last - start].view(-1, shape[1])
    return whole[:, columns].to(dtype).contiguous()
