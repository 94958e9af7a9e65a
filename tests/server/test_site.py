"""Several models of one server: loaded on demand, in turn, making room for each other; engines that die, idle, or cannot load."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from appliance.config import EngineConfig, ServerConfig
from appliance.core.params import RequestError
from appliance.models_file import Entry
from appliance.runtime.client import EngineDied
from appliance.server import host as host_module
from appliance.server.app import app_of
from appliance.server.host import EngineHost
from appliance.server.run import bind
from appliance.server.service import Service
from appliance.server.site import Site
from appliance.server.state import Shared
from appliance.server.stats import models_of
from quant.errors import InputError
from tests.server.fake import VOCAB, FakeClient, info


@dataclass(frozen=True)
class Plan:
    """As much of one as a host needs."""

    total: int
    max_model_len: int = 256
    vocab_size: int = VOCAB


class Engine(FakeClient):
    """One that is started and ended as a real one is."""

    fail: Exception | None = None

    def __init__(self, log: list[str], config: EngineConfig, slow: asyncio.Event | None) -> None:
        super().__init__(state="unloaded")
        self.log, self.name, self.slow, self.info = log, config.revision, slow, None

    async def start(self) -> None:
        self.state = "loading"
        self.log.append(f"load {self.name}")
        if self.slow:
            await self.slow.wait()
        await asyncio.sleep(0)
        if self.fail:
            self.state, self.failure = "dead", str(self.fail)
            self._dead.set()
            raise self.fail
        self.state, self.info = "ready", replace(info(), plan={**info().plan, "max_concurrency": 1.0})

    async def wait_ended(self) -> None:
        await self._dead.wait()

    async def stop(self, drain_s: float = 0.0) -> None:
        if self.state == "ready":
            self.log.append(f"end {self.name}")
        if self.state in ("loading", "ready"):
            self.state = "stopped"
        self._dead.set()


class Street:
    """Models a, b, ... of the sizes given, within a budget; ``log`` has what happened to their engines."""

    def __init__(self, directory: Path, sizes: dict[str, int], budget: int, *, slow: bool = False, **server: Any) -> None:
        self.log: list[str] = []
        self.slow = asyncio.Event() if slow else None
        self.engines: list[Engine] = []
        shared = Shared(ServerConfig())
        self.hosts = {
            name: EngineHost(self._entry(directory, name, server), Plan(size), shared, self._make) for name, size in sizes.items()
        }
        self.site = Site(list(self.hosts.values()), shared, budget)

    def _entry(self, directory: Path, name: str, server: dict[str, Any]) -> Entry:
        engine = EngineConfig(model=str(directory), tokenizer=str(directory), revision=name)
        return Entry(name, engine, replace(ServerConfig(), served_model_name=(name,), **server), "demand")

    def _make(self, config: EngineConfig, step_timeout: float) -> Any:
        self.engines.append(Engine(self.log, config, self.slow))
        return self.engines[-1]

    async def ask(self, name: str, until: Awaitable[Any] | None = None) -> None:
        """A request that lasts until then."""
        visitor = object()
        state = await self.hosts[name].enter(visitor)
        try:
            assert state.names == (name,) and state.status == "ok"
            self.log.append(f"ask {name}")
            if until:
                await until
        finally:
            self.hosts[name].leave(visitor)

    async def end(self) -> None:
        for host in self.hosts.values():
            await host.end()


async def soon(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


async def test_all_that_fit_are_loaded_once(model_dir: Path) -> None:
    street = Street(model_dir, {"a": 4, "b": 4}, 8)
    for name in "abab":
        await street.ask(name)
    assert street.log == ["load a", "ask a", "load b", "ask b", "ask a", "ask b"]
    await street.end()


async def test_the_one_that_was_idle_longest_makes_room(model_dir: Path) -> None:
    street = Street(model_dir, {"a": 4, "b": 4, "c": 4}, 8)
    for name in "abac":
        await street.ask(name)
    assert street.log[-3:] == ["end b", "load c", "ask c"]
    assert [host.status for host in street.hosts.values()] == ["ok", "unloaded", "ok"]
    await street.end()


async def test_a_busy_model_finishes_first_and_newcomers_wait_for_its_next_turn(model_dir: Path) -> None:
    street, done = Street(model_dir, {"a": 6, "b": 6}, 8), asyncio.Event()
    first = asyncio.create_task(street.ask("a", done.wait()))
    await soon(lambda: "ask a" in street.log)
    others = [asyncio.create_task(street.ask("b")) for _ in range(3)]
    await soon(lambda: street.hosts["a"].closing)
    late = asyncio.create_task(street.ask("a"))
    await asyncio.sleep(0.02)
    assert street.log == ["load a", "ask a"] and not any(task.done() for task in others)
    done.set()
    await asyncio.gather(first, late, *others)
    assert street.log == ["load a", "ask a", "end a", "load b", "ask b", "ask b", "ask b", "end b", "load a", "ask a"]
    await street.end()


async def test_models_that_take_turns_starve_nobody(model_dir: Path) -> None:
    street = Street(model_dir, {"a": 6, "b": 6}, 8)
    async with asyncio.timeout(30):
        await asyncio.gather(*(street.ask("ab"[k % 2], asyncio.sleep(0.001)) for k in range(60)))
    assert street.log.count("ask a") == street.log.count("ask b") == 30
    assert street.log.count("load a") + street.log.count("load b") < 6
    await street.end()


async def test_a_client_that_does_not_wait_keeps_nothing(model_dir: Path) -> None:
    street = Street(model_dir, {"a": 6, "b": 6}, 8, slow=True)
    gone = asyncio.create_task(street.ask("a"))
    await soon(lambda: "load a" in street.log)
    gone.cancel()
    await asyncio.wait({gone})
    assert street.slow is not None
    street.slow.set()
    await soon(lambda: street.hosts["a"].status == "ok")
    assert not street.hosts["a"].busy
    await street.ask("b")
    assert street.log == ["load a", "end a", "load b", "ask b"]
    await street.end()


async def test_idle_models_are_unloaded_and_come_back(model_dir: Path) -> None:
    street = Street(model_dir, {"a": 4}, 8, idle_unload=0.05)
    assert street.hosts["a"].max_model_len == 256, "as planned"
    await street.ask("a", asyncio.sleep(0.15))  # longer than that, but not idle
    assert "end a" not in street.log
    await soon(lambda: street.hosts["a"].status == "unloaded")
    assert street.site.status == "loading"
    street.site.starting = False
    assert street.site.status == "ok"  # it can be had
    assert street.hosts["a"].client.info is None and street.hosts["a"].max_model_len == 512  # which clients may go by
    await street.ask("a")
    assert street.log == ["load a", "ask a", "end a", "load a", "ask a"]
    await street.end()


async def test_a_model_whose_engine_died_while_idle_is_unloaded_all_the_same(model_dir: Path) -> None:
    street = Street(model_dir, {"a": 4}, 8, idle_unload=0.05)
    await street.ask("a")
    street.slow = asyncio.Event()
    street.engines[-1].die("exit code -9")
    await soon(lambda: street.log.count("load a") == 2)
    await asyncio.sleep(0.1)  # its time is up before the next one is ready
    street.slow.set()
    await soon(lambda: street.hosts["a"].status == "unloaded")
    assert street.log == ["load a", "ask a", "load a", "end a"]
    await street.end()


@pytest.mark.parametrize("error", [InputError("it does not fit: 3 GiB are free"), EngineDied("exit code -11")])
async def test_a_model_that_cannot_be_loaded_says_why_and_is_tried_again(model_dir: Path, error: Exception) -> None:
    street = Street(model_dir, {"a": 4}, 8)
    street.engines[-1].fail = error
    answers = await asyncio.gather(*(street.ask("a") for _ in range(3)), return_exceptions=True)
    assert all(isinstance(one, RequestError) and one.status == 503 and str(error) in str(one) for one in answers), answers
    assert street.log == ["load a"] and street.hosts["a"].status == "unloaded"
    await street.ask("a")
    assert street.log == ["load a", "load a", "ask a"]
    await street.end()


async def test_an_engine_that_dies_is_started_again_but_not_for_ever(model_dir: Path) -> None:
    street = Street(model_dir, {"a": 4}, 8)
    await street.ask("a")
    host = street.hosts["a"]
    for death in range(1, host_module.DEATHS):
        street.engines[-1].die("exit code -9")
        await soon(lambda death=death: host.status == "ok" and street.log.count("load a") == death + 1)
        await street.ask("a")
    street.engines[-1].die("exit code -9")
    async with asyncio.timeout(30):
        await host.hopeless.wait()
    assert street.log.count("load a") == host_module.DEATHS and host.status == "dead" and not host.loaded
    with pytest.raises(RequestError, match="exit code -9") as refused:
        await street.ask("a")
    assert refused.value.status == 503 and refused.value.code == "engine_dead"
    await street.site.bring(host)  # by hand
    await street.ask("a")
    await street.end()


async def test_long_lives_are_not_counted_as_deaths(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "LIVED_S", 0.0)
    street = Street(model_dir, {"a": 4}, 8)
    await street.ask("a")
    for death in range(5):
        street.engines[-1].die("exit code -9")
        await soon(lambda death=death: street.hosts["a"].status == "ok" and street.log.count("load a") == death + 2)
    assert not street.hosts["a"].hopeless.is_set()
    await street.end()


async def test_restarts_that_fail_count(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    street = Street(model_dir, {"a": 4}, 8)
    await street.ask("a")
    monkeypatch.setattr(Engine, "fail", InputError("another program has taken the memory"))
    street.engines[-1].die("exit code -9")
    async with asyncio.timeout(30):
        await street.hosts["a"].hopeless.wait()
    with pytest.raises(RequestError, match="another program has taken the memory"):
        await street.ask("a")
    await street.end()


async def test_ending_while_others_wait_for_their_turn(model_dir: Path) -> None:
    street, never = Street(model_dir, {"a": 6, "b": 6}, 8), asyncio.Event()
    first = asyncio.create_task(street.ask("a", never.wait()))
    await soon(lambda: "ask a" in street.log)
    other = asyncio.create_task(street.ask("b"))
    await soon(lambda: street.hosts["a"].closing)
    street.site.shared.draining = True
    async with asyncio.timeout(30):
        await street.end()
        await asyncio.wait({other})
    with pytest.raises(RequestError, match="shutting down"):
        other.result()
    first.cancel()


async def test_loading_by_hand_while_it_is_started_again(model_dir: Path) -> None:
    street = Street(model_dir, {"a": 4}, 8)
    await street.ask("a")
    host, street.slow = street.hosts["a"], asyncio.Event()
    street.engines[-1].die("exit code -9")
    await soon(lambda: street.log.count("load a") == 2)
    by_hand = asyncio.create_task(host.come())
    await soon(lambda: street.log.count("load a") == 3)
    street.slow.set()
    await by_hand
    await street.ask("a")
    assert host.status == "ok" and sum(engine.state == "ready" for engine in street.engines) == 1
    await street.end()


async def test_requests_wait_for_what_is_loaded_by_hand(model_dir: Path) -> None:
    street = Street(model_dir, {"a": 4, "b": 4}, 4, slow=True, max_num_queued_reqs=2)
    street.site.starting = False
    by_hand = asyncio.create_task(street.hosts["a"].come())
    await soon(lambda: "load a" in street.log)
    asking = [asyncio.create_task(street.ask("a")) for _ in range(2)]
    await asyncio.sleep(0)
    assert street.site.status == "ok"  # it can be had
    assert [one["waiting"] for one in models_of(street.site)] == [2, 0]
    with pytest.raises(RequestError, match="2 requests wait already, and --max-num-queued-reqs is 2"):
        await street.ask("a")
    assert street.slow is not None
    street.slow.set()
    await asyncio.gather(by_hand, *asking)
    assert street.log == ["load a", "ask a", "ask a"] and not street.hosts["a"].waiting
    street.site.shared.draining = True
    with pytest.raises(RequestError, match="shutting down"):
        await street.hosts["b"].come()
    await street.end()


async def test_the_time_that_loading_takes_is_no_life(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, start = SimpleNamespace(now=1000.0), Engine.start
    monkeypatch.setattr(host_module, "time", SimpleNamespace(monotonic=lambda: clock.now))

    async def slowly(self: Engine) -> None:
        clock.now += 2 * host_module.LIVED_S
        await start(self)

    monkeypatch.setattr(Engine, "start", slowly)
    street = Street(model_dir, {"a": 4}, 8)
    await street.ask("a")
    for death in range(1, host_module.DEATHS + 1):
        await soon(lambda death=death: street.hosts["a"].status == "ok" and street.log.count("load a") == death)
        street.engines[-1].die("exit code -9")
    async with asyncio.timeout(30):
        await street.hosts["a"].hopeless.wait()
    await street.site.bring(street.hosts["a"])
    assert not street.hosts["a"].hopeless.is_set()
    await street.end()


async def test_no_process_to_be_had(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client: what the system refuses counts as a death, and nothing is left open."""

    def refuse(*args: Any, **more: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("appliance.runtime.client.subprocess.Popen", refuse)
    shared = Shared(ServerConfig())
    entry = Entry(
        "a", EngineConfig(model=str(model_dir), tokenizer=str(model_dir)), replace(ServerConfig(), served_model_name=("a",))
    )
    host = EngineHost(entry, Plan(4), shared)
    site = Site([host], shared, 8)
    for _ in range(2):
        with pytest.raises(EngineDied, match=r"cannot be started: .*Too many open files"):
            await site.bring(host)
    with pytest.raises(RequestError, match="Too many open files"):
        await host.enter(object())
    assert host.status == "unloaded" and not host.loaded
    await host.end()


async def test_a_model_that_is_loaded_at_start_behind_the_first_one_is_waited_for(model_dir: Path) -> None:
    street = Street(model_dir, {"a": 4, "b": 4}, 8)
    street.engines[1].slow = slow = asyncio.Event()
    street.hosts["b"].entry = replace(street.hosts["b"].entry, load="start")
    service = Service(bind("127.0.0.1", 0), [*street.hosts.values()], street.site.shared, 8, ServerConfig(shutdown_timeout=1))
    running = asyncio.create_task(service.run())
    url = f"http://127.0.0.1:{service.sock.getsockname()[1]}"
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=20) as http:
        await soon(lambda: street.hosts["b"].status == "loading")
        waiting = asyncio.create_task(http.post("/v1/completions", json={"model": "b", "prompt": "ab", "max_tokens": 1}))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        slow.set()
        answer = await waiting
        assert answer.status_code == 200 and answer.json()["model"] == "b" and street.log == ["load a", "load b"]
    service.stopping.set()
    assert await running == 0


