"""Who gives way to whom, what becomes of it, and who comes next. Blocks have 4 tokens."""

from __future__ import annotations

import pytest

from appliance.core.request import Request
from appliance.core.scheduler import Scheduler
from tests.core.fake_model import FakeRunner, alone, make_request, make_scheduler, moves, shape


def names(scheduler: Scheduler, runner: FakeRunner, limit: int = 200) -> list[str]:
    """Who runs in each step, until all have ended."""
    steps = []
    while scheduler.has_work:
        plan, _ = runner.step()
        scheduler.check()
        steps.append(" ".join(chunk.request.request_id for chunk in plan.chunks))
        assert len(steps) < limit
    return steps


def dry(swaps: bool, host: int = 8, **options: object) -> tuple[Scheduler, FakeRunner, Request, Request]:
    """Two of 7 tokens in 4 blocks, who need 3 each in the third step: the younger has 8 tokens computed then."""
    scheduler, runner = make_scheduler(blocks=4, host=host, swaps=lambda request: swaps, **options)
    first, second = (make_request(name, range(i, i + 7), 5) for i, name in enumerate("ab"))
    scheduler.add(first)
    scheduler.add(second)
    assert shape(runner.step()[0]) == [("a", 0, 7, True), ("b", 0, 7, True)]
    assert shape(runner.step()[0]) == [("a", 7, 1, True), ("b", 7, 1, True)]
    return scheduler, runner, first, second


def test_swapped_out_and_back() -> None:
    scheduler, runner, first, second = dry(swaps=True)
    blocks = list(second.blocks)
    plan, _ = runner.step()
    assert plan.preempted == (second,) and shape(plan) == [("a", 8, 1, True)]
    assert [(copy.kind, copy.source, copy.target) for copy in moves(plan)] == [
        ("out", blocks[0], second.host[0]),
        ("out", blocks[1], second.host[1]),
    ]
    assert second.computed == 8 and not second.blocks and scheduler.num_swaps == scheduler.num_preemptions == 1
    slots = list(second.host)
    while (plan := runner.step()[0]).chunks[0].request is first:
        assert not moves(plan)
    assert shape(plan) == [("b", 8, 1, True)], "nothing is computed again"
    assert [(copy.kind, copy.source, copy.target) for copy in moves(plan)] == [
        ("in", slots[0], second.blocks[0]),
        ("in", slots[1], second.blocks[1]),
    ]
    runner.finish(limit=10)
    assert first.tokens == alone(range(7), 5) and second.tokens == alone(range(1, 8), 5)
    assert scheduler.store.host is not None and scheduler.store.host.used == 0


@pytest.mark.parametrize(("swaps", "host"), [(False, 8), (True, 0), (True, 1)])
def test_computed_anew(swaps: bool, host: int) -> None:
    """Where swapping costs more, where there is no host memory (--swap-space 0), and where it is too full for both blocks."""
    scheduler, runner, first, second = dry(swaps, host)
    plan, _ = runner.step()
    assert plan.preempted == (second,) and second.computed == 0 and not second.host and moves(plan) == []
    assert scheduler.num_swaps == 0 and scheduler.num_preemptions == 1
    while (plan := runner.step()[0]).chunks[0].request is first:
        pass
    assert shape(plan) == [("b", 0, 9, True)]
    runner.finish(limit=10)
    assert second.tokens == alone(range(1, 8), 5)


def test_each_request_is_asked_whether_it_swaps() -> None:
    asked = []
    scheduler, runner = make_scheduler(
        blocks=6, host=8, swaps=lambda request: bool(asked.append((request.request_id, request.computed))) or request.computed > 4
    )
    for i, (name, length) in enumerate((("a", 8), ("long", 8), ("short", 4))):
        scheduler.add(make_request(name, range(i, i + length), 12))
    plan, _ = runner.step()
    assert len(plan.chunks) == 3 and scheduler.pool.free == 1
    plan, _ = runner.step()  # three need a block each, one is left
    assert shape(plan) == [("a", 8, 1, True), ("long", 8, 1, True)] and [r.request_id for r in plan.preempted] == ["short"]
    runner.finish(limit=100)
    assert asked[0] == ("short", 4) and ("long", 12) in asked and scheduler.num_swaps < scheduler.num_preemptions


def test_a_swapped_request_finds_its_blocks_that_stayed_in_the_pool() -> None:
    scheduler, runner, _, second = dry(swaps=True, caching=True)
    runner.step()
    assert second.host and scheduler.pool.kept == 1, "two of b's were kept, and a took one of them"
    scheduler.abort("a")
    plan, _ = runner.step()
    assert shape(plan) == [("b", 8, 1, True)]
    assert [copy.kind for copy in moves(plan)] == ["in", "out"], "b's second block, and one of a's makes room for b's third"
    runner.finish(limit=10)
    assert second.tokens == alone(range(1, 8), 5)


