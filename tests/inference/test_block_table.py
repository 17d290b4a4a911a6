"""A sequence's blocks in the order of its places: found, filled, shared, given back."""

from __future__ import annotations

import numpy as np
import pytest

from alpaca_lora.inference.block_pool import BlockPool
from alpaca_lora.inference.block_table import VIRTUAL, BlockTable

SIZE = 4


def filled(pool: BlockPool, ids: list[int], digest: str = "", salt: str = "") -> BlockTable:
    table = BlockTable(pool, digest, salt)
    table.match(ids)
    table.reserve(len(ids))
    table.advance(ids, len(ids) - table.length)
    return table


@pytest.mark.parametrize(("num_places", "num_found"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_one_place_is_always_left_to_compute(num_places: int, num_found: int) -> None:
    pool, ids = BlockPool(10, SIZE), list(range(12))
    first = filled(pool, ids)
    again = BlockTable(pool)
    assert again.match(ids[:num_places]) == num_found == again.length
    assert again.blocks.tolist() == first.blocks[: num_found // SIZE].tolist()
    pool.check([first.blocks.tolist(), again.blocks.tolist()])


def test_only_the_common_beginning_is_found() -> None:
    pool = BlockPool(20, SIZE)
    filled(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert BlockTable(pool).match([1, 2, 3, 4, 5, 6, 7, 0, 9]) == 4
    assert BlockTable(pool).match([0, 2, 3, 4, 5, 6, 7, 8, 9]) == 0
    # the same ids behind another beginning are not the same places
    assert BlockTable(pool).match([5, 6, 7, 8, 9]) == 0


@pytest.mark.parametrize(
    ("digest", "salt"), [("other", "tenant"), ("adapter", "other"), ("", "tenant"), ("adapter", "")]
)
def test_nobody_finds_the_blocks_of_another_adapter_or_tenant(digest: str, salt: str) -> None:
    pool, ids = BlockPool(20, SIZE), list(range(9))
    filled(pool, ids, "adapter", "tenant")
    assert BlockTable(pool, digest, salt).match(ids) == 0
    assert BlockTable(pool, "adapter", "tenant").match(ids) == 8


def test_virtual_places_are_places() -> None:
    pool = BlockPool(20, SIZE)
    ids = [VIRTUAL] * 6 + [1, 2, 3]
    filled(pool, ids, "prefix")
    assert BlockTable(pool, "prefix").match([VIRTUAL] * 6 + [7, 8, 9]) == 4
    assert BlockTable(pool, "prefix").match(ids) == 8
    assert BlockTable(pool, "another").match(ids) == 0


def test_blocks_are_known_when_they_are_full_and_not_before() -> None:
    pool, ids = BlockPool(4, SIZE), list(range(8))
    table = BlockTable(pool)
    table.reserve(8)
    assert table.missing(8) == 0 and table.missing(9) == 1
    table.advance(ids, 3)
    assert pool.num_known == 0
    table.advance(ids, 2)
    assert pool.num_known == 1
    table.advance(ids, 3)
    assert pool.num_known == 2


def test_a_table_that_was_given_back_finds_its_blocks_again() -> None:
    pool, ids = BlockPool(4, SIZE), list(range(10))
    table = filled(pool, ids)
    blocks = table.blocks.tolist()
    table.release()
    assert table.length == 0 and pool.num_free == 4
    assert table.match(ids) == 8 and table.blocks.tolist() == blocks[:2]


def test_a_table_without_reuse_neither_finds_nor_is_found() -> None:
    pool, ids = BlockPool(20, SIZE), list(range(9))
    alone = BlockTable(pool, reuse=False)
    alone.reserve(9)
    alone.advance(ids, 9)
    assert pool.num_known == 0
    filled(pool, ids)
    assert BlockTable(pool, reuse=False).match(ids) == 0


def test_views_of_the_blocks_stay_as_they_were() -> None:
    pool = BlockPool(100, SIZE)
    table = BlockTable(pool)
    table.reserve(SIZE)
    before = table.blocks
    table.reserve(60 * SIZE)
    assert before.dtype == np.int32 and before.tolist() == table.blocks[:1].tolist() and len(table.blocks) == 60
