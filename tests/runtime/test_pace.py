"""When news is told: at once where there is time for it, together where the engine has all processors."""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import struct
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from unittest.mock import Mock

import pytest

from appliance.config import EngineConfig
from appliance.core.messages import Event
from appliance.runtime import pace
from appliance.runtime.client import Client
from appliance.runtime.pace import LATE_S, SHARE, SLICE_NS, Pace, come_first, pace_beside
from tests.runtime.conftest import submit


class Clock:
    """Both clocks of a thread, which works as long as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.spent = 100.0
        monkeypatch.setattr(pace, "time", Mock(thread_time=lambda: self.spent))

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.spent += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def course(clock: Clock, one: Pace, *, step: float, cost: float, steps: int) -> tuple[int, float, float]:
    """(tellings, share of the time, longest wait) for news every ``step`` seconds, each telling taking ``cost``."""
    told, spent, begun, longest = 0, clock.spent, clock.now, 0.0
    free = clock.now  # the reader has rested then
    ready: float | None = None
    for k in range(1, steps + 1):
        come = begun + k * step
        ready = come if ready is None else ready
        if max(clock.now, free) >= come + step:  # the next step comes before it is read, or before the loop has told the last
            continue
        clock.now = max(clock.now, come, free)
        told, longest, ready = told + 1, max(longest, clock.now - ready), None
        rest = clock.now
        one.tell()
        clock.work(cost)
        free = rest + one.rest()
    return told, (clock.spent - spent) / (clock.now - begun), longest


def test_telling_takes_no_more_than_its_share(clock: Clock) -> None:
    told, share, longest = course(clock, Pace(0.1), step=0.004, cost=0.002, steps=1000)
    assert share <= 0.101 and 150 <= told <= 300 and longest <= LATE_S


def test_news_is_never_late(clock: Clock) -> None:
    told, share, longest = course(
        clock, Pace(0.1), step=0.004, cost=0.05, steps=1000
    )  # telling takes longer than all steps since
    assert told == 81 and share > 0.99 and longest <= 0.05  # it goes on, one telling after the other
    told, _, longest = course(clock, Pace(0.01), step=0.004, cost=0.002, steps=1000)
    assert told > 100 and longest <= LATE_S


def test_where_there_is_time_each_step_is_told_at_once(clock: Clock) -> None:
    assert course(clock, Pace(0.1), step=0.05, cost=0.002, steps=100)[::2] == (100, 0.0)
    assert course(clock, Pace(), step=0.004, cost=0.002, steps=100)[::2] == (100, 0.0)


def test_only_where_the_engine_has_all_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "allowed_processors", lambda: 4)
    assert pace_beside("cpu", 4).share == SHARE and pace_beside("cpu", 8).share == SHARE
    assert pace_beside("cpu", 3).share == 1.0 and pace_beside("cuda", 4).share == 1.0


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="asks the kernel by its number of a call")
@pytest.mark.skipif(tuple(map(int, platform.release().split(".")[:2])) < (6, 12), reason="the kernel takes no notice")
def test_an_engines_threads_come_first() -> None:
    """The thread's own, and one that it starts; others have what they had, and the priority stays."""

    def asked() -> tuple[int, int]:
        attributes = ctypes.create_string_buffer(48)
        assert ctypes.CDLL(None).syscall(315, 0, attributes, len(attributes), 0) == 0  # sched_getattr
        _, _, _, nice, _, length, _, _ = struct.unpack("=IIQiIQQQ", attributes.raw)
        return nice, length

    def engine() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 3)
        come_first()
        for _ in range(2):
            found.append(asked())
            later = threading.Thread(target=lambda: found.append(asked()))
            later.start()
            later.join()

    found: list[tuple[int, int]] = []
    before = asked()
    thread = threading.Thread(target=engine)
    thread.start()
    thread.join()
    assert found == [(3, SLICE_NS)] * 4 and asked() == before != (3, SLICE_NS)


class Held(Pace):
    """Rests after the first news until it is to go on."""

    def __init__(self) -> None:
        super().__init__(SHARE)
        self.go_on, self.rests = threading.Event(), [0.001]

    def rest(self) -> float:
        if not self.rests:
            return 0.0
        assert self.go_on.wait(60)
        return self.rests.pop()


async def waiting() -> tuple[Client, list[Event | Exception], Connection, threading.Event]:
    """A client whose engine is the other end of a pipe, what a request of it has got, and what ends its reader's rest."""
    held, client, got = Held(), Client(EngineConfig()), list[Event | Exception]()
    client._conn, engine = Pipe()
    client.state, client._pace, client._process = "ready", held, Mock(pid=os.getpid(), returncode=1)
    client._ready = asyncio.get_running_loop().create_future()
    client._ready.set_result(None)
    client.submit(submit("a", [3]), got.append)
    threading.Thread(target=client._read, args=(asyncio.get_running_loop(),), daemon=True).start()
    return client, got, engine, held.go_on


def says(engine: Connection, *ids: int, reason: str | None = None) -> None:
    engine.send(("events", [Event("a", 0, ids, finish_reason=reason)], None))


async def until(got: list[Event | Exception], count: int) -> None:
    while len(got) < count:
        await asyncio.sleep(0.001)


async def test_news_that_waits_is_told_together_and_in_order() -> None:
    _, got, engine, go_on = await waiting()
    says(engine, 1)
    await until(got, 1)  # the reader rests
    says(engine, 2)
    says(engine, 3)
    says(engine, 4, reason="length")
    go_on.set()
    await until(got, 3)
    assert got == [Event("a", 0, (1,)), Event("a", 0, (2, 3)), Event("a", 0, (4,), finish_reason="length")]
    says(engine, 5)
    await until(got, 4)
    assert got[3:] == [Event("a", 0, (5,))]
    engine.close()


async def test_the_last_words_of_an_engine_that_dies_come_before_its_death() -> None:
    client, got, engine, go_on = await waiting()
    says(engine, 1)
    says(engine, 2)
    engine.close()
    go_on.set()
    await until(got, 2)
    await client.wait_ended()
    told = [token for event in got[:-1] if isinstance(event, Event) for token in event.token_ids]
    assert told == [1, 2] and isinstance(got[-1], Exception)
