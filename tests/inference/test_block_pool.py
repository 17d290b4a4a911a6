"""Blocks are counted, found again by all that is in them and by nothing less, and forgotten oldest first."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_lora.inference.block_pool import BlockContent, BlockPool


def content(*ids: int, parent: bytes = b"", digest: str = "", salt: str = "") -> BlockContent:
    return BlockContent(parent, ids, digest, salt)


def learned(pool: BlockPool, what: BlockContent) -> int:
    block = pool.take()
    pool.learn(block, what.key, what)
    return block


def test_blocks_are_handed_out_once_and_come_back() -> None:
    pool = BlockPool(3, 2)
    blocks = [pool.take() for _ in range(3)]
    assert sorted(blocks) == [0, 1, 2] and pool.num_free == 0
    with pytest.raises(IndexError):
        pool.take()
    pool.check([blocks])
    pool.release(blocks[:2])
    assert pool.num_free == 2 and pool.take() in blocks[:2]
    with pytest.raises(AssertionError, match="no holder"):
        pool.release([*blocks, blocks[2]])


def test_a_known_block_is_shared_and_survives_its_holders() -> None:
    pool, what = BlockPool(3, 2), content(1, 2)
    block = learned(pool, what)
    assert pool.find(what.key, what) == block
    pool.check([[block], [block]])
    pool.release([block])
    pool.release([block])
    assert pool.num_free == 3 and pool.num_known == 1
    assert pool.find(what.key, what) == block
    pool.check([[block]])


def test_what_was_let_go_first_is_forgotten_first_and_the_end_of_a_sequence_before_its_beginning() -> None:
    pool = BlockPool(4, 1)
    first, second = content(1), content(2)
    old = [learned(pool, first), learned(pool, second)]
    new = learned(pool, content(3))
    pool.release(old)
    pool.release([new])
    pool.take()  # the blank one
    assert pool.take() == old[1]
    assert pool.find(second.key, second) is None and pool.find(first.key, first) == old[0]
    assert pool.take() == new


def test_of_two_blocks_with_the_same_content_one_is_known() -> None:
    pool, what = BlockPool(2, 1), content(1)
    block, twin = learned(pool, what), learned(pool, what)
    assert pool.find(what.key, what) == block
    pool.release([twin])
    pool.check([[block, block]])
    assert pool.take() == twin  # not known, so nothing is lost with it


def test_a_key_that_two_contents_share_finds_only_the_one_that_is_there() -> None:
    """What would happen if sha256 had a collision: contents are compared."""
    pool, mine, other = BlockPool(2, 1), content(1), content(2)
    learned(pool, mine)
    assert pool.find(mine.key, other) is None


def test_forgotten_blocks_are_not_found_and_their_holders_go_on() -> None:
    pool, held, idle = BlockPool(3, 1), content(1), content(2)
    block, let_go = learned(pool, held), learned(pool, idle)
    pool.release([let_go])
    pool.forget([block])
    assert pool.find(held.key, held) is None
    assert pool.find(idle.key, idle) == let_go
    pool.release([let_go])
    pool.forget()
    assert pool.find(idle.key, idle) is None and pool.num_free == 2
    pool.check([[block]])
    pool.clear()
    pool.check([])


ids = st.lists(st.integers(-1, 300), min_size=1, max_size=4).map(tuple)
words = st.sampled_from(["", "a", "b", "ab", "a\x00b", "\ud800"])
contents = st.builds(BlockContent, st.binary(max_size=3), ids, words.filter(lambda word: word != "\ud800"), words)


@given(st.lists(contents, min_size=2, max_size=6, unique=True))
@settings(max_examples=300, deadline=None)
def test_contents_that_differ_have_other_keys(some: list[BlockContent]) -> None:
    assert len({one.key for one in some}) == len(some)


def test_every_part_of_a_content_counts() -> None:
    one = content(1, 2, digest="d", salt="s")
    others = [content(1, 3, digest="d", salt="s"), content(1, 2, parent=b"p", digest="d", salt="s")]
    others += [content(1, 2, digest="e", salt="s"), content(1, 2, digest="d", salt="t"), content(1, 2, digest="ds")]
    assert all(a.key != b.key for a, b in itertools.combinations([one, *others], 2))
