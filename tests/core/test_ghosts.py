"""Which evicted blocks are worth another one's place in host memory."""

from __future__ import annotations

import random
import tracemalloc
from collections import OrderedDict
from collections.abc import Iterable
from zlib import crc32

import pytest

from appliance.core import ghosts
from appliance.core.ghosts import MOST, PLACE, REACH, WAYS, Ghosts, ghost_bytes


def key(number: int) -> bytes:
    return number.to_bytes(8, "big")


def found(size: int, numbers: Iterable[int], how: str) -> tuple[int, int]:
    """(blocks found, blocks copied) of a host memory of ``size`` that evicted blocks with these numbers are offered to, in order.

    ``how``: "all", "returning" (what was offered before) or "ghosts".
    """
    memory: OrderedDict[int, None] = OrderedDict()
    known, hits, copies, seen = Ghosts(size), 0, 0, set()
    for number in numbers:
        worth = known.leaves(key(number))
        worth = {"all": True, "returning": number in seen, "ghosts": worth}[how]
        seen.add(number)
        if number in memory:
            hits += 1
            memory.move_to_end(number)
        elif worth or len(memory) < size:
            copies += 1
            memory[number] = None
            if len(memory) > size:
                memory.popitem(last=False)
    return hits, copies


def test_what_comes_once_is_worth_nothing_and_what_comes_back_is() -> None:
    known = Ghosts(4)
    assert [known.leaves(key(i)) for i in range(20)] == [False] * 20
    assert known.leaves(key(0)), "it left before"
    assert not known.leaves(key(20))


def test_all_is_taken_where_all_that_comes_back_does_so_in_time() -> None:
    """Pairs: each block comes twice, shortly after each other, and never again."""
    pairs = [number for i in range(0, 400, 2) for number in (i, i + 1, i, i + 1)]
    assert found(4, pairs, "ghosts")[0] > 0.9 * found(4, pairs, "all")[0] > 0
    assert found(4, pairs, "returning")[0] == 4, "only what found room at first"


def test_what_comes_back_is_kept_amid_what_does_not() -> None:
    """Ten blocks in turn, and forty others between two of them: too many for a memory of twelve, not for its ghosts."""
    often = [number for i in range(60) for number in (*range(10), *range(1000 + 40 * i, 1040 + 40 * i))]
    hits, copies = found(12, often, "ghosts")
    assert found(12, often, "all")[0] == 0 and found(12, often, "all")[1] == len(often)
    assert hits > 0.9 * 10 * 60 and copies < 0.05 * len(often)


@pytest.mark.parametrize("size", [50, 100, 400, 1600, 3200])
def test_never_worse_than_all_and_about_as_good_as_the_better_of_both(size: int) -> None:
    """Conversations whose blocks come again and again with others between them, and requests that nobody repeats.

    (The other one remembers here all that ever left.)
    """
    draw, numbers, fresh = random.Random(size), [], 10**6
    talks = [list(range(1000 * i, 1000 * i + 10)) for i in range(40)]
    for _ in range(1200):
        talk = draw.choice(talks)
        numbers += talk
        talk.append(talk[-1] + 1)
        for _ in range(draw.randrange(30)):
            numbers.append(fresh := fresh + 1)
    hits, copies = found(size, numbers, "ghosts")
    everything, returning = (found(size, numbers, how) for how in ("all", "returning"))
    assert hits >= everything[0] and hits >= 0.75 * returning[0]
    assert copies <= everything[1] and (size > 1600 or copies < 0.7 * everything[1])


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Ghosts(10)
    for i in range(1000):
        known.leaves(key(i))
    assert len(known) == 10 * REACH
    assert not known.leaves(key(0)), "long forgotten"
    monkeypatch.setattr(ghosts, "MOST", 32)
    known = Ghosts(10)
    for i in range(1000):
        known.leaves(key(i))
    assert len(known) == 32


def test_what_left_longest_ago_is_forgotten_first() -> None:
    """Of about as many as are remembered most are known, of those before them few; what leaves again stays."""
    known = Ghosts(100)
    for i in range(4000):
        known.leaves(key(i))
        known.leaves(key(-1 % 2**64))
    assert known.leaves(key(-1 % 2**64))
    marks = {crc32(key(i)) for i in range(4000 - 400, 4000)}
    assert len(marks & {*known._marks}) > 380
    assert len({crc32(key(i)) for i in range(4000 - 1600)} & {*known._marks}) < 20


@pytest.mark.parametrize("size", [1, 3, 100, 8192, 100_000])
def test_what_is_remembered_takes_as_many_bytes_as_are_planned(size: int) -> None:
    tracemalloc.start()
    known = Ghosts(size)
    empty, _ = tracemalloc.get_traced_memory()
    for i in range(300):
        known.leaves(key(i))
    full, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 <= empty - ghost_bytes(size) < 2000 and full - empty < 4000
    assert min(REACH * size, MOST) <= ghost_bytes(size) // PLACE < min(REACH * size, MOST) + WAYS
