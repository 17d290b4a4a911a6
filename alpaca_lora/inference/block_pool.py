"""The blocks of the key/value cache as numbers: who holds them, which are free, what the full ones hold.

A full block is known by all that its keys and values depend on (`BlockContent`), so a sequence that begins as another
one did takes its blocks and computes nothing. A block that nobody holds stays known until it is needed for something
else, the one that was let go first before all others. Knows no tensors and no requests.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

BLOCK_SIZE = 16  # places: the prefix cache finds beginnings of a multiple of this, and half of one is lost per sequence


class BlockContent(NamedTuple):
    """What a full block holds. Equal contents have equal keys and values, and nothing else has.

    parent: key of the block before, empty for the first. ids: of its places. digest: of the adapter, "" for none. salt:
    of whom it was computed for.
    """

    parent: bytes
    ids: tuple[int, ...]
    digest: str
    salt: str

    @property
    def key(self) -> bytes:
        """sha256 of all of it; each part is preceded by its length, so that no two contents are the same bytes."""
        parts = (self.parent, self.digest.encode(), self.salt.encode("utf-8", "surrogatepass"))
        found = hashlib.sha256(array("q", self.ids).tobytes())
        for part in parts:
            found.update(len(part).to_bytes(8, "little"))
            found.update(part)
        return found.digest()


class BlockPool:
    """``num_blocks`` blocks of ``block_size`` places, counted references, and the contents by their keys."""

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.clear()

    def clear(self) -> None:
        """Nobody holds anything, nothing is known."""
        self._holders = [0] * self.num_blocks
        self._blank = list(range(self.num_blocks - 1, -1, -1))  # free and unknown; the last one goes first
        self._idle: dict[int, None] = {}  # free and known, in the order in which they were let go
        self._contents: dict[int, tuple[bytes, BlockContent]] = {}
        self._by_key: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, known ones among them."""
        return len(self._blank) + len(self._idle)

    @property
    def num_known(self) -> int:
        """Blocks that a sequence with the same beginning can take."""
        return len(self._by_key)

    def blocks_of(self, num_places: int) -> int:
        """How many blocks hold so many places."""
        return -(-num_places // self.block_size)

    def take(self) -> int:
        """A block to write to, with one holder. IndexError when none is free."""
        if self._blank:
            block = self._blank.pop()
        elif self._idle:
            block = next(iter(self._idle))
            del self._idle[block]
            self._unlearn(block)
        else:
            raise IndexError("no block is free")
        self._holders[block] = 1
        return block

    def find(self, key: bytes, content: BlockContent) -> int | None:
        """The block that holds ``content``, whose key is ``key``, with one holder more; None where there is none."""
        block = self._by_key.get(key)
        if block is None or self._contents[block][1] != content:
            return None
        if self._holders[block] == 0:
            del self._idle[block]
        self._holders[block] += 1
        return block

    def learn(self, block: int, key: bytes, content: BlockContent) -> None:
        """From now on `find` knows this block, unless it knows another one of the same content."""
        if key not in self._by_key and block not in self._contents:
            self._by_key[key] = block
            self._contents[block] = (key, content)

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less. Of blocks in the order of a sequence the last is let go first: without those before it
        it is of no use.
        """
        for block in reversed(list(blocks)):
            assert self._holders[block] > 0, f"block {block} has no holder"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._contents:
                    self._idle[block] = None
                else:
                    self._blank.append(block)

    def forget(self, blocks: Iterable[int] | None = None) -> None:
        """These blocks, or all of them, are not found any more; who holds them goes on."""
        for block in list(self._contents) if blocks is None else blocks:
            if block in self._idle:
                del self._idle[block]
                self._blank.append(block)
            self._unlearn(block)

    def _unlearn(self, block: int) -> None:
        known = self._contents.pop(block, None)
        if known is not None:
            del self._by_key[known[0]]

    def check(self, held: Iterable[Iterable[int]]) -> None:
        """AssertionError unless everything adds up: ``held`` are the blocks of every sequence that holds some."""
        counted = Counter(block for blocks in held for block in blocks)
        assert all(self._holders[block] == counted[block] for block in range(self.num_blocks)), "holders"
        free = {block for block in range(self.num_blocks) if not counted[block]}
        assert len(self._blank) == len(set(self._blank)), "a block is free twice"
        assert set(self._blank) | set(self._idle) == free, "free blocks"
        assert set(self._blank).isdisjoint(self._contents), "a blank block is known"
        assert set(self._idle) <= set(self._contents), "an idle block is not known"
        assert {block: key for key, block in self._by_key.items()} == {
            block: key for block, (key, _) in self._contents.items()
        }, "keys"
        assert all(
            key == content.key and len(content.ids) == self.block_size for key, content in self._contents.values()
        ), "a content does not fit its key"
