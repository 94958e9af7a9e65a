"""How long a turn is, on a clock: those who wait come soon, and little of the time goes into computing what was there before."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from appliance.core.request import Request
from appliance.core.scheduler import Scheduler
from appliance.core.step import Return
from appliance.memory.giving_way import RETURNS, GivingWay
from tests.core.fake_model import make_request, make_scheduler

COST = GivingWay(copy_s=0.02, read_s=0.005, step_s=1.0, linear_s=0.025, pair_s=1e-5)
"""A step of single tokens takes 1 s and as much again with 200 blocks; 400 tokens of a prompt take 10.8 s."""


@dataclass
class Told:
    seconds: float = 0.0  # in all
    again: float = 0.0  # of these, for tokens that had been computed before
    copies: float = 0.0  # and to the host and back
    waited: float = 0.0  # the longest time between two tokens, or until the first one
    turns: int = 0  # preemptions


def replay(scheduler: Scheduler, requests: list[Request]) -> Told:
    """Serve them on a clock that goes by COST."""
    told, last, most = Told(), dict.fromkeys(requests, 0.0), dict.fromkeys(requests, 0)
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        plan = scheduler.schedule()
        read = COST.step_s + scheduler.pool.used * COST.read_s
        copies = sum(copy.kind in ("out", "in") for copy in plan.copies) * COST.copy_s
        told.copies += copies
        told.seconds += copies
        for request, start, length, *_ in plan.chunks:
            took = COST.recompute_s(start + length) - COST.recompute_s(start) if length > 1 else 0.0
            before = max(0, min(most[request], start + length) - start)
            told.again += took * before / length
            told.seconds += took
            most[request] = max(most[request], start + length)
        told.seconds += read if plan.chunks else 0.0
        scheduler.commit(plan, [1 if chunk.samples else None for chunk in plan.chunks])
        for request in (chunk.request for chunk in plan.chunks if chunk.samples):
            told.waited = max(told.waited, told.seconds - last[request])
            last[request] = told.seconds
        told.turns += len(plan.preempted)
    return told


def four(answer: int = 400, **options: object) -> tuple[Scheduler, list[Request]]:
    """Four of 400 tokens and their answers, where only one and a half have room."""
    scheduler, _ = make_scheduler(blocks=220, budget=64, watermark=0.0, **options)
    return scheduler, [make_request(str(i), range(1000 * i, 1000 * i + 400), answer) for i in range(4)]


def test_turns_that_ignore_what_a_return_takes_compute_the_same_again_and_again() -> None:
    told = replay(*four(fair_tokens=5))
    assert told.again > 0.4 * told.seconds, "what the next test is about"


@pytest.mark.parametrize("caching", [False, True])
def test_returns_take_their_share_of_the_time_at_most(caching: bool) -> None:
    told = replay(*four(fair_tokens=5, turn=COST.turn, caching=caching))
    in_order = replay(*four(fair_tokens=10**6, turn=COST.turn, caching=caching))
    assert told.turns >= 12, "turns were taken"
    last = 4 * COST.recompute_s(800)  # what is left of an answer may be less than the last return takes
    assert told.again <= (told.seconds - last) / (1 + RETURNS) + last
    assert told.waited < 0.6 * in_order.waited, "and nobody waits for whole answers"


def test_the_turn_after_a_cheap_return_is_no_longer_for_that() -> None:
    """With room for all in host memory the copies are what a return takes."""
    swapped = replay(*four(fair_tokens=5, turn=COST.turn, host=1000))
    computed = replay(*four(fair_tokens=5, turn=COST.turn))
    assert swapped.again == 0 < swapped.copies < swapped.seconds / (1 + RETURNS) * 1.2
    assert swapped.turns > 1.5 * computed.turns


def test_a_newcomer_waits_for_a_first_turn_only() -> None:
    """Nobody has returned yet: the first turn of the long prompt is as long as any."""
    scheduler, _ = make_scheduler(blocks=220, budget=64, watermark=0.0, fair_tokens=5, turn=lambda back: 10**6)
    old, new = make_request("old", range(600), 200), make_request("new", range(600), 200)
    scheduler.add(old)
    scheduler.add(new)
    steps = 0
    while not new.output_len:
        plan = scheduler.schedule()
        scheduler.commit(plan, [1 if chunk.samples else None for chunk in plan.chunks])
        steps += 1
    assert steps <= 10 + 5 + 10 + 1 and old.output_len == 5


def test_what_a_return_is_worth() -> None:
    """400 tokens again (10.8 s) beside three others, at 2 s a step of four: 21.6 tokens of its own take as long as that."""
    paid = COST.recompute_s(400)
    assert paid == pytest.approx(400 * 0.025 + 400 * 401 / 2 * 1e-5)
    assert COST.turn(Return(0, 400, 0, 4, 200)) == int(RETURNS * paid * 4 / 2.0)
    assert COST.turn(Return(0, 400, 0, 1, 200)) == int(RETURNS * paid / 2.0), "alone: its return held up nobody else"
    assert COST.turn(Return(399, 400, 100, 1, 200)) == pytest.approx(RETURNS * 4.0 / 2.0, abs=1), "copies, there and back"
    assert COST.turn(Return(0, 400, 0, 1, 0)) == int(RETURNS * paid / 1.0), "weights alone are read"