@pytest.mark.parametrize(("budget", "log"), [(8, ["load a", "load b"]), (4, ["load a", "end a", "load b"])])
@pytest.mark.parametrize("fails", [False, True])
async def test_another_model_is_asked_for_while_the_first_one_loads_at_start(
    model_dir: Path, budget: int, log: list[str], fails: bool
) -> None:
    """Over HTTP: it waits for its turn, which does not keep the start from going on, and a start that fails tells it so."""
    street = Street(model_dir, {"a": 4, "b": 4}, budget, slow=True)
    assert street.slow is not None
    if fails:
        street.engines[0].fail = InputError("it does not fit")
    sock = bind("127.0.0.1", 0)
    service = Service(sock, [*street.hosts.values()], street.site.shared, budget, ServerConfig(shutdown_timeout=1))
    running = asyncio.create_task(service.run())
    body = {"prompt": "ab", "max_tokens": 1}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", trust_env=False, timeout=20) as http:
        assert (await http.get("/health")).json()["status"] == "loading"
        other = asyncio.create_task(http.post("/v1/completions", json={**body, "model": "b"}))
        await soon(lambda: street.hosts["b"].turning)
        first = await http.post("/v1/completions", json={**body, "model": "a"})
        assert first.status_code == 503 and first.json()["error"]["code"] == "model_loading" and first.headers["retry-after"]
        states = {card["id"]: card["status"] for card in (await http.get("/v1/models")).json()["data"]}
        assert states == {"a": "loading", "b": "unloaded"} and street.log == ["load a"] and not other.done()
        street.slow.set()
        answer = await other
        if fails:  # the server ends; what it has begun by then it may finish
            assert answer.status_code == 200 or answer.json()["error"]["code"] == "shutting_down", answer.text
        else:
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == "b" and street.log == log
            await soon(lambda: not service.site.starting)
            assert (await http.get("/health")).status_code == 200
            assert (await http.post("/v1/completions", json={**body, "model": "a"})).json()["model"] == "a"
            service.stopping.set()
    if fails:
        with pytest.raises(InputError, match="it does not fit"):
            await running
    else:
        assert await running == 0


