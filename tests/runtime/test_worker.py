"""The engine in a process of its own: right answers, refusals, aborts, deaths, and a quiet end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

from appliance.config import EngineConfig
from appliance.core.messages import Event, Submit
from appliance.core.params import RequestError, SamplingParams, StructuredOutputsParams
from appliance.runtime import engine, worker
from appliance.runtime.client import Client, EngineDied
from appliance.runtime.grammar import Grammars
from appliance.text.grammar import compile_grammar, deep_thread
from quant.errors import InputError
from tests.runtime.conftest import submit
from tests.tiny_model import Shape, make_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With room for answers that do not end by themselves while a test looks at them, however long it takes to do so."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), shape=Shape(max_len=4096))


def config(model: Path, **options: Any) -> EngineConfig:
    settings = {"dtype": "float32", "reference_ops": True, "max_model_len": 4096, "kv_cache_memory_bytes": 16 << 20, "threads": 1}
    return EngineConfig(model=str(model), **{**settings, **options})


async def collect(client: Client, one: Submit) -> list[Event]:
    return [event async for event in client.generate(one)]


def tokens(news: list[Event]) -> list[int]:
    return [token for event in news for token in event.token_ids]


async def until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.02)


def test_a_life(tiny: Path) -> None:
    """One process for many checks: starting it takes seconds."""

    async def life() -> None:
        client = Client(config(tiny))
        assert client.state == "unloaded"
        with pytest.raises(EngineDied, match="unloaded"):
            await collect(client, submit("early", [3]))
        await client.start()
        assert client.state == "ready" and client.info is not None and client.info.max_model_len == 4096
        assert client.loading[0] == client.loading[1] > 0
        assert client.info.plan["found_bytes"]["runtime"] > 1 << 20  # type: ignore[index]  # a process of its own can tell
        try:
            await answers_together(client)
            await refusals(client)
            await leaving(client)
            await several(client)
            await falling_behind(client)
            await idle(client)
            short = asyncio.create_task(collect(client, submit("short", [3], max_tokens=5)))
            await asyncio.sleep(0)
        finally:
            begun = time.monotonic()
            await client.stop(drain_s=10)
        assert (await short)[-1].finish_reason == "length"  # what runs is let finish
        assert time.monotonic() - begun < 10 and client.state == "stopped"
        assert client._process is not None and client._process.returncode == 0

    asyncio.run(life())


async def answers_together(client: Client) -> None:
    alone = await collect(client, submit("alone", [7, 8, 9]))
    many = await asyncio.gather(*(collect(client, submit(f"m{i}", [7, 8, 9], n=1)) for i in range(20)))
    for news in many:
        assert tokens(news) == tokens(alone)
    both = await collect(client, submit("two", [7, 8], n=2, temperature=1.0))
    assert sorted(e.index for e in both if e.finish_reason) == [0, 1]
    assert client.active == 0


async def refusals(client: Client) -> None:
    with pytest.raises(RequestError, match="maximum context length is 4096") as error:
        await collect(client, submit("long", [3] * 5000))
    assert (error.value.param, error.value.code, error.value.status) == ("prompt", "context_length_exceeded", 400)
    endless = client.generate(submit("twice", [3], max_tokens=3800))
    await anext(endless)
    with pytest.raises(RequestError, match="already in use"):
        await collect(client, submit("twice", [3]))
    await endless.aclose()


async def leaving(client: Client) -> None:
    """A client that goes away frees its blocks; a request may also be ended from outside."""
    stream = client.generate(submit("leaver", [3] * 40, max_tokens=3800))
    await anext(stream)
    await stream.aclose()
    ended = client.generate(submit("ended", [4], max_tokens=3800))
    await anext(ended)
    client.abort("ended")
    assert [event.finish_reason async for event in ended][-1] == "abort"
    working = asyncio.Event()

    async def listen() -> None:
        async for _ in client.generate(submit("cancelled", [4], max_tokens=3800)):
            working.set()

    cancelled = asyncio.create_task(listen())
    await working.wait()
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    await collect(client, submit("after", [4], max_tokens=2))
    stats = await client.stats()
    assert stats.blocks_used == 0 and stats.running == stats.waiting == 0
    assert stats.finished["abort"] >= 3


async def several(client: Client) -> None:
    """More completions than are asked for, beams, and a cache that is forgotten: each stream ends when all have ended."""
    news = await collect(client, submit("best", [7, 8], n=1, best_of=3, temperature=1.0, max_tokens=3))
    assert sorted(e.index for e in news if e.finish_reason) == [0, 1, 2] and all(e.logprobs for e in news)
    beams = submit("beams", range(3, 60), n=3, use_beam_search=True, max_tokens=6)
    first = await collect(client, beams)
    assert [(e.index, len(e.token_ids), e.finish_reason) for e in first] == [(i, 6, "length") for i in range(3)]
    again = await collect(client, beams)
    client.reset_prefix_cache()
    afresh = await collect(client, beams)
    assert [e.token_ids for e in first] == [e.token_ids for e in again] == [e.token_ids for e in afresh]
    assert [news[0].cached_tokens for news in (first, again, afresh)] == [0, 48, 0]
    gone = client.generate(submit("gone", [5], n=3, use_beam_search=True, max_tokens=3800))
    task = asyncio.ensure_future(anext(gone))
    await asyncio.sleep(0.05)
    client.abort("gone", 2)
    assert (await task).finish_reason == "abort" and [e.finish_reason async for e in gone] == ["abort", "abort"]
    assert (await client.stats()).blocks_used == 0


async def falling_behind(client: Client) -> None:
    """What came while nobody looked is told together, and is the same."""
    one = submit("slow", [7, 8, 9], max_tokens=60, logprobs=0)
    usual = await collect(client, one)
    late, stream = [], client.generate(one)
    async with contextlib.aclosing(stream):
        async for event in stream:
            late.append(event)
            time.sleep(0.05)  # the whole event loop
    assert tokens(late) == tokens(usual) and len(late) < len(usual) and late[-1].finish_reason == "length"
    assert [p.token_id for e in late for p in e.logprobs or ()] == tokens(usual)
    assert [e.scheduled is not None for e in late] == [True] + [False] * (len(late) - 1)


async def idle(client: Client) -> None:
    """Nothing to do means no processor time at all; in one of three times, as what a busy host takes away can count, too."""
    assert client._process is not None
    process, found = psutil.Process(client._process.pid), []
    for _ in range(3):
        before = sum(process.cpu_times()[:2])
        await asyncio.sleep(1.0)
        found.append(sum(process.cpu_times()[:2]) - before)
        if found[-1] < 0.05:
            return
    pytest.fail(f"processor seconds: {found}")


def test_death_is_told_to_everyone_who_waits(tiny: Path) -> None:
    async def life() -> None:
        client = Client(config(tiny))
        await client.start()
        assert client._process is not None
        waiting = [asyncio.create_task(collect(client, submit(f"w{i}", [3], max_tokens=3800))) for i in range(3)]
        await until(lambda: client._stats.running == 3)
        os.kill(client._process.pid, signal.SIGKILL)
        results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 60)
        assert all(isinstance(r, EngineDied) and "exit code -9" in str(r) for r in results)
        assert client.state == "dead"
        with pytest.raises(EngineDied):
            await collect(client, submit("late", [3]))
        await client.stop()

    asyncio.run(life())


def test_a_model_that_cannot_be_loaded(tmp_path: Path, tiny: Path) -> None:
    async def life() -> None:
        client = Client(config(tmp_path / "nothing"))
        with pytest.raises(InputError, match="nothing"):
            await client.start()
        await client.stop()
        client = Client(config(tiny, max_model_len=100_000))
        with pytest.raises(InputError, match="100000"):
            await client.start()
        await client.stop()

    asyncio.run(life())


@pytest.mark.parametrize(("each_time", "what"), [(0.0, "uses no processor time"), (1.0, "finishes no step")])
async def test_a_stuck_engine_is_found_although_nobody_waits_for_long(
    each_time: float, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is stopped, and one that computes without an end: its processor time grows with each look."""
    looks = count()
    used = Mock(cpu_times=lambda: (each_time * next(looks), 0.0))
    monkeypatch.setattr("appliance.runtime.client.psutil.Process", lambda pid: used)
    client = Client(EngineConfig(), step_timeout=0.4)
    client._process = subprocess.Popen(["sleep", "60"])
    client.state = "ready"
    try:
        for k in range(60):
            client.submit(submit(str(k), [3]), lambda item: None)
            await asyncio.sleep(0.05)
            client.close(str(k), abort=True)
            if client._process.poll() is not None:
                break
        assert client._process.wait(60) == -signal.SIGKILL and f"the engine is stuck: it has work, but {what}" in (
            client.failure or ""
        )
    finally:
        client._process.kill()


