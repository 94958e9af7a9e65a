"""Which states are kept, who goes on from them, and who loses his place. Blocks have 4 tokens."""

from __future__ import annotations

from typing import Any

import pytest

from appliance.core.blocks import PoolError
from appliance.core.kept import WORTH, Kept
from appliance.core.scheduler import Scheduler
from appliance.core.store import Copy
from tests.core.fake_model import FakeRunner, alone, make_request, moves, shape
from tests.core.fake_model import make_scheduler as make

SEATS = 8


def make_scheduler(*, worth: int = 1, kept: int = 4, **options: Any) -> tuple[Scheduler, FakeRunner]:
    scheduler, _ = make(caching=True, kept=kept, seqs=SEATS, **options)
    assert scheduler.store.kept is not None
    scheduler.store.kept.worth = worth
    return scheduler, FakeRunner(scheduler, stateful=True)


def serve(
    scheduler: Scheduler, runner: FakeRunner, prompt: list[int], max_tokens: int = 3
) -> tuple[list[tuple[int, int]], list[Copy]]:
    """One request alone: (start, length) of the chunks of its prompt, and the copies."""
    request, chunks, copies = make_request("one", prompt, max_tokens), [], []
    scheduler.add(request)
    while scheduler.has_work:
        plan, _ = runner.step()
        scheduler.check()
        copies += [copy for copy in plan.copies if copy.kind == "states"]
        chunks += [(start, length) for _, start, length, _ in shape(plan) if start < len(prompt)]
    assert request.tokens == alone(prompt, max_tokens)
    assert request.cached == (chunks[0][0])
    return chunks, copies


def test_the_next_turn_goes_on_where_the_prompt_ended() -> None:
    scheduler, runner = make_scheduler()
    prompt = list(range(10))
    seat = scheduler.seats[-1]
    assert serve(scheduler, runner, prompt) == ([(0, 8), (8, 2)], [Copy("states", seat, SEATS)])
    assert serve(scheduler, runner, prompt) == ([(8, 2)], [Copy("states", SEATS, seat)]), "kept already, and so not cut"
    after = [*alone(prompt, 3), 50, 51, 52]  # 12 of 16 tokens are found, of 13 that the cache has
    assert serve(scheduler, runner, after) == (
        [(8, 4), (12, 4)],
        [Copy("states", SEATS, seat), Copy("states", seat, SEATS + 1)],
    )
    assert scheduler.prompt_tokens_looked_up == 36 and scheduler.prompt_tokens_found == 16


def test_a_prompt_of_whole_blocks_computes_its_last_one() -> None:
    scheduler, runner = make_scheduler()
    assert serve(scheduler, runner, list(range(8)))[0] == [(0, 4), (4, 4)]
    assert serve(scheduler, runner, list(range(8)))[0] == [(4, 4)]
    assert serve(scheduler, runner, list(range(4)))[0] == [(0, 4)], "the token behind comes from one that is computed"


def test_where_texts_part_the_second_keeps_and_the_third_goes_on() -> None:
    scheduler, runner = make_scheduler()
    system = list(range(9))
    for last, chunks in ((60, [(0, 16), (16, 1)]), (70, [(0, 8), (8, 8), (16, 1)]), (80, [(8, 8), (16, 1)])):
        assert serve(scheduler, runner, [*system, *range(last, last + 8)])[0] == chunks


def test_what_spares_little_is_not_kept() -> None:
    scheduler, runner = make_scheduler(worth=9)
    assert serve(scheduler, runner, list(range(12))) == ([(0, 12)], [])
    assert serve(scheduler, runner, list(range(13)))[0] == [(0, 12), (12, 1)]
    assert serve(scheduler, runner, list(range(21)))[0] == [(12, 9)], "less than nine more"
    assert serve(scheduler, runner, list(range(25)))[0] == [(12, 12), (24, 1)]
    kept = Kept(3, 2)
    assert kept.worth == WORTH and kept.stops(16, 144, 272) == (144, 272)
    assert kept.stops(17, 144, 272) == (272,) and kept.stops(0, 144, 271) == (144,) and kept.stops(0, 0, 127) == ()


def test_who_was_used_least_recently_loses_his_place() -> None:
    scheduler, runner = make_scheduler(kept=2)
    texts = [[100 * i + token for token in range(6)] for i in range(3)]
    found = [serve(scheduler, runner, texts[i])[0][0][0] for i in (0, 1, 0, 2, 1, 2, 0)]
    assert found == [0, 0, 4, 0, 0, 4, 0], "the second gave way to the third, and then the first to the second"


def test_states_without_their_blocks_are_not_found() -> None:
    scheduler, runner = make_scheduler(blocks=4, kept=4)
    serve(scheduler, runner, list(range(10)))
    serve(scheduler, runner, list(range(100, 113)), 1)
    assert serve(scheduler, runner, list(range(10)))[0] == [(0, 10)], "kept still, so not cut, but its blocks are other's"


def test_ahead_of_the_host_and_beside_others() -> None:
    """The states are copied behind the step that makes them, before its tokens are known; and another goes on at once."""
    scheduler, runner = make_scheduler()
    one, two = make_request("one", range(10), 3), make_request("two", range(10), 3, seed=1)
    scheduler.add(one)
    first = scheduler.schedule()
    sampled = runner.run(first)
    second = scheduler.schedule()
    assert shape(second) == [("one", 8, 2, True)] and moves(second) == []
    assert second.copies[-1] == Copy("states", one.seat, SEATS)
    later = runner.run(second)
    scheduler.commit(first, sampled)
    scheduler.add(two)
    third = scheduler.schedule()
    assert shape(third) == [("one", 10, 1, True), ("two", 8, 2, True)] and Copy("states", SEATS, two.seat) in third.copies
    tokens = runner.run(third)
    scheduler.commit(second, later)
    scheduler.commit(third, tokens)
    runner.finish(limit=10)
    assert one.tokens == alone(range(10), 3) and two.tokens == alone(range(10), 3, seed=1)


def test_who_gave_way_comes_back_to_what_is_kept() -> None:
    scheduler, runner = make_scheduler(blocks=7)
    one, two = make_request("one", range(10), 6), make_request("two", range(100, 110), 6)
    scheduler.add(one)
    scheduler.add(two)
    starts = []
    while scheduler.has_work:
        plan, _ = runner.step()
        scheduler.check()
        starts += [(name, start) for name, start, length, _ in shape(plan) if length > 1]
    assert two.preemptions == 1 and starts == [("one", 0), ("two", 0), ("one", 8), ("two", 8), ("two", 8)]
    assert one.tokens == alone(range(10), 6) and two.tokens == alone(range(100, 110), 6)


def test_after_a_failure_or_a_reset_nothing_is_kept() -> None:
    scheduler, runner = make_scheduler()
    for forget in (scheduler.recover, scheduler.store.forget):
        assert [serve(scheduler, runner, list(range(10)))[0][0][0] for _ in range(2)] == [0, 8]
        forget()
        runner.spoil()


def test_books() -> None:
    kept = Kept(3, 2)
    assert [kept.keep(b"a"), kept.keep(b"b"), kept.use(b"a"), kept.keep(b"c")] == [3, 4, 3, 4]
    assert b"b" not in kept and kept.items() == [(b"a", 3), (b"c", 4)]
    with pytest.raises(PoolError, match="states are kept twice"):
        kept.keep(b"a")
    kept.check()
    kept._free.append(4)
    with pytest.raises(PoolError, match=r"states are kept at \[3, 4\], and \[4\] are free"):
        kept.check()