async def test_a_model_that_is_not_loaded_has_no_cache_to_reset(model_dir: Path) -> None:
    street = Street(model_dir, {"a": 4, "b": 4}, 8)
    street.site.starting = False
    app = app_of(street.site, await street.hosts["a"].prepare())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        await street.ask("a")
        for name in "ab":
            found = await http.post("/reset_prefix_cache", params={"model": name})
            assert found.status_code == 200 and found.json() == {"success": True}
        assert street.log == ["load a", "ask a"] and street.hosts["a"].client.resets == 1  # type: ignore[attr-defined]
        street.hosts["b"].client.state = "loading"
        found = await http.post("/reset_prefix_cache", params={"model": "b"})
        assert found.status_code == 503 and found.json()["error"]["code"] == "model_loading"
    await street.end()


async def test_counters_go_on_when_an_engine_follows_another(model_dir: Path) -> None:
    """What came has ended, or is at work, and no counter goes back: with an engine that dies, and with one that is unloaded."""
    street, asked, before = Street(model_dir, {"a": 4}, 8), 0, dict[Any, float]()
    host = street.hosts["a"]
    app = app_of(street.site, await host.prepare())
    body = {"prompt": ["ab", "cde"], "n": 2, "max_tokens": 3}

    async def end() -> None:
        if len(street.engines) == 1:
            street.engines[-1].die("exit code -9")
            await soon(lambda: host.status == "ok")
        else:
            await street.site.send_away(host, wait=True)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        for _ in range(3):
            assert (await http.post("/v1/completions", json=body)).status_code == 200
            asked += 4
            for change in (end(), asyncio.sleep(0)):
                engine = (await http.get("/stats")).json()["engine"]
                assert engine["requests"] == sum(engine["finished"].values()) == asked
                assert engine["generation_tokens"] == sum(one.tokens for one in street.engines) == 3 * asked
                families = text_string_to_metric_families((await http.get("/metrics")).text)
                after = {
                    (one.name, *sorted(one.labels.items())): one.value
                    for family in families
                    for one in family.samples
                    if "model_name" in one.labels and family.type in ("counter", "histogram")
                }
                assert after.keys() >= before.keys() and all(after[name] >= value for name, value in before.items())
                before = after
                await change
        street.engines[-1].delay_s = 60.0
        host.state.client.delay_s = 60.0  # type: ignore[union-attr, attr-defined]
        asking = asyncio.create_task(http.post("/v1/completions", json=body))
        await soon(lambda: host.state and len(host.state.client.running) == 2)  # type: ignore[attr-defined]
        engine = (await http.get("/stats")).json()["engine"]
        assert engine["requests"] == asked + 4 and sum(engine["finished"].values()) == asked
        street.engines[-1].die("exit code -9")
        assert (await asking).status_code == 503
        engine = (await http.get("/stats")).json()["engine"]
        assert engine["requests"] == sum(engine["finished"].values()) == asked + 4 and engine["finished"]["error"] == 4
    await street.end()