def test_half_a_block_that_was_swapped_out_is_not_found_by_others() -> None:
    """6 of 11 prompt tokens are computed: the second block's key is known, but not all of its tokens are there."""
    scheduler, runner = make_scheduler(budget=6, seqs=1, host=8, caching=True, priorities=True)
    request = make_request("a", range(11), 2, priority=1)
    scheduler.add(request)
    runner.step()
    assert request.computed == 6
    scheduler.add(make_request("urgent", range(50, 51), 1))
    runner.step()
    assert len(request.host) == 2
    scheduler.max_num_batched_tokens = 1
    assert shape(runner.step()[0]) == [("a", 6, 1, False)]
    other = make_request("b", range(11), 2)
    assert len(scheduler.store.find(other)) == 1
    runner.step()
    assert len(scheduler.store.find(other)) == 2
    runner.finish(limit=20)
    assert request.tokens == alone(range(11), 2)


def test_a_step_under_way_says_nothing_of_blocks_that_its_request_got_since() -> None:
    """Two give way in the step after the one in which 7 tokens of a prompt are computed; one comes back at once, with 3."""
    scheduler, runner = make_scheduler(blocks=18, budget=8, caching=True, priorities=True, watermark=0.15)
    scheduler.add(make_request("before", range(80, 100), 1))
    runner.finish(limit=3)
    long, short = make_request("long", range(40), 5, priority=1), make_request("short", range(50, 66), 2, priority=1)
    scheduler.add(long)
    for _ in range(5):
        runner.step()
    scheduler.add(short)
    plan = scheduler.schedule()
    assert shape(plan) == [("long", 40, 1, True), ("short", 0, 7, False)]
    sampled = runner.run(plan)
    scheduler.add(make_request("urgent", range(80, 105), 1, priority=0))
    later = scheduler.schedule()
    assert [r.request_id for r in later.preempted] == ["short", "long"]
    assert shape(later) == [("urgent", 20, 5, True), ("short", 0, 3, False)]
    told = runner.run(later)
    scheduler.commit(plan, sampled)
    scheduler.check()
    assert scheduler.store.find(make_request("x", range(50, 66), 1)) == []
    scheduler.commit(later, told)
    runner.finish(limit=40)
    assert long.tokens == alone(range(40), 5) and short.tokens == alone(range(50, 66), 2)


def test_higher_priority_is_admitted_first() -> None:
    scheduler, runner = make_scheduler(seqs=1, priorities=True)
    for name, priority in (("late", 2), ("x", 1), ("first", 0), ("y", 1)):
        scheduler.add(make_request(name, range(4), 1, priority=priority))
    assert names(scheduler, runner) == ["first", "x", "y", "late"]
    scheduler, runner = make_scheduler(seqs=1)
    for name, priority in (("late", 2), ("x", 1), ("first", 0), ("y", 1)):
        scheduler.add(make_request(name, range(4), 1, priority=priority))
    assert names(scheduler, runner) == ["late", "x", "first", "y"], "fcfs"


def test_lower_priority_gives_way() -> None:
    scheduler, runner = make_scheduler(seqs=2, priorities=True, host=8)
    low = [make_request(name, range(6), 4, priority=2) for name in ("l0", "l1")]
    for request in low:
        scheduler.add(request)
    runner.step()
    scheduler.add(make_request("high", range(9), 2, priority=1))
    plan, _ = runner.step()
    assert plan.preempted == (low[1],) and shape(plan) == [("l0", 6, 1, True), ("high", 0, 9, True)]
    assert [r.request_id for r in scheduler.running] == ["high", "l0"] and low[1].host
    assert names(scheduler, runner) == ["high l0", "l0 l1", "l1", "l1"]
    assert [r.tokens for r in low] == [alone(range(6), 4)] * 2


def test_lower_priority_stays_where_giving_way_would_not_help() -> None:
    scheduler, runner = make_scheduler(blocks=10, priorities=True)
    scheduler.add(make_request("high", range(24), 8, priority=0))
    scheduler.add(make_request("low", range(8), 8, priority=2))
    runner.step()
    scheduler.add(make_request("middle", range(20), 4, priority=1))  # 6 blocks: 4 would be free without low
    for _ in range(4):
        plan, _ = runner.step()
        assert [c.request.request_id for c in plan.chunks] == ["high", "low"] and plan.preempted == ()


def test_turns() -> None:
    """Three tokens each, while somebody waits; alone as long as it likes."""
    scheduler, runner = make_scheduler(seqs=1, host=8, fair_tokens=3)
    scheduler.add(make_request("a", range(4), 8))
    scheduler.add(make_request("b", range(5), 5))
    assert "".join(names(scheduler, runner)) == "aaabbbaaabbaa"
    assert scheduler.num_preemptions == scheduler.num_swaps == 3
    scheduler, runner = make_scheduler(seqs=1, host=8, fair_tokens=3)
    scheduler.add(make_request("a", range(4), 8))
    assert "".join(names(scheduler, runner)) == "a" * 8 and scheduler.num_preemptions == 0


