"""When news is told: at once where there is time for it, together where the engine has all processors."""

from __future__ import annotations

import asyncio
import os
from unittest.mock import Mock

import pytest

from appliance.config import EngineConfig
from appliance.core.messages import Event
from appliance.runtime import pace
from appliance.runtime.client import Client
from appliance.runtime.pace import LATE_S, SHARE, Pace, pace_beside
from tests.runtime.conftest import submit


class Clock:
    """Both clocks of a thread, which works as long as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.spent = 100.0
        monkeypatch.setattr(pace, "time", Mock(monotonic=lambda: self.now, thread_time=lambda: self.spent))

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.spent += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def course(clock: Clock, one: Pace, *, step: float, cost: float, steps: int) -> tuple[int, float, float]:
    """(tellings, share of the time, longest wait) for news every ``step`` seconds, each telling taking ``cost``."""
    told, spent, begun, longest = 0, clock.spent, clock.now, 0.0
    ready: float | None = None
    for _ in range(steps):
        clock.now += step
        ready = clock.now if ready is None else ready
        while wait := one.wait():
            if wait > step:  # the next step comes before
                break
            clock.now += wait
        else:
            told, longest, ready = told + 1, max(longest, clock.now - ready), None
            clock.work(cost)
    return told, (clock.spent - spent) / (clock.now - begun), longest


def test_telling_takes_no_more_than_its_share(clock: Clock) -> None:
    told, share, longest = course(clock, Pace(0.1), step=0.004, cost=0.002, steps=1000)
    assert share <= 0.101 and 150 <= told <= 300 and longest <= LATE_S


def test_news_is_never_late(clock: Clock) -> None:
    told, _, longest = course(clock, Pace(0.1), step=0.004, cost=0.05, steps=1000)
    assert told > 300 and longest <= LATE_S  # telling takes longer than all steps since: it goes on, one telling after the other


def test_where_there_is_time_each_step_is_told_at_once(clock: Clock) -> None:
    assert course(clock, Pace(0.1), step=0.05, cost=0.002, steps=100)[::2] == (100, 0.0)
    assert course(clock, Pace(), step=0.004, cost=0.002, steps=100)[::2] == (100, 0.0)


def test_only_where_the_engine_has_all_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "allowed_processors", lambda: 4)
    assert pace_beside("cpu", 4).share == SHARE and pace_beside("cpu", 8).share == SHARE
    assert pace_beside("cpu", 3).share == 1.0 and pace_beside("cuda", 4).share == 1.0


class Held(Pace):
    """Says so long, once, that it is too early."""

    def __init__(self, wait: float) -> None:
        super().__init__()
        self.waits = [wait]

    def wait(self) -> float:
        return self.waits.pop() if self.waits else 0.0


async def hears(client: Client, *ids: int, reason: str | None = None) -> None:
    client._inbox.append(("events", [Event("a", 0, ids, finish_reason=reason)], None))
    client._hear()


def waiting(wait: float) -> tuple[Client, list[Event | Exception]]:
    client, got = Client(EngineConfig()), list[Event | Exception]()
    client.state, client._pace, client._process = "ready", Held(wait), Mock(pid=os.getpid(), returncode=1)
    client._ready = asyncio.get_running_loop().create_future()
    client._ready.set_result(None)
    client.submit(submit("a", [3]), got.append)
    return client, got


async def test_news_that_waits_is_told_together_and_in_order() -> None:
    client, got = waiting(0.05)
    await hears(client, 1)
    await hears(client, 2)
    await hears(client, 3, reason="length")
    assert got == []
    await asyncio.sleep(0.2)
    assert got == [Event("a", 0, (1, 2)), Event("a", 0, (3,), finish_reason="length")]
    await hears(client, 4)
    assert got[2:] == [Event("a", 0, (4,))]


async def test_the_last_words_of_an_engine_that_dies_come_before_its_death() -> None:
    client, got = waiting(30.0)
    await hears(client, 1)
    client._gone()
    assert got[0] == Event("a", 0, (1,)) and isinstance(got[1], Exception) and len(got) == 2
    assert client._later is None
