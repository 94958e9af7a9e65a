"""What is found of a prompt, in which order it is forgotten, and what is copied for it. Blocks have 4 tokens."""

from __future__ import annotations

import pytest

from appliance.core.blocks import BlockPool, PoolError
from appliance.core.params import SamplingParams
from appliance.core.scheduler import Scheduler
from appliance.core.store import Copy, Store
from tests.core.fake_model import FakeRunner, alone, make_request, make_scheduler, moves, shape


def serve(scheduler: Scheduler, runner: FakeRunner, name: str, prompt: list[int], max_tokens: int = 1, **more: object):  # type: ignore[no-untyped-def]
    """Serve one request alone; the request, and the first step."""
    request = make_request(name, prompt, max_tokens, **more)  # type: ignore[arg-type]
    scheduler.add(request)
    plan, _ = runner.step()
    runner.finish(limit=100)
    assert request.tokens == alone(prompt, max_tokens)
    return request, plan


def test_full_blocks_of_earlier_requests_are_found() -> None:
    scheduler, runner = make_scheduler(caching=True)
    first, plan = serve(scheduler, runner, "first", list(range(10)), 3)
    assert shape(plan) == [("first", 0, 10, True)]
    assert scheduler.pool.kept == 3, "12 of its 13 tokens were stored"
    for prompt, found in (
        ([*range(9), 77, 78], 8),  # parts in the third block
        (list(range(7)), 4),  # ends in the second block
        ([50, *range(1, 10)], 0),  # the first token differs
        ([0, 50, *range(2, 10)], 0),
        (list(range(3)), 0),  # less than a block
        ([*first.tokens, 5, 6, 7, 8, 9], 12),  # goes on from the answer
    ):
        before = scheduler.prompt_tokens_looked_up, scheduler.prompt_tokens_found
        request, plan = serve(scheduler, runner, "next", prompt)
        assert shape(plan) == [("next", found, len(prompt) - found, True)] and request.cached == found
        assert (scheduler.prompt_tokens_looked_up, scheduler.prompt_tokens_found) == (before[0] + len(prompt), before[1] + found)
        assert moves(plan) == [] and scheduler.prompt_tokens_found_in_host == 0


def test_requests_share_while_they_run() -> None:
    scheduler, runner = make_scheduler(caching=True)
    requests = [make_request(name, [*range(8), i], 4) for i, name in enumerate("abc")]
    scheduler.add(requests[0])
    runner.step()
    assert scheduler.pool.used == 3
    scheduler.add(requests[1])
    scheduler.add(requests[2])
    assert shape(runner.step()[0]) == [("a", 9, 1, True), ("b", 8, 1, True), ("c", 8, 1, True)]
    assert scheduler.pool.used == 5 and all(r.blocks[:2] == requests[0].blocks[:2] for r in requests)
    assert [scheduler.pool.holders(b) for b in requests[0].blocks] == [3, 3, 1]
    runner.finish(limit=10)
    assert [r.tokens for r in requests] == [alone([*range(8), i], 4) for i in range(3)]


def test_a_prompt_that_is_found_whole_computes_its_last_token() -> None:
    scheduler, runner = make_scheduler(caching=True)
    prompt = list(range(8))
    one = make_request("one", prompt, 3)
    serve(scheduler, runner, "zero", prompt)
    scheduler.add(one)
    plan, _ = runner.step()
    assert shape(plan) == [("one", 7, 1, True)] and moves(plan) == [], "nobody else has the block: it is written in place"
    two = make_request("two", prompt, 3, seed=1)
    held = one.blocks[1]
    scheduler.add(two)
    plan, _ = runner.step()
    assert shape(plan) == [("one", 8, 1, True), ("two", 7, 1, True)]
    assert moves(plan) == [Copy("copy", held, two.blocks[1])] and two.blocks[0] == one.blocks[0] != two.blocks[1] != held
    runner.finish(limit=10)
    assert one.tokens == alone(prompt, 3) and two.tokens == alone(prompt, 3, seed=1)


