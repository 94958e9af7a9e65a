from __future__ import annotations

import re

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from appliance.core.blocks import BlockPool, PoolError


class PoolMachine(RuleBasedStateMachine):
    """The pool against plain dictionaries of reference counts and keys, and a list of what is kept."""

    @initialize(num_blocks=st.integers(1, 40), block_size=st.sampled_from([1, 8, 16]))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        self.pool.evicting = lambda block, key: self.evicted.append((block, key))
        self.counts: dict[int, int] = {}
        self.held: list[list[int]] = []
        self.keys: dict[int, bytes] = {}
        self.kept: list[int] = []  # least recently used first
        self.evicted: list[tuple[int, bytes]] = []

    @rule(n=st.integers(0, 20), expect=st.integers(0, 60), data=st.data())
    def allocate(self, n: int, expect: int, data: st.DataObject) -> None:
        after = data.draw(st.sampled_from([None, *(held[-1] for held in self.held if held)]))
        before = (self.pool.free, self.pool.map(64), self.pool._counts[:])
        blank = before[1].count(".")
        blocks = self.pool.allocate(n, after=after, expect=expect)
        if blocks is None:
            assert n > self.pool.num_blocks - len(self.counts)
            assert before == (self.pool.free, self.pool.map(64), self.pool._counts) and not self.evicted
            return
        gone = self.kept[: max(0, n - blank)]
        assert self.evicted == [(block, self.keys.pop(block)) for block in gone], "no more than are needed, the oldest first"
        del self.kept[: len(gone)], self.evicted[:]
        assert len(blocks) == len(set(blocks)) == n and not self.counts.keys() & set(blocks) and not {*self.kept} & {*blocks}
        if n and after is not None and after + 1 < self.pool.num_blocks and before[1][after + 1] == ".":
            assert blocks[0] == after + 1
        self.counts |= dict.fromkeys(blocks, 1)
        self.held.append(blocks)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        """What others hold, or what is kept."""
        blocks = data.draw(st.sampled_from([*self.held, self.kept[:], self.kept[1:4]]))
        if blocks:
            self.pool.share(blocks)
            for block in blocks:
                self.counts[block] = self.counts.get(block, 0) + 1
            self.kept = [block for block in self.kept if block not in blocks]
            self.held.append(blocks)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.pool.release(blocks)
            for block in reversed(blocks):
                self.counts[block] -= 1
                if not self.counts[block]:
                    del self.counts[block]
                    self.kept += [block] if block in self.keys else []

    @rule(data=st.data(), name=st.integers(0, 9))
    def register(self, data: st.DataObject, name: int) -> None:
        key = b"%d" % name
        assert self.pool.find(key) == next((block for block, other in self.keys.items() if other == key), None)
        if self.counts:
            block = data.draw(st.sampled_from(sorted(self.counts)))
            new = key not in self.keys.values() and block not in self.keys
            assert self.pool.register(block, key) is new
            if new:
                self.keys[block] = key

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.keys.clear()
        self.kept.clear()

    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        unused = set(range(-2, self.pool.num_blocks + 2)) - self.counts.keys()
        block = data.draw(st.sampled_from(sorted(unused)))
        with pytest.raises(PoolError, match="cannot release block"):
            self.pool.release([block])
        with pytest.raises(PoolError, match="cannot register block"):
            self.pool.register(block, b"k")
        block = data.draw(st.sampled_from(sorted(unused - {*self.kept})))
        with pytest.raises(PoolError, match="cannot share block"):
            self.pool.share([block])

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        pool.check()
        assert pool.free + pool.used == pool.num_blocks and pool.kept == len(self.kept)
        assert [pool.holders(b) for b in range(pool.num_blocks)] == [self.counts.get(b, 0) for b in range(pool.num_blocks)]
        assert pool.shared == sum(count > 1 for count in self.counts.values())
        marks = {0: ".", 1: "#"}
        states = ("+" if b in self.kept else marks.get(self.counts.get(b, 0), "&") for b in range(pool.num_blocks))
        assert pool.map(64) == "".join(states)
        assert max(map(len, re.findall(r"\.+", pool.map(64))), default=0) <= pool._longest

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
    pool.share(range(100, 300))
    assert pool.map(10) == "#&&##....." and pool.shared == 200
    pool.release(range(100, 300))
    assert pool.map(10) == "#####....." and pool.shared == 0


def damage_map(pool: BlockPool) -> None:
    pool._map[0], pool._map[5] = 1, 0


def damage_counts(pool: BlockPool) -> None:
    pool._counts[5] = 1


def damage_negative(pool: BlockPool) -> None:
    pool._counts[5] = -1


def damage_free(pool: BlockPool) -> None:
    pool.free = 5


def damage_shared(pool: BlockPool) -> None:
    pool.shared = 1


def damage_places(pool: BlockPool) -> None:
    pool._places[b"a"] = 2


def damage_keys(pool: BlockPool) -> None:
    pool._keys[1] = b"a"


def damage_kept(pool: BlockPool) -> None:
    pool._kept.clear()


def damage_lost_key(pool: BlockPool) -> None:
    del pool._keys[2], pool._places[b"c"]


def damage_blank_key(pool: BlockPool) -> None:
    pool._keys[5], pool._places[b"f"] = b"f", 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_map, "block 0 has 1 references and is marked free"),
        (damage_counts, "block 5 has 1 references and is marked free"),
        (damage_negative, "block 5 has -1 references"),
        (damage_free, "5 blocks counted free, 4 of 6 marked free"),
        (damage_shared, "1 blocks counted shared, 0 are"),
        (damage_places, "disagree"),
        (damage_keys, "disagree"),
        (damage_kept, "1 blocks are marked kept, 0 listed"),
        (damage_lost_key, "1 blocks are marked kept, 1 listed, 1 have keys"),
        (damage_blank_key, "a blank block has a key"),
    ],
)
def test_check_sees_damage(damage, message: str) -> None:  # type: ignore[no-untyped-def]
    """Blocks 0 and 1 are used, 0 has a key; 2 is kept; the others are blank."""
    pool = BlockPool(6, 16)
    pool.allocate(3)
    pool.register(0, b"a")
    pool.register(2, b"c")
    pool.release([2])
    pool.check()
    damage(pool)
    with pytest.raises(PoolError, match=message):
        pool.check()


def test_a_pool_needs_blocks() -> None:
    with pytest.raises(PoolError, match="at least one block"):
        BlockPool(0, 16)
    with pytest.raises(PoolError, match="cannot allocate -1"):
        BlockPool(1, 16).allocate(-1)
