"""The blocks of one sequence, in the order of its places, and how far they are filled. Knows no tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alpaca_lora.inference.block_pool import BlockContent, BlockPool

VIRTUAL = -1  # the id of a place that a virtual token takes


class BlockTable:
    """``length`` places have their keys and values in the blocks, those of the step that is being run among them.

    digest and salt: of the adapter, and of whom the sequence is for (see `BlockContent`). reuse: whether blocks may be
    shared with other sequences.
    """

    def __init__(self, pool: BlockPool, digest: str = "", salt: str = "", *, reuse: bool = True) -> None:
        self.length = 0
        self._pool, self._digest, self._salt, self._reuse = pool, digest, salt, reuse
        self._blocks = np.zeros(8, np.int32)
        self._num_blocks = 0
        self._num_learned = 0
        self._keys: list[bytes] = []  # of full blocks; they outlive the blocks, for ids are only added to

    @property
    def blocks(self) -> np.ndarray:
        """int32, one number for each block; a view that later blocks do not change."""
        return self._blocks[: self._num_blocks]

    def missing(self, num_places: int) -> int:
        """How many blocks more so many places need."""
        return max(0, self._pool.blocks_of(num_places) - self._num_blocks)

    def reserve(self, num_places: int) -> None:
        """Have blocks for so many places. IndexError when the pool has none."""
        for _ in range(self.missing(num_places)):
            self._append(self._pool.take())

    def match(self, ids: Sequence[int]) -> int:
        """Take the known blocks that these places begin with, all but the last place at most, which has to be computed
        for its logits. Returns how many places they hold.
        """
        assert self._num_blocks == 0
        size = self._pool.block_size
        for index in range((len(ids) - 1) // size if self._reuse else 0):
            block = self._pool.find(*self._content(index, ids))
            if block is None:
                break
            self._append(block)
        self._num_learned = self._num_blocks
        self.length = self._num_blocks * size
        return self.length

    def advance(self, ids: Sequence[int], count: int) -> None:
        """``count`` places more are filled, by this step at the latest: full blocks can be found from now on."""
        self.length += count
        num_full = self.length // self._pool.block_size if self._reuse else 0
        while self._num_learned < num_full:
            index = self._num_learned
            self._pool.learn(int(self._blocks[index]), *self._content(index, ids))
            self._num_learned += 1

    def release(self) -> None:
        """Give all blocks back."""
        self._pool.release(self.blocks.tolist())
        self.drop()

    def forget(self) -> None:
        """What is in the blocks is not to be trusted: nobody finds them any more."""
        self._pool.forget(self.blocks.tolist())

    def drop(self) -> None:
        """Have no blocks; the pool is not told."""
        self._num_blocks = self._num_learned = self.length = 0

    def _append(self, block: int) -> None:
        if self._num_blocks == len(self._blocks):
            self._blocks = np.concatenate((self._blocks, np.zeros_like(self._blocks)))
        self._blocks[self._num_blocks] = block
        self._num_blocks += 1

    def _content(self, index: int, ids: Sequence[int]) -> tuple[bytes, BlockContent]:
        """Key and content of a full block, those before it having their keys."""
        size = self._pool.block_size
        parent = self._keys[index - 1] if index else b""
        content = BlockContent(parent, tuple(ids[index * size : (index + 1) * size]), self._digest, self._salt)
        if index == len(self._keys):
            self._keys.append(content.key)
        return self._keys[index], content
