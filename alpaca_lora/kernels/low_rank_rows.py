"""What adapters add to a few rows, each row its own: y += s (x A^T) B^T, in C (cpu/few_rows.c).

Small products of one row each are what processors do worst through torch: a call takes longer than its work. Here one
call does all rows of all linears that share an input, out of the adapters' own tensors. A row's numbers do not depend
on the other rows. In torch the same is done by inference/adapter_stack.py, or adapter by adapter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from alpaca_lora.kernels.cpu.library import library
from alpaca_lora.kernels.few_rows import DTYPES, FEW_ROWS

MAX_RANK = 1024  # of the linears together, in C


class _Addition(ctypes.Structure):
    """`Addition` of cpu/few_rows.c."""

    _fields_ = (
        ("b", ctypes.c_void_p), ("rank", ctypes.c_int64), ("place", ctypes.c_int64), ("scale", ctypes.c_float),
    )  # fmt: skip


class _LowRank(ctypes.Structure):
    """`LowRank` of cpu/few_rows.c."""

    _fields_ = (
        ("a", ctypes.c_void_p), ("additions", ctypes.POINTER(_Addition)), ("rank", ctypes.c_int64),
        ("num_additions", ctypes.c_int64),
    )  # fmt: skip


class LowRankRows:
    """An adapter's updates of linears that share an input, as C reads them; it holds their tensors.

    A_RD: those of all of them, one below the other; parts: (place of the linear, B^T (R, out), scale), in that order.
    ValueError for tensors that C cannot read: other dtypes, not contiguous, of ranks that do not add up.
    """

    __slots__ = ("_held", "address", "dtype", "in_features", "widths")

    def __init__(self, A_RD: torch.Tensor, parts: Sequence[tuple[int, torch.Tensor, float]]) -> None:
        tensors = [A_RD, *(B_RO for _, B_RO, _ in parts)]
        rank = sum(B_RO.shape[0] for _, B_RO, _ in parts)
        if not all(t.dtype == A_RD.dtype and t.is_contiguous() and t.device.type == "cpu" for t in tensors):
            raise ValueError("contiguous tensors of one dtype in the processor's memory")
        if A_RD.dtype not in DTYPES or rank != A_RD.shape[0] or rank > MAX_RANK:
            raise ValueError(f"{A_RD.dtype} with rank {A_RD.shape[0]} for parts of {rank}")
        additions = (_Addition * len(parts))(
            *((B_RO.data_ptr(), B_RO.shape[0], place, scale) for place, B_RO, scale in parts)
        )
        struct = _LowRank(A_RD.data_ptr(), additions, rank, len(parts))
        self._held = tensors, additions, struct
        self.address, self.dtype, self.in_features = ctypes.addressof(struct), A_RD.dtype, A_RD.shape[1]
        self.widths = {place: B_RO.shape[1] for place, B_RO, _ in parts}

    @classmethod
    def of(cls, A_RD: torch.Tensor, parts: Sequence[tuple[int, torch.Tensor, float]]) -> LowRankRows | None:
        """None where C cannot read them."""
        try:
            return cls(A_RD, parts)
        except ValueError:
            return None


def is_ready(device: torch.device) -> bool:
    """Whether `add_low_rank` can be used there."""
    return device.type == "cpu" and library().handle is not None


def add_low_rank(
    updates: Sequence[LowRankRows | None], x_TD: torch.Tensor, outputs: Sequence[torch.Tensor]
) -> None:  # fmt: skip
    """Add to row t of each output (T, out) what ``updates[t]`` says, in place. At most `FEW_ROWS` rows.

    ValueError for what does not fit together.
    """
    num_rows, in_features = x_TD.shape
    x_TD = x_TD.contiguous()
    if not 0 < num_rows <= FEW_ROWS or len(updates) != num_rows:
        raise ValueError(f"{len(updates)} updates for {num_rows} rows, of which there may be {FEW_ROWS}")
    for y_TO in outputs:
        if y_TO.dtype != x_TD.dtype or y_TO.shape[0] != num_rows or not y_TO.is_contiguous():
            raise ValueError(f"an output {tuple(y_TO.shape)} of {y_TO.dtype} for {num_rows} rows of {x_TD.dtype}")
    for one in {id(one): one for one in updates if one is not None}.values():
        fits = all(place < len(outputs) and outputs[place].shape[1] == width for place, width in one.widths.items())
        if one.dtype != x_TD.dtype or one.in_features != in_features or not fits:
            raise ValueError(f"an update of {one.in_features} inputs and {one.widths} outputs does not fit")
    addresses = (ctypes.c_void_p * num_rows)(*(None if one is None else one.address for one in updates))
    outs = (ctypes.c_void_p * len(outputs))(*(y_TO.data_ptr() for y_TO in outputs))
    widths = (ctypes.c_int64 * len(outputs))(*(y_TO.shape[1] for y_TO in outputs))
    problem = library().call(
        "add_low_rank", addresses, x_TD, num_rows, in_features, outs, widths, x_TD.dtype == torch.bfloat16,
        work=num_rows * 2**17,
    )  # fmt: skip
    if problem:
        raise MemoryError("add_low_rank found no memory for its inputs")
