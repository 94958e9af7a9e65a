"""What the audit of a scheduler's books sees."""

from __future__ import annotations

import pytest

from appliance.core.blocks import PoolError
from appliance.core.request import Request
from appliance.core.scheduler import Scheduler
from tests.core.fake_model import make_request, make_scheduler


def damage_owner(scheduler: Scheduler, r: Request) -> None:
    r.blocks[0] = scheduler.running[1].blocks[0]


def damage_leak(scheduler: Scheduler, r: Request) -> None:
    scheduler.pool.allocate(1)


def damage_missing(scheduler: Scheduler, r: Request) -> None:
    scheduler.pool.release([r.blocks.pop()])


def damage_waiting(scheduler: Scheduler, r: Request) -> None:
    scheduler.waiting[0].computed = 1


def damage_order(scheduler: Scheduler, r: Request) -> None:
    scheduler.running.reverse()


def damage_limit(scheduler: Scheduler, r: Request) -> None:
    scheduler.max_num_seqs = 1


def damage_landed(scheduler: Scheduler, r: Request) -> None:
    r.landed += 1


def damage_computed(scheduler: Scheduler, r: Request) -> None:
    r.computed += 2


def damage_host_leak(scheduler: Scheduler, r: Request) -> None:
    assert scheduler.store.host is not None
    scheduler.store.host.allocate(1)


def damage_host_owner(scheduler: Scheduler, r: Request) -> None:
    r.host.append(0)


def damage_lost(scheduler: Scheduler, r: Request) -> None:
    scheduler.waiting.clear()


def damage_twice(scheduler: Scheduler, r: Request) -> None:
    r.blocks[1] = r.blocks[0]


def damage_beyond(scheduler: Scheduler, r: Request) -> None:
    r.blocks[1] = 10**9


def damage_below(scheduler: Scheduler, r: Request) -> None:
    r.blocks[1] = -(10**9)


def damage_flag(scheduler: Scheduler, r: Request) -> None:
    scheduler.waiting[0].held = True


def damage_counted(scheduler: Scheduler, r: Request) -> None:
    scheduler.store.swapped = 1


def damage_seat(scheduler: Scheduler, r: Request) -> None:
    r.seat = scheduler.running[1].seat


def damage_seat_lost(scheduler: Scheduler, r: Request) -> None:
    scheduler.abort("b")
    scheduler.seats.clear()


def damage_seat_waiting(scheduler: Scheduler, r: Request) -> None:
    scheduler.waiting[0].seat = 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_owner, "owned"),
        (damage_leak, "owned"),
        (damage_missing, "expected 2 to 2"),
        (damage_landed, "6 tokens landed, 5 computed"),
        (damage_computed, "7 computed, 6 known"),
        (damage_host_leak, "1 blocks in use, 0 owned"),
        (damage_host_owner, "expected 2 to 2"),
        (damage_lost, "not all requests"),
        (damage_twice, "owns a block twice"),
        (damage_beyond, "a block that there is not"),
        (damage_below, "a block that there is not"),
        (damage_waiting, "waits with 0 blocks and 1 tokens"),
        (damage_order, "order of arrival"),
        (damage_limit, "more than 1"),
        (damage_flag, "not where its flags say"),
        (damage_seat, r"seats \[1, 1\] are taken and \[\] free, of 2"),
        (damage_seat_lost, r"seats \[0\] are taken and \[\] free, of 2"),
        (damage_seat_waiting, "waits with seat 0"),
        (damage_counted, "1 requests counted in host memory, 0 are"),
    ],
)
def test_check_sees_damage(damage, message: str) -> None:  # type: ignore[no-untyped-def]
    scheduler, runner = make_scheduler(seqs=2, host=2)
    for name in "abc":
        scheduler.add(make_request(name, range(5), 3))
    runner.step()
    scheduler.check()
    damage(scheduler, scheduler.running[0])
    with pytest.raises(PoolError, match=message):
        scheduler.check()