def test_turns_need_no_more_to_give_way_than_the_next_one_takes() -> None:
    """Of those whose turn is over the one with the longest: a has generated 4 tokens, b 3."""
    scheduler, runner = make_scheduler(seqs=2, host=8, fair_tokens=3)
    scheduler.add(make_request("a", range(4), 9))
    runner.step()
    scheduler.add(make_request("b", range(4), 9))
    for _ in range(3):
        runner.step()
    scheduler.add(make_request("c", range(4), 1))
    plan, _ = runner.step()
    assert [r.request_id for r in plan.preempted] == ["a"] and shape(plan) == [("b", 6, 1, True), ("c", 0, 4, True)]


def test_a_turn_does_not_end_for_those_of_lower_priority() -> None:
    scheduler, runner = make_scheduler(seqs=1, priorities=True, fair_tokens=2)
    scheduler.add(make_request("high", range(4), 6))
    scheduler.add(make_request("low", range(4), 2, priority=1))
    assert names(scheduler, runner) == ["high"] * 6 + ["low"] * 2 and scheduler.num_preemptions == 0


def test_the_watermark_is_left_free_while_others_run() -> None:
    for room, admitted in ((0.2, False), (0.1, True)):  # 2 blocks of 10, or 1
        scheduler, runner = make_scheduler(blocks=10, watermark=room)
        scheduler.add(make_request("a", range(18), 8))  # 5 blocks
        runner.step()
        scheduler.add(make_request("b", range(15), 8))  # 4 blocks
        assert (len(runner.step()[0].chunks) == 2) is admitted
    scheduler, runner = make_scheduler(blocks=10, watermark=0.9)
    request = make_request("whole", range(36), 5)
    scheduler.add(request)
    runner.finish(limit=5)
    assert request.tokens == alone(range(36), 5), "who runs alone may have all"


@pytest.mark.parametrize(("watermark", "gone"), [(0.0, ["turned"]), (0.2, [])])
def test_nobody_gives_way_where_the_watermark_would_not_be_left(watermark: float, gone: list[str]) -> None:
    """10 blocks: 4 of one whose turn is not over, 3 of one whose is, 3 free; the head takes 5."""
    scheduler, runner = make_scheduler(blocks=10, watermark=watermark, fair_tokens=2)
    scheduler.add(make_request("turned", range(8), 8))
    runner.step()
    scheduler.add(make_request("new", range(14), 8))
    runner.step()
    scheduler.add(make_request("head", range(18), 2))
    plan, _ = runner.step()
    assert [r.request_id for r in plan.preempted] == gone


def test_one_that_takes_all_but_the_watermark_does_not_wait_for_those_who_are_gone() -> None:
    scheduler, runner = make_scheduler(blocks=10, watermark=0.2)
    scheduler.add(make_request("a", range(4), 3))
    runner.step()
    scheduler.add(make_request("b", range(36), 2))
    assert names(scheduler, runner) == ["a", "a", "b", "b"]


def test_what_the_head_finds_may_be_held_by_those_who_give_way() -> None:
    """10 blocks, 4 of each of two; the head takes 7. Of these the younger one holds 3, which take room once it went."""
    scheduler, runner = make_scheduler(blocks=10, caching=True, priorities=True, watermark=0.0)
    older, younger = make_request("older", range(50, 65), 8, priority=1), make_request("younger", range(15), 8, priority=1)
    for request in (older, younger):
        scheduler.add(request)
        runner.step()
    assert scheduler.pool.free == 2
    scheduler.add(make_request("head", [*range(12), *range(70, 83)], 2))
    plan, _ = runner.step()
    assert plan.preempted == (younger, older) and ("head", 12, 13, True) in shape(plan)


def test_many_who_give_way_for_a_long_head_look_it_up_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, runner = make_scheduler(blocks=800, budget=64, seqs=64, caching=True, priorities=True, watermark=0.0)
    for i in range(60):
        scheduler.add(make_request(str(i), [100 + i] * 5, 40, priority=1))
    for _ in range(30):
        runner.step()
    assert len(scheduler.running) == 60
    looked, places = [], scheduler.store.places
    monkeypatch.setattr(scheduler.store, "places", lambda request: looked.append(request.request_id) or places(request))  # type: ignore[func-returns-value]
    scheduler.add(make_request("head", range(1000, 4100), 2))
    plan, _ = runner.step()
    assert len(plan.preempted) > 40 and plan.chunks[-1].request.request_id == "head"
    assert len(looked) < 10