SAID = [{"role": "user", "content": "ab"}]
READS: dict[str, dict[str, Any]] = {  # what needs a tokenizer, and no engine
    "/tokenize": {"prompt": "ab"},
    "/detokenize": {"tokens": [68, 69]},
    "/v1/messages/count_tokens": {"messages": SAID},
    "/v1/responses/input_tokens": {"input": "ab"},
}


async def test_who_needs_a_tokenizer_alone_loads_no_model_and_keeps_none(model_dir: Path) -> None:
    """Its length is the planned one until an engine has said its own, which counts from then on."""
    street = Street(model_dir, {"a": 4, "b": 4}, 4)
    app = app_of(street.site, await street.hosts["a"].prepare())
    host = street.hosts["b"]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:

        async def read() -> tuple[int, list[Any]]:
            answers = [await http.post(path, json={**body, "model": "b"}) for path, body in READS.items()]
            answers.append(await http.get("/tokenizer_info", params={"model": "b"}))
            assert all(one.status_code == 200 for one in answers), [one.text for one in answers]
            wrong = await http.post("/detokenize", json={"tokens": [VOCAB], "model": "b"})
            assert wrong.status_code == 400 and f"0 to {VOCAB - 1}" in wrong.text
            first, *others = (one.json() for one in answers)
            return first.pop("max_model_len"), [first, *others]

        length, unloaded = await read()
        assert length == 256 and host.status == "unloaded" and host.max_model_len == 256
        assert unloaded[0]["tokens"] == [1, 68, 69] and unloaded[-1]["bos_token"] == "<s>"
        await street.ask("b")
        used = host.used
        assert await read() == (512, unloaded) and host.used == used
        await street.ask("a")
        assert await read() == (512, unloaded) and host.status == "unloaded"
        assert street.log == ["load b", "ask b", "end b", "load a", "ask a"]
        street.site.shared.draining = True
        for path, body in READS.items():
            refused = await http.post(path, json={**body, "model": "b"})
            assert refused.status_code == 503 and "shutting down" in refused.text
    await street.end()


async def test_a_tokenizer_that_is_gone_is_told_as_when_loading(tmp_path: Path, model_dir: Path) -> None:
    street = Street(model_dir, {"a": 4, "b": 4}, 8)
    street.hosts["b"].entry = replace(street.hosts["b"].entry, engine=EngineConfig(model=str(tmp_path), tokenizer=str(tmp_path)))
    app = app_of(street.site, await street.hosts["a"].prepare())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        told = await http.post("/tokenize", json={"prompt": "ab", "model": "b"})
    assert told.status_code == 503 and told.json()["error"]["code"] == "model_not_loaded" and str(tmp_path) in told.text
    await street.end()
