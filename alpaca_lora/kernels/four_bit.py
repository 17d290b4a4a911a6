"""Weights in four bits: W[o, i] = (table[code] - zero_b) scale_b for the block b that element (o, i) lies in.

The flat matrix (row-major) is cut into blocks of equal length; two codes lie in a byte, the high half first. Scales may
be quantized themselves (Dettmers et al. 2023, "double quantization"). In C where the library is there, else in plain
torch; making and decoding give the same bits in both, those of the definition in `reference.py`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from alpaca_lora.device import scratch
from alpaca_lora.kernels.cpu.library import Library, library
from alpaca_lora.kernels.tiled import tiled_linear

TINY = 1e-38  # a block whose largest magnitude is smaller counts as it: its reciprocal is finite
LARGEST_INVERSE = 1.1e38  # reached where denormal numbers, which TINY is, count as zero
CHUNK_ELEMENTS = 2**20  # made at a time in plain torch: temporaries of 4 MB each
PIECE_ELEMENTS = 2**17  # decoded at a time in plain torch: temporaries that the cache holds
# through 4096 x 4096 on one core, 1, 4 tokens take 0.8, 1.2 ms so, 2.6 through tiles, 2.0 as dense bfloat16; 8 twice so
# take as long as through tiles
FEW_TOKENS = 4
DTYPES = (torch.float32, torch.bfloat16)  # of the ops in C


@dataclass(frozen=True, slots=True)
class BlockScales:
    """One scale for each block, float32 (blocks,); or, with ``codes``, scales in eight bits:

    scale_b = map[codes_b] * values[b // block_size] + offset;  codes uint8 (blocks,), map float32 (256,), values
    float32, one for each ``block_size`` (a power of two) of them, offset a tensor of one number.
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


class _Weight(ctypes.Structure):
    """`Weight` of cpu/four_bit.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "table", "scales", "scale_codes", "scale_map", "zeros")),
        ("offset", ctypes.c_float), ("nested_shift", ctypes.c_int32),
        ("in_features", ctypes.c_int64), ("block", ctypes.c_int64),
    )  # fmt: skip


def _weight(
    packed: torch.Tensor, table: torch.Tensor, scales: BlockScales, zeros: torch.Tensor | None, in_features: int,
    block_size: int,
) -> tuple[_Weight, list[torch.Tensor | None]]:  # fmt: skip
    """What C reads, and the tensors that it lies in: hold them until the call is over."""
    zeros = zeros if zeros is None else zeros.float()
    tensors = [packed, table, scales.values.float(), scales.codes, scales.map, zeros]
    assert all(one is None or one.is_contiguous() for one in tensors)
    addresses = [None if one is None else one.data_ptr() for one in tensors]
    offset = 0.0 if scales.offset is None else float(scales.offset)
    return _Weight(*addresses, offset, scales.block_size.bit_length() - 1, in_features, block_size), tensors


def _library(tensor: torch.Tensor, dtype: torch.dtype) -> Library | None:
    """The ops in C, where they can do this."""
    found = library() if tensor.device.type == "cpu" and dtype in DTYPES else None
    return found if found is not None and found.handle is not None else None


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
    shape: tuple[int, int], block_size: int, rows: slice, columns: slice, dtype: torch.dtype, *, reuse: bool = False,
) -> torch.Tensor:  # fmt: skip
    """W[rows, columns] in ``dtype``, of a weight of ``shape`` (out, in).

    packed: uint8, all codes; table: float32 (16,); zeros: float32 (blocks,) or None. reuse: the result may lie where
    the next such call in this thread writes.
    """
    found = _library(packed, dtype)
    if found is None:
        return decode_plain(packed, table, scales, zeros, shape, block_size, rows, columns, dtype)
    num_rows, num_columns = rows.stop - rows.start, columns.stop - columns.start
    shape_of_tile = num_rows, num_columns
    out = scratch(shape_of_tile, dtype) if reuse else torch.empty(shape_of_tile, dtype=dtype)
    weight, held = _weight(packed, table, scales, zeros, shape[1], block_size)
    found.call(
        "decode_four_bit", ctypes.byref(weight), rows.start, num_rows, columns.start, num_columns, out,
        dtype == torch.bfloat16, work=out.numel(),
    )  # fmt: skip
    del held
    return out


def decode_plain(
    packed: torch.Tensor, table: torch.Tensor, scales: BlockScales, zeros: torch.Tensor | None,
    shape: tuple[int, int], block_size: int, rows: slice, columns: slice, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """As `decode_four_bit`, in torch alone, some rows at a time."""
    # one look-up for each byte: both of its values at once, as a whole number that is never computed with
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1).view(torch.int64).view(-1)
    num_columns = columns.stop - columns.start
    out_OI = torch.empty(rows.stop - rows.start, num_columns, dtype=dtype, device=packed.device)
    fits = all(place % block_size == 0 for place in (shape[1], columns.start, columns.stop))
    decode = _decode_within if fits else _decode_across
    step = max(1, PIECE_ELEMENTS // (num_columns if fits else shape[1]))
    for start in range(rows.start, rows.stop, step):
        some = slice(start, min(start + step, rows.stop))
        out_OI[start - rows.start :][:step] = decode(packed, pairs, scales, zeros, shape, block_size, some, columns)
    return out_OI


def _decode_within(
    packed: torch.Tensor, pairs: torch.Tensor, scales: BlockScales, zeros: torch.Tensor | None,
    shape: tuple[int, int], block_size: int, rows: slice, columns: slice,
) -> torch.Tensor:  # fmt: skip
    """float32 W[rows, columns], where rows and columns consist of whole blocks."""
    bytes_OI = packed.view(shape[0], -1)[rows, columns.start // 2 : columns.stop // 2]
    values = pairs.index_select(0, bytes_OI.reshape(-1).int()).view(torch.float32)
    blocks, num_rows = shape[1] // block_size, rows.stop - rows.start
    within = slice(columns.start // block_size, columns.stop // block_size)
    first, last = rows.start * blocks, rows.stop * blocks
    some_scales = scales.expanded(first, last).view(num_rows, blocks)[:, within]
    some_zeros = None if zeros is None else zeros[first:last].view(num_rows, blocks)[:, within]
    return _scaled(values.view(num_rows, -1, block_size), some_scales, some_zeros).view(num_rows, -1)


def _decode_across(
    packed: torch.Tensor, pairs: torch.Tensor, scales: BlockScales, zeros: torch.Tensor | None,
    shape: tuple[int, int], block_size: int, rows: slice, columns: slice,
) -> torch.Tensor:  # fmt: skip
    """float32 W[rows, columns]: whole rows, with all of the blocks that they touch."""
    first, last = rows.start * shape[1], rows.stop * shape[1]  # elements of the flat matrix
    start_block, end_block = first // block_size, -(-last // block_size)
    start, end = start_block * block_size, min(end_block * block_size, shape[0] * shape[1])
    values = pairs.index_select(0, packed[start // 2 : -(-end // 2)].int()).view(torch.float32)
    values = values[start % 2 :][: end - start]
    padding = (end_block - start_block) * block_size - values.numel()
    if padding:
        values = torch.cat((values, values.new_zeros(padding)))
    some_zeros = None if zeros is None else zeros[start_block:end_block]
    values = _scaled(values.reshape(-1, block_size), scales.expanded(start_block, end_block), some_zeros)
    return values.view(-1)[first - start : last - start].view(-1, shape[1])[:, columns]


def _scaled(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """Values (..., block) and a scale and zero point for each, in place."""
    if zeros is not None:
        values = values.sub_(zeros.float()[..., None])
    return values.mul_(scales[..., None])


def four_bit_linear(
    x_TI: torch.Tensor, packed: torch.Tensor, table: torch.Tensor, scales: BlockScales, zeros: torch.Tensor | None,
    shape: tuple[int, int], block_size: int,
) -> torch.Tensor:  # fmt: skip
    """As `reference.tiled_linear` with W as in `decode_four_bit`. A few tokens are multiplied with weights in float32
    that never leave the registers; more with tiles of them, rounded to the dtype of x.
    """
    dtype = x_TI.dtype  # not read inside: the function would keep x alive until the backward pass

    def tile(rows: slice, columns: slice) -> torch.Tensor:
        return decode_four_bit(packed, table, scales, zeros, shape, block_size, rows, columns, dtype, reuse=True)

    def few(some_TI: torch.Tensor) -> torch.Tensor | None:
        return multiply_few(some_TI, packed, table, scales, zeros, shape, block_size)

    return tiled_linear(x_TI, tile, shape[0], few)


def multiply_few(
    x_TI: torch.Tensor, packed: torch.Tensor, table: torch.Tensor, scales: BlockScales, zeros: torch.Tensor | None,
    shape: tuple[int, int], block_size: int,
) -> torch.Tensor | None:  # fmt: skip
    """x W^T in the dtype of x without a decoded tile; None where C cannot do it: more than 4 tokens, blocks that
    straddle rows or are no multiple of 32.
    """
    found = _library(x_TI, x_TI.dtype)
    if found is None or not 1 <= x_TI.shape[0] <= FEW_TOKENS:
        return None
    y_TO = torch.empty(x_TI.shape[0], shape[0], dtype=x_TI.dtype)
    weight, held = _weight(packed, table, scales, zeros, shape[1], block_size)
    failed = found.call(
        "multiply_four_bit", ctypes.byref(weight), x_TI.contiguous(), x_TI.shape[0], shape[0], y_TO,
        x_TI.dtype == torch.bfloat16, work=shape[0] * shape[1],
    )  # fmt: skip
    del held
    return None if failed else y_TO


def encode_four_bit(
    values_N: torch.Tensor, table: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(codes, two to a byte, uint8 (N / 2,) rounded up; largest magnitude of each block, float32 (N / block,) rounded
    up): code of the value of ``table`` nearest to number / largest, of two as near the smaller one.

    Values of any floating dtype; a largest magnitude that is not finite says that there is such a value. The last block
    may be shorter: its arithmetic is another in the last bit, and zeros have `TINY` as scale, as bitsandbytes has it.
    """
    order = torch.argsort(table)
    bounds = (table[order[:-1]] + table[order[1:]]) / 2
    order = order.to(torch.uint8)
    whole = values_N.numel() // block_size * block_size
    packed = torch.empty(-(-values_N.numel() // 2), dtype=torch.uint8, device=values_N.device)
    largest = torch.empty(-(-values_N.numel() // block_size), dtype=torch.float32, device=values_N.device)
    found = _library(values_N, values_N.dtype)
    step = max(1, CHUNK_ELEMENTS // block_size) * block_size
    if found is not None:
        found.call(
            "encode_four_bit", values_N.contiguous(), values_N.dtype == torch.bfloat16, whole // block_size, block_size,
            bounds, order, ctypes.c_float(TINY), ctypes.c_float(LARGEST_INVERSE), packed, largest, work=whole,
        )  # fmt: skip
    for start in range(0, whole if found is None else 0, step):
        some = values_N[start : min(start + step, whole)].float().view(-1, block_size)
        most = largest[start // block_size :][: len(some)].copy_(some.abs().amax(1))
        inverse = most.clamp(min=TINY).reciprocal_().clamp_(max=LARGEST_INVERSE)
        packed[start // 2 :][: some.numel() // 2] = _codes(some * inverse[:, None], bounds, order)
    if whole < values_N.numel():
        some = values_N[whole:].float()
        largest[-1:] = some.abs().max().clamp(min=TINY)
        packed[whole // 2 :] = _codes((some / largest[-1]).nan_to_num_(0.0), bounds, order)
    return packed, largest


def _codes(scaled: torch.Tensor, bounds: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Packed codes of numbers from -1 to 1; half a byte that is left over has the code of zero."""
    flat = scaled.view(-1)
    if flat.numel() % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    return pack_codes(order.index_select(0, torch.bucketize(flat, bounds, out_int32=True)))
