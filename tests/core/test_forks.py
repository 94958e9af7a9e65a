"""Completions of one request: they share what is common, and copy a block when they write into it. Blocks have 4 tokens."""

from __future__ import annotations

import pytest

from appliance.core.request import Request
from appliance.core.scheduler import Scheduler
from appliance.core.store import Copy
from tests.core.fake_model import alone, make_request, make_scheduler, moves, shape


def add_siblings(scheduler: Scheduler, n: int, prompt: int, max_tokens: int, *, beam: bool = False) -> list[Request]:
    group: list[Request] = []
    for i in range(n):
        leader = group[0] if group else None
        group.append(make_request("r", range(prompt), max_tokens, index=i, seed=i, leader=leader, beam=beam))
        scheduler.add(group[-1])
    return group


def ranges(plan) -> list[tuple[int, int, int]]:  # type: ignore[no-untyped-def]
    return [(c.request.index, c.start, c.length) for c in plan.chunks]


@pytest.mark.parametrize("caching", [True, False])
def test_siblings_wait_for_the_prompt_and_share_it(caching: bool) -> None:
    scheduler, runner = make_scheduler(budget=4, caching=caching)
    group = add_siblings(scheduler, 3, prompt=6, max_tokens=4)
    assert ranges(runner.step()[0]) == [(0, 0, 4)]
    assert ranges(runner.step()[0]) == [(0, 4, 2)], "2 tokens of the budget are left, but the prompt is not there yet"
    plan, _ = runner.step()
    assert ranges(plan) == [(0, 6, 1), (1, 5, 1), (2, 5, 1)], "each computes the last prompt token, and draws its own next one"
    second = group[0].blocks[1]
    assert moves(plan) == [Copy("copy", second, group[1].blocks[1]), Copy("copy", second, group[2].blocks[1])]
    assert len({r.blocks[0] for r in group}) == 1 and len({r.blocks[1] for r in group}) == 3 and scheduler.pool.used == 4
    assert [r.cached for r in group] == [0, 5, 5]
    found = scheduler.prompt_tokens_looked_up, scheduler.prompt_tokens_found
    assert found == ((18, 10) if caching else (0, 0)), "rates are those of the prefix cache"
    runner.finish(limit=10)
    assert [r.tokens for r in group] == [alone(range(6), 4, seed=i) for i in range(3)]


def test_a_prompt_of_whole_blocks_and_one_token_copies_nothing() -> None:
    scheduler, runner = make_scheduler()
    group = add_siblings(scheduler, 3, prompt=9, max_tokens=4)
    runner.step()
    plan, _ = runner.step()
    assert ranges(plan) == [(0, 9, 1), (1, 8, 1), (2, 8, 1)] and moves(plan) == [] and scheduler.pool.used == 5
    runner.finish(limit=10)
    assert [r.tokens for r in group] == [alone(range(9), 4, seed=i) for i in range(3)]


@pytest.mark.parametrize(("caching", "found"), [(True, 4), (False, 0)])
def test_a_leader_that_ends_at_once(caching: bool, found: int) -> None:
    scheduler, runner = make_scheduler(caching=caching)
    group = add_siblings(scheduler, 3, prompt=6, max_tokens=1)
    assert ranges(runner.step()[0]) == [(0, 0, 6)]
    assert group[0].finished
    assert ranges(runner.step()[0]) == [(1, found, 6 - found), (2, found, 6 - found)]
    assert [r.tokens for r in group] == [alone(range(6), 1, seed=i) for i in range(3)]


def test_a_leader_that_is_aborted_amid_the_prompt() -> None:
    scheduler, runner = make_scheduler(budget=4)
    group = add_siblings(scheduler, 3, prompt=6, max_tokens=2)
    runner.step()
    scheduler.abort("r", 0)
    assert ranges(runner.step()[0]) == [(1, 0, 4)]
    runner.finish(limit=20)
    assert [r.tokens for r in group[1:]] == [alone(range(6), 2, seed=i) for i in (1, 2)]


