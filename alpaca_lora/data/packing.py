"""Which segments share a micro-batch: pure functions over lengths. Knows no tokens, seeds or epochs.

Best fit decreasing never uses more than 11/9 of the fewest bins plus one (Johnson 1973); nothing is cut and nothing
padded, so the budget is all that is lost: a bin is at most ``budget`` tokens long, unless one segment alone is
longer.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

# Processors' product kernels are compiled for each number of rows: a stream of every length kept 25 MB a step of them,
# and spent a tenth of its time on compiling. So the tokens of a stream are rounded up to a multiple of this.
ROUND_TO = 64


def pack_best_fit(lengths: Sequence[int] | np.ndarray, budget: int) -> list[list[int]]:
    """Bins of positions into ``lengths``, each of at most ``budget`` tokens; a longer segment has a bin of its own.

    Every position is in exactly one bin. Longest first, each into the fullest bin that still takes it: O(n log n).
    """
    _check_budget(budget)
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for position in _longest_first(lengths):
        length = int(lengths[position])
        at = bisect_left(rooms, (length, -1))
        if at < len(rooms):
            room, number = rooms.pop(at)
        else:
            room, number = budget, len(bins)
            bins.append([])
        bins[number].append(position)
        if room > length:
            insort(rooms, (room - length, number))
    return bins


def pack_by_length(lengths: Sequence[int] | np.ndarray, budget: int) -> list[list[int]]:
    """Like `pack_best_fit`, but neighbours in length share a bin: fill a bin longest first, then open the next."""
    _check_budget(budget)
    bins: list[list[int]] = []
    room = -1
    for position in _longest_first(lengths):
        length = int(lengths[position])
        if length > room:
            bins.append([])
            room = budget
        bins[-1].append(position)
        room -= length
    return bins


def _longest_first(lengths: Sequence[int] | np.ndarray) -> list[int]:
    return np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()


def _check_budget(budget: int) -> None:
    if budget < 1:
        raise ValueError(f"a token budget of {budget}: at least 1")