@pytest.mark.parametrize("caching", [True, False])
def test_salts_and_the_switch(caching: bool) -> None:
    scheduler, runner = make_scheduler(caching=caching)
    found = [
        serve(scheduler, runner, str(i), list(range(9)), salt=salt)[0].cached
        for i, salt in enumerate(("", "", "tenant-1", "tenant-2", "tenant-1", ""))
    ]
    assert found == ([0, 8, 0, 0, 8, 8] if caching else [0] * 6)
    assert scheduler.pool.kept == (6 if caching else 0)


def test_prompt_logprobs_come_from_computing_the_prompt() -> None:
    scheduler, runner = make_scheduler(caching=True)
    serve(scheduler, runner, "a", list(range(9)))
    request = make_request("b", range(9), 1)
    request.params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    scheduler.add(request)
    assert shape(runner.step()[0]) == [("b", 0, 9, True)] and request.cached == 0


def test_what_an_aborted_request_computed_is_kept() -> None:
    scheduler, runner = make_scheduler(caching=True, budget=6)
    scheduler.add(make_request("a", range(20), 1))
    runner.step()
    scheduler.abort("a")
    assert scheduler.pool.kept == 1, "6 tokens: a full block, and half of one that nobody can want"
    assert serve(scheduler, runner, "b", list(range(20)))[0].cached == 4


def evicted(pool: BlockPool) -> list[int]:
    """All that is kept, in the order in which it goes."""
    order: list[int] = []
    pool.evicting = lambda block, key: order.append(block)
    pool.allocate(pool.free)
    return order


def test_least_recently_used_goes_first_and_tails_before_heads() -> None:
    def filled() -> tuple[BlockPool, list[int], list[int]]:
        pool = BlockPool(8, 4)
        a, b = (pool.allocate(3) or [] for _ in range(2))
        for block in (*a, *b):
            assert pool.register(block, b"%d" % block)
        pool.release(a)
        pool.release(b)
        assert pool.map(8) == "++++++.." and pool.kept == 6 and pool.free == 8
        return pool, a, b

    pool, a, b = filled()
    assert evicted(pool) == [*reversed(a), *reversed(b)]
    pool, a, b = filled()
    pool.share(a[:2])  # found by somebody
    pool.release(a[:2])
    assert evicted(pool) == [a[2], *reversed(b), a[1], a[0]]
    pool, a, b = filled()
    pool.share(a)
    assert evicted(pool) == [*reversed(b)] and pool.allocate(1) is None
    assert [pool.find(b"%d" % block) for block in (*a, *b)] == [*a, None, None, None]


def test_blank_blocks_go_before_kept_ones() -> None:
    scheduler, runner = make_scheduler(caching=True, blocks=4)
    serve(scheduler, runner, "a", list(range(9)))
    serve(scheduler, runner, "b", list(range(50, 57)))
    assert scheduler.pool.map(4).count("+") == 3, "2 blocks of a, 1 of b"
    assert serve(scheduler, runner, "c", list(range(9)))[0].cached == 8


def test_evicted_blocks_move_to_host_memory_and_come_back() -> None:
    scheduler, runner = make_scheduler(caching=True, blocks=3, host=5)
    serve(scheduler, runner, "a", list(range(8)))
    a1, a0 = 1, 0
    _, plan = serve(scheduler, runner, "b", list(range(50, 62)))
    assert [copy.kind for copy in moves(plan)] == ["out", "out"] and [copy.source for copy in moves(plan)] == [a1, a0]
    a, plan = serve(scheduler, runner, "again", list(range(9)))
    assert shape(plan) == [("again", 8, 1, True)] and a.cached == 8
    assert [copy.kind for copy in moves(plan)] == ["out", "out", "in", "in", "out"], "room first; the last for the ninth token"
    assert scheduler.prompt_tokens_found_in_host == scheduler.prompt_tokens_found == 8
    host = scheduler.store.host
    assert host is not None and host.kept == 5 and host.used == 0
    _, plan = serve(scheduler, runner, "b again", list(range(50, 62)))
    assert shape(plan) == [("b again", 11, 1, True)]


