from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from appliance.core.blocks import BlockPool, PoolError


class PoolMachine(RuleBasedStateMachine):
    """The pool against a plain dictionary of reference counts."""

    @initialize(num_blocks=st.integers(1, 40), block_size=st.sampled_from([1, 8, 16]))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        self.counts: dict[int, int] = {}
        self.held: list[list[int]] = []

    @rule(n=st.integers(0, 20), expect=st.integers(0, 60), data=st.data())
    def allocate(self, n: int, expect: int, data: st.DataObject) -> None:
        after = data.draw(st.sampled_from([None, *(held[-1] for held in self.held if held)]))
        before = (self.pool.free, self.pool.map(64), [self.pool._counts[b] for b in range(self.pool.num_blocks)])
        blocks = self.pool.allocate(n, after=after, expect=expect)
        if blocks is None:
            assert n > self.pool.num_blocks - len(self.counts)
            assert before == (self.pool.free, self.pool.map(64), self.pool._counts)
            return
        assert len(blocks) == len(set(blocks)) == n and not self.counts.keys() & set(blocks)
        if n and after is not None and after + 1 < self.pool.num_blocks and before[1][after + 1] == ".":
            assert blocks[0] == after + 1
        self.counts |= dict.fromkeys(blocks, 1)
        self.held.append(blocks)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        if self.held:
            blocks = data.draw(st.sampled_from(self.held))
            self.pool.share(blocks)
            for block in blocks:
                self.counts[block] += 1
            self.held.append(blocks)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.pool.release(blocks)
            for block in blocks:
                self.counts[block] -= 1
            self.counts = {block: count for block, count in self.counts.items() if count}

    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        free = sorted(set(range(-2, self.pool.num_blocks + 2)) - self.counts.keys())
        block = data.draw(st.sampled_from(free))
        with pytest.raises(PoolError, match="cannot release block"):
            self.pool.release([block])
        with pytest.raises(PoolError, match="cannot share block"):
            self.pool.share([block])

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        assert self.pool.free + self.pool.used == self.pool.num_blocks
        assert self.pool.map(64) == "".join("#" if b in self.counts else "." for b in range(self.pool.num_blocks))

    def teardown(self) -> None:
        for blocks in getattr(self, "held", []):
            self.pool.release(blocks)
        if hasattr(self, "pool"):
            self.pool.check()
            assert self.pool.used == 0


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_growing_sequences_stay_in_one_run_each() -> None:
    """64 sequences that say what they may need grow block by block, in turns, and never jump."""
    pool = BlockPool(1024, 16)
    sequences = [pool.allocate(2, expect=16) for _ in range(64)]
    for _ in range(14):
        for blocks in sequences:
            blocks += pool.allocate(1, after=blocks[-1], expect=16 - len(blocks))
    assert all(blocks == list(range(blocks[0], blocks[0] + 16)) for blocks in sequences)
    assert pool.free == 0


def test_sequences_that_may_take_the_whole_pool_are_spread_over_it() -> None:
    pool = BlockPool(1000, 16)
    starts = sorted(pool.allocate(1, expect=5000)[0] for _ in range(8))
    gaps = [b - a for a, b in zip(starts, [*starts[1:], 1000], strict=True)]
    assert min(gaps) >= 100


def test_fragments_are_used_when_nothing_else_is_left() -> None:
    pool = BlockPool(10, 16)
    everything = pool.allocate(10)
    pool.release(everything[::2])
    assert pool.allocate(6) is None
    assert sorted(pool.allocate(5, expect=5)) == everything[::2]


def test_a_shared_block_is_free_after_its_last_release() -> None:
    pool = BlockPool(2, 16)
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.release(blocks)
    assert pool.used == 1
    pool.release(blocks)
    assert pool.used == 0
    with pytest.raises(PoolError, match=r"cannot release block 0: it is free"):
        pool.release(blocks)
    with pytest.raises(PoolError, match=r"cannot release block 7: the pool has blocks 0 \.\. 1"):
        pool.release([7])


def test_map_samples_a_large_pool_evenly() -> None:
    pool = BlockPool(1000, 16)
    pool.allocate(500)
    assert pool.map(10) == "#####....."
    assert len(pool.map(999)) == 999 and len(pool.map(5000)) == 1000


@pytest.mark.parametrize("damage", ["map", "counts", "free", "negative"])
def test_check_sees_damage(damage: str) -> None:
    pool = BlockPool(4, 16)
    pool.allocate(2)
    if damage == "map":
        pool._map[0], pool._map[3] = 1, 0
    elif damage == "counts":
        pool._counts[3] = 1
    elif damage == "negative":
        pool._counts[3] = -1
    else:
        pool.free = 3
    with pytest.raises(PoolError):
        pool.check()


def test_a_pool_needs_blocks() -> None:
    with pytest.raises(PoolError, match="at least one block"):
        BlockPool(0, 16)
    with pytest.raises(PoolError, match="cannot allocate -1"):
        BlockPool(1, 16).allocate(-1)