async def test_an_idle_engine_that_is_stopped_is_found_when_somebody_asks(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And when it goes on, that is seen, too."""
    monkeypatch.setattr("appliance.runtime.client.STUCK_S", 0.3)
    monkeypatch.setattr("appliance.runtime.client.LOOK_S", 0.1)
    client = Client(config(tiny), step_timeout=60.0)
    await client.start()
    process = client._process
    assert process is not None and not client.stuck
    try:
        heard = client._heard
        for _ in range(3):
            client.nudge()  # the second and third find it asked already, or answered
        while client._owed:
            await asyncio.sleep(0.01)
        assert client._heard > heard and not client.stuck and client.active == 0
        await asyncio.sleep(0)
        process.send_signal(signal.SIGSTOP)
        client.nudge()
        while not client.stuck:
            await asyncio.sleep(0.05)
        assert client.state == "ready" and process.poll() is None
        process.send_signal(signal.SIGCONT)
        while client.stuck:
            await asyncio.sleep(0.05)
        assert client.state == "ready" and client.failure is None
    finally:
        process.send_signal(signal.SIGCONT)
        await client.stop()


async def test_an_engine_that_answers_is_not_stuck() -> None:
    client = Client(EngineConfig(), step_timeout=0.4)
    client._process = subprocess.Popen(["sleep", "60"])
    client.state = "ready"
    try:
        client.submit(submit("a", [3]), lambda item: None)
        for _ in range(12):
            await asyncio.sleep(0.1)
            client._inbox.append(("events", [], None))
            client._take_all()
        client.close("a", abort=False)
        await asyncio.sleep(0.6)
        assert client._process.poll() is None and client.failure is None
    finally:
        client._process.kill()


def test_grammars_are_prepared_when_nothing_is_asked(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and not while somebody waits: neither before the first answer nor beside it."""
    events: list[str] = []
    messages: list[Any] = [submit("a", [3, 4], max_tokens=3), submit("b", [5], max_tokens=2), None, None]

    def poll(seconds: float | None) -> bool:
        if seconds != worker.QUIET_S:
            return seconds is None or messages[0] is not None
        events.append("quiet" if messages[0] is None else "asked")
        return messages[0] is not None

    def recv() -> Any:
        message = messages.pop(0)
        events.append("end" if message is None else message.request_id)
        return message

    asked = iter([(config(tiny), 20)])
    conn = Mock(poll=poll, recv=lambda: next(asked, None) or recv())
    monkeypatch.setattr(worker, "send_lines", lambda level: None)
    monkeypatch.setattr(engine.Engine, "prepare", lambda self: events.append("prepared"))
    worker.serve(conn)
    assert events == ["asked", "a", "b", "quiet", "prepared", "end"]


@pytest.mark.parametrize("prepared", [False, True], ids=["asked for", "prepared"])
def test_reading_a_vocabulary_is_told_before_and_behind(tiny: Path, monkeypatch: pytest.MonkeyPatch, prepared: bool) -> None:
    """For the thread that tells may not have its turn meanwhile."""
    events: list[Any] = []
    structured = StructuredOutputsParams(choice=["yes", "no"])
    params = SamplingParams(max_tokens=4, structured_outputs=structured, grammar=compile_grammar(structured))
    messages = [Submit("guided", (3, 4), params, 0.0), submit("plain", [5], max_tokens=2), None]
    read = Grammars._read

    def reads(self: Grammars) -> None:
        if self._vocabulary is None:
            events.append("reads")
        read(self)

    def poll(seconds: float | None) -> bool:
        if seconds == worker.QUIET_S:
            return not prepared
        if seconds is None and prepared:
            deep_thread().submit(int).result()  # what is under way is done before somebody asks
        return seconds is None

    def send(message: tuple[Any, ...]) -> None:
        events.extend([message] if message[0] == "reading" else ())
        assert message[0] != "events" or not any(event.error for event in message[1])

    asked = iter([(config(tiny), 20)])
    conn = Mock(poll=poll, recv=lambda: next(asked, None) or messages.pop(0), send=send)
    monkeypatch.setattr(worker, "send_lines", lambda level: None)
    monkeypatch.setattr(Grammars, "_read", reads)
    worker.serve(conn)
    assert events == [("reading", True), "reads", ("reading", False)]


async def test_an_engine_that_reads_a_vocabulary_is_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until that takes far too long, or it has said that it is done."""
    client = Client(EngineConfig(), step_timeout=0.2)
    client._process = subprocess.Popen(["sleep", "60"])
    client.state = "ready"
    try:
        client._inbox.append(("reading", True))
        client.submit(submit("a", [3]), lambda item: None)
        client._take_all()
        await asyncio.sleep(1)
        assert client._process.poll() is None and client.failure is None
        monkeypatch.setattr("appliance.runtime.client.READING_S", 0.2)
        while client._process.poll() is None:
            await asyncio.sleep(0.02)
        assert "the engine is stuck: it has work" in (client.failure or "")
    finally:
        client._process.kill()


def test_whatever_fails_while_loading_is_told(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, also what is of no kind that anybody foresaw."""
    for error, told in (
        (subprocess.CalledProcessError(1, ["gcc"]), "CalledProcessError: Command '['gcc']' returned non-zero exit status 1."),
        (InputError("--device: no"), "--device: no"),
        (RuntimeError("CUDA error: unknown"), "CUDA error: unknown"),
        (KeyError("x"), "KeyError: 'x'"),
    ):
        conn = Mock(recv=Mock(return_value=(config(tiny), 20)))
        monkeypatch.setattr(worker, "send_lines", lambda level: None)
        monkeypatch.setattr(engine.Engine, "load", Mock(side_effect=error))
        worker.serve(conn)
        conn.send.assert_called_once_with(("failed", told, isinstance(error, InputError)))
