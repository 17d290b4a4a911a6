"""Whatever comes, goes, is cut or gives up: each place of each sequence holds what was computed for exactly it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from alpaca_lora.inference.block_pool import BlockPool
from alpaca_lora.inference.block_table import BlockTable
from alpaca_lora.inference.request import Request, SamplingParams
from alpaca_lora.inference.scheduler import Chunk, Scheduler
from alpaca_lora.inference.sequence import Sequence
from tests.tiny import ByteTokenizer

TOKENIZER: Any = ByteTokenizer()
SIZE = 4


def never(sequence: Sequence, first: int) -> None:
    raise AssertionError("nothing has virtual tokens here")


def sequence_of(
    pool: BlockPool, index: int, prompt: tuple[int, ...], *, max_tokens: int = 20, digest: str = "", salt: str = "",
    num_virtual: int = 0,
) -> Sequence:  # fmt: skip
    return Sequence(
        index, Request(prompt, SamplingParams(max_new_tokens=max_tokens)), TOKENIZER, BlockTable(pool, digest, salt),
        max_tokens=max_tokens, device=torch.device("cpu"), num_virtual=num_virtual,
    )  # fmt: skip


def counts(chunks: list[Chunk]) -> list[tuple[int, int, int]]:
    return [(chunk.sequence.index, chunk.start, chunk.count) for chunk in chunks]


def setup(num_blocks: int = 100, *lengths: int, **options: Any) -> tuple[Scheduler, list[Sequence], BlockPool]:
    pool = BlockPool(num_blocks, SIZE)
    scheduler = Scheduler(pool, never, **{"max_running": 8, "step_tokens": 16, **options})
    sequences = [
        sequence_of(pool, i, tuple(range(100 * i, 100 * i + n)), max_tokens=200) for i, n in enumerate(lengths)
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    return scheduler, sequences, pool


def push(chunks: list[Chunk]) -> None:
    """A token for each that computed all it had."""
    for sequence, start, count in chunks:
        if start + count == len(sequence.ids):
            sequence.push(65)


# --- one by one


def test_prompts_are_cut_by_the_budget_and_each_decoding_sequence_has_its_token() -> None:
    scheduler, _, _ = setup(100, 5, 30, 4)
    chunks = scheduler.schedule()
    assert counts(chunks) == [(0, 0, 5), (1, 0, 11)]
    push(chunks)
    chunks = scheduler.schedule()
    assert counts(chunks) == [(0, 5, 1), (1, 11, 15)]
    push(chunks)
    # 26 of 30 are there; what the prompt leaves is for the one that waits
    chunks = scheduler.schedule()
    assert counts(chunks) == [(0, 6, 1), (1, 26, 4), (2, 0, 4)]
    push(chunks)
    assert counts(scheduler.schedule()) == [(0, 7, 1), (1, 30, 1), (2, 4, 1)]


def test_no_more_run_than_may_and_those_that_wait_keep_their_order() -> None:
    scheduler, sequences, _ = setup(100, 3, 3, 3, max_running=2)
    push(scheduler.schedule())
    assert [s.index for s in scheduler.running] == [0, 1]
    scheduler.remove(sequences[0])
    assert counts(scheduler.schedule()) == [(1, 3, 1), (2, 0, 3)]


def test_the_youngest_gives_up_and_comes_back_first() -> None:
    scheduler, sequences, pool = setup(6, 7, 7, 5)  # two blocks each and one to spare for whoever runs
    push(scheduler.schedule())
    assert [s.index for s in scheduler.running] == [0, 1]  # the third would leave no block for the two
    push(scheduler.schedule())
    assert pool.num_free == 2
    push(scheduler.schedule())
    for _ in range(4):  # the places 8 to 12 of both: both take a third block, then the last is gone
        push(scheduler.schedule())
    assert scheduler.num_preemptions == 1 and [s.index for s in scheduler.running] == [0]
    assert [s.index for s in scheduler.waiting] == [1, 2]
    scheduler.remove(sequences[0])
    chunks = scheduler.schedule()
    # its full blocks were still known
    assert counts(chunks)[0] == (1, 8, len(sequences[1].ids) - 8)
    pool.check([s.table.blocks.tolist() for s in sequences if s is not sequences[0]])


def test_a_prompt_that_is_never_cut_takes_a_step_of_its_own() -> None:
    scheduler, _, _ = setup(100, 40, 40, max_running=1, cuts_prompts=False)
    assert counts(scheduler.schedule()) == [(0, 0, 40)]


def test_equal_prompts_of_one_step_are_computed_once() -> None:
    pool = BlockPool(100, SIZE)
    scheduler = Scheduler(pool, never, max_running=8, step_tokens=64)
    for index in range(3):
        scheduler.add(sequence_of(pool, index, tuple(range(10))))
    assert counts(scheduler.schedule()) == [(0, 0, 10), (1, 8, 2), (2, 8, 2)]
    assert (scheduler.prompt_tokens, scheduler.cached_tokens) == (30, 16)


def test_virtual_tokens_are_stored_once_before_they_are_read() -> None:
    pool, stored = BlockPool(100, SIZE), []
    scheduler = Scheduler(pool, lambda s, first: stored.append((s.index, first)), max_running=8, step_tokens=64)
    for index, start in enumerate((0, 50)):
        scheduler.add(sequence_of(pool, index, tuple(range(start, start + 5)), digest="prefix", num_virtual=6))
    # of six places one block is full and shared; the others lie in the block where the prompt begins
    assert counts(scheduler.schedule()) == [(0, 6, 5), (1, 6, 5)]
    assert stored == [(0, 0), (1, 4)]
    assert [s.num_cached for s in scheduler.running] == [0, 0]


def test_after_a_step_that_broke_off_all_begin_again() -> None:
    scheduler, sequences, pool = setup(100, 5, 30, 4)
    push(scheduler.schedule())
    scheduler.restart(sequences)
    pool.check([])
    assert pool.num_known == 0
    assert counts(scheduler.schedule()) == [(0, 0, 6), (1, 0, 10)]


# --- all together

# mostly with a common beginning, so that there is something to find
PROMPTS = st.builds(
    lambda common, own: (0,) * common + tuple(own), st.integers(1, 20), st.lists(st.integers(0, 1), max_size=4)
)
NUM_VIRTUAL = {"": 0, "a": 0, "b": 3, "c": 3}  # of the adapter of each name


class Machine(RuleBasedStateMachine):
    """A cache that remembers for each place what was computed there: adapter, tenant, and all ids up to it."""

    @initialize(num_blocks=st.integers(8, 30), max_running=st.integers(1, 5), more=st.integers(0, 20))
    def begin(self, num_blocks: int, max_running: int, more: int) -> None:
        self.pool = BlockPool(num_blocks, SIZE)
        self.step_tokens = max_running + more
        self.scheduler = Scheduler(self.pool, self.fill, max_running=max_running, step_tokens=self.step_tokens)
        self.memory: dict[int, tuple[str, str, tuple[int, ...]]] = {}
        self.sequences: dict[int, tuple[Sequence, str, str]] = {}
        self.done: dict[int, int] = {}
        self.version = {name: name and f"{name}1" for name in NUM_VIRTUAL}
        self.num_added = 0

    def key_digest(self, digest: str) -> str:
        return digest

    def write(self, sequence: Sequence, start: int, count: int) -> None:
        _, digest, salt = self.sequences[sequence.index]
        for place in range(start, start + count):
            where = int(sequence.table.blocks[place // SIZE]) * SIZE + place % SIZE
            self.memory[where] = (digest, salt, tuple(sequence.ids[: place + 1]))

    def fill(self, sequence: Sequence, first: int) -> None:
        self.write(sequence, first, sequence.num_virtual - first)

    @rule(
        prompt=PROMPTS,
        name=st.sampled_from(sorted(NUM_VIRTUAL)),
        salt=st.sampled_from(["", "x"]),
        most=st.integers(1, 12),
    )
    def add(self, prompt: tuple[int, ...], name: str, salt: str, most: int) -> None:
        num_virtual = NUM_VIRTUAL[name]
        if self.pool.blocks_of(num_virtual + len(prompt) + most - 1) > self.pool.num_blocks:
            return
        index, digest = self.num_added, self.version[name]
        self.num_added += 1
        sequence = sequence_of(
            self.pool, index, prompt, max_tokens=most, digest=self.key_digest(digest), salt=salt,
            num_virtual=num_virtual,
        )  # fmt: skip
        self.sequences[index] = sequence, digest, salt
        self.scheduler.add(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        before = {index: sequence.table.length for index, (sequence, _, _) in self.sequences.items()}
        chunks = self.scheduler.schedule()
        assert chunks, "there is work and nothing happens"
        assert sum(chunk.count for chunk in chunks) <= self.step_tokens
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
        for sequence, start, count in chunks:
            assert count >= 1 and (start == before[sequence.index] or before[sequence.index] == 0)
            self.write(sequence, start, count)
        for sequence, start, count in chunks:
            _, digest, salt = self.sequences[sequence.index]
            for place in range(start + count):
                where = int(sequence.table.blocks[place // SIZE]) * SIZE + place % SIZE
                assert self.memory[where] == (digest, salt, tuple(sequence.ids[: place + 1]))
        for sequence, start, count in chunks:
            if start + count == len(sequence.ids):
                if data.draw(st.integers(0, 9)) == 0:  # its logits are not finite
                    sequence.table.forget()
                    self.end(sequence)
                elif sequence.push(data.draw(st.integers(0, 1))).completion is not None:
                    self.end(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.end(self.sequences[data.draw(st.sampled_from(sorted(self.sequences)))][0])

    @rule(name=st.sampled_from("abc"), version=st.integers(1, 2))
    def reload(self, name: str, version: int) -> None:
        """The same name, other weights; and back again."""
        self.version[name] = f"{name}{version}"

    @rule()
    def break_off(self) -> None:
        self.scheduler.restart([sequence for sequence, _, _ in self.sequences.values()])
        self.memory.clear()

    def end(self, sequence: Sequence) -> None:
        del self.sequences[sequence.index]
        self.scheduler.remove(sequence)

    @invariant()
    def nothing_is_lost(self) -> None:
        sequences = [sequence for sequence, _, _ in self.sequences.values()]
        self.pool.check([sequence.table.blocks.tolist() for sequence in sequences])
        assert sorted(s.index for s in (*self.scheduler.running, *self.scheduler.waiting)) == sorted(self.sequences)
        assert [s.index for s in self.scheduler.running] == sorted(s.index for s in self.scheduler.running)
        assert all(len(sequence.table.blocks) == 0 for sequence in self.scheduler.waiting)
        assert all(s.table.length <= len(s.table.blocks) * SIZE for s in sequences)

    def teardown(self) -> None:
        """All come to their end."""
        if not hasattr(self, "pool"):
            return
        for _ in range(5_000):
            if not self.sequences:
                break
            for sequence, start, count in self.scheduler.schedule():
                if start + count == len(sequence.ids) and sequence.push(1).completion is not None:
                    self.end(sequence)
        assert not self.sequences and not self.scheduler.has_work
        self.pool.check([])


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


class Careless(Machine):
    """The negative control: blocks are found by their ids and their tenant alone, whatever the adapter."""

    def key_digest(self, digest: str) -> str:
        return ""


def test_the_machine_sees_blocks_of_another_adapter() -> None:
    some = settings(
        max_examples=100, deadline=None, database=None, derandomize=True, report_multiple_bugs=False,
        phases=[Phase.generate],
    )  # fmt: skip
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Careless, settings=some)