def test_the_prompt_of_a_preempted_leader() -> None:
    """It comes back first, and the others wait for it again."""
    scheduler, runner = make_scheduler(blocks=4, priorities=True, seqs=2)
    group = add_siblings(scheduler, 2, prompt=10, max_tokens=3)
    runner.step()
    urgent = make_request("urgent", range(8), 2, priority=-1)
    scheduler.add(urgent)
    assert shape(runner.step()[0]) == [("urgent", 0, 8, True)] and not group[0].running
    runner.finish(limit=30)
    assert [r.tokens for r in group] == [alone(range(10), 3, seed=i) for i in range(2)] and urgent.tokens == alone(range(8), 2)


def decide(scheduler: Scheduler, group: list[Request], parents: list[int], told: list[int]) -> None:
    assert all(r.held for r in group)
    scheduler.branch([(child, group[parent], token) for child, parent, token in zip(group, parents, told, strict=True)])
    scheduler.check()


def test_beams_go_on_from_any_of_them() -> None:
    scheduler, runner = make_scheduler()
    group = add_siblings(scheduler, 3, prompt=6, max_tokens=9, beam=True)
    runner.step()
    assert [r.held for r in group] == [True, False, False]
    plan, _ = runner.step()
    assert ranges(plan) == [(1, 5, 1), (2, 5, 1)], "the first waits for the others"
    decide(scheduler, group, [0, 0, 2], [70, 71, 72])
    assert [r.tokens[6:] for r in group] == [[70], [71], [72]] and group[0].blocks == group[1].blocks
    held = group[1].blocks[1]
    plan, _ = runner.step()
    assert ranges(plan) == [(0, 6, 1), (1, 6, 1), (2, 6, 1)]
    assert moves(plan) == [Copy("copy", held, group[0].blocks[1])] and group[1].blocks[1] == held, "the last one keeps it"
    decide(scheduler, group, [1, 2, 1], [80, 81, 82])
    assert [r.tokens[6:] for r in group] == [[71, 80], [72, 81], [71, 82]]
    runner.step()
    scheduler.abort("r")
    assert scheduler.pool.used == 0


def test_beams_do_not_run_ahead_of_the_decision() -> None:
    scheduler, runner = make_scheduler()
    add_siblings(scheduler, 1, prompt=6, max_tokens=9, beam=True)
    first = scheduler.schedule()
    runner.run(first)
    assert scheduler.schedule().chunks == (), "what comes after the token under way is the group's to say"


@pytest.mark.parametrize(("host", "seqs"), [(0, 8), (8, 8), (8, 1)])
def test_beams_that_do_not_fit_together_take_turns(host: int, seqs: int) -> None:
    """Three of up to 4 blocks in a pool of 4: who waits for the others gives way to them."""
    scheduler, runner = make_scheduler(blocks=4, host=host, seqs=seqs)
    group = add_siblings(scheduler, 3, prompt=8, max_tokens=8, beam=True)
    for round in range(7):
        for _ in range(20):
            if all(r.held for r in group):
                break
            plan, _ = runner.step()
            assert all(chunk.length > 0 for chunk in plan.chunks)
            scheduler.check()
        decide(scheduler, group, [2, 0, 1], [10 * round + i for i in range(3)])
    assert [len(r.tokens) for r in group] == [15] * 3
    assert scheduler.num_preemptions > 0


def test_a_failed_step_ends_who_runs_and_nobody_else() -> None:
    scheduler, runner = make_scheduler(blocks=4, host=8, caching=True)
    requests = [make_request(name, range(i, i + 7), 5) for i, name in enumerate("abc")]
    for request in requests:
        scheduler.add(request)
    for _ in range(3):
        runner.step()
    assert [r.request_id for r in scheduler.running] == ["a"] and requests[1].host
    scheduler.schedule()
    assert scheduler.recover() == [requests[0]] and requests[0].finish_reason == "error"
    runner.spoil()
    scheduler.check()
    assert scheduler.pool.used == scheduler.pool.kept == 0 and not requests[1].host
    assert runner.finish(limit=30) == requests[1:]
    assert [r.tokens for r in requests[1:]] == [alone(range(i, i + 7), 5) for i in (1, 2)]