def test_what_host_memory_has_is_not_copied_there_again() -> None:
    scheduler, runner = make_scheduler(caching=True, blocks=2, host=8)
    kinds = []
    for turn in range(3):
        for first in (0, 50):
            _, plan = serve(scheduler, runner, f"{turn}-{first}", list(range(first, first + 8)))
            kinds.append(" ".join(copy.kind for copy in moves(plan)))
    assert kinds == ["", "out out", "out out in in", "in in", "in in", "in in"]


def test_a_full_host_keeps_what_it_has_from_what_comes_once() -> None:
    scheduler, runner = make_scheduler(caching=True, blocks=2, host=2)
    kinds = []
    for first in (0, 100, 200, 300):
        _, plan = serve(scheduler, runner, str(first), list(range(first, first + 8)))
        kinds.append(" ".join(copy.kind for copy in moves(plan)))
    assert kinds == ["", "out out", "", ""]
    assert serve(scheduler, runner, "still there", list(range(8)))[0].cached == 7


@pytest.mark.parametrize(("asked", "cached"), [(0, 0), (100, 7)])
def test_a_full_host_forgets_its_least_recently_used_for_what_came_back(asked: int, cached: int) -> None:
    scheduler, runner = make_scheduler(caching=True, blocks=2, host=2)
    for number, first in enumerate((0, 100, 200, 100, 200)):
        serve(scheduler, runner, str(number), list(range(first, first + 8)))
    assert serve(scheduler, runner, "asked", list(range(asked, asked + 8)))[0].cached == cached


def test_after_a_reset_nothing_is_known_to_have_come_back() -> None:
    scheduler, runner = make_scheduler(caching=True, blocks=2, host=2)
    for number, first in enumerate((0, 100, 200)):
        serve(scheduler, runner, str(number), list(range(first, first + 8)))
    assert scheduler.store.ghosts is not None and len(scheduler.store.ghosts) == 4
    scheduler.store.forget()
    assert len(scheduler.store.ghosts) == 0


def test_what_leaves_the_pool_is_the_most_recently_used_of_the_host() -> None:
    """The pool holds two prompts, the host four, a among them when it is used again in the pool and then leaves that."""
    scheduler, runner = make_scheduler(caching=True, blocks=4, host=8)
    for turn, name in enumerate("abcadaefgh"):
        serve(scheduler, runner, f"{turn}", list(range(100 * ord(name), 100 * ord(name) + 8)))
    found = {
        name: [place.host for place in scheduler.store.find(make_request("x", range(100 * ord(name), 100 * ord(name) + 8), 1))]
        for name in "abcdefgh"
    }
    there, here = [True] * 2, [False] * 2
    assert found == {"a": there, "b": [], "c": [], "d": there, "e": there, "f": there, "g": here, "h": here}


def test_two_that_find_the_same_in_host_memory_copy_it_once() -> None:
    scheduler, runner = make_scheduler(caching=True, blocks=6, host=8)
    serve(scheduler, runner, "a", list(range(8)))
    serve(scheduler, runner, "b", list(range(50, 74)))
    requests = [make_request(name, [*range(8), i], 4) for i, name in enumerate("xy")]
    for request in requests:
        scheduler.add(request)
    plan, _ = runner.step()
    assert shape(plan) == [("x", 8, 1, True), ("y", 8, 1, True)] and requests[0].blocks[:2] == requests[1].blocks[:2]
    assert [copy.kind for copy in moves(plan)].count("in") == 2
    runner.finish(limit=10)
    assert [r.tokens for r in requests] == [alone([*range(8), i], 4) for i in range(2)]


def test_store_refuses_tiers_of_different_blocks() -> None:
    with pytest.raises(PoolError, match="blocks of 16 tokens cannot move to blocks of 8"):
        Store(BlockPool(4, 16), BlockPool(4, 8))
