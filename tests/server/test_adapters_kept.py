"""Adapters outlive the engines that have them loaded: one that dies, that is idle, or whose model makes room for another."""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from appliance.adapters import read_names
from appliance.config import EngineConfig
from appliance.core.params import RequestError
from appliance.models_file import Entry
from appliance.server import host as host_module
from appliance.server.app import app_of
from tests.server.fake import info
from tests.server.test_site import Engine, Street, soon


class AdaptedEngine(Engine):
    gone: frozenset[str] = frozenset()  # directories that are no adapters any more
    held: asyncio.Event | None = None  # that adapters wait for

    def __init__(self, log: list[str], config: EngineConfig, slow: asyncio.Event | None) -> None:
        super().__init__(log, config, slow)
        self.config = config

    async def start(self) -> None:
        await super().start()
        for name, path in read_names(self.config.lora_modules).items():
            await super().load_adapter(name, str(path))
        self.info = replace(info(), max_loras=self.config.max_loras or 0, adapters=tuple(self.adapters))

    async def load_adapter(self, name: str, path: str, *, replace: bool = False) -> None:
        if self.held:
            await self.held.wait()
        if path in self.gone:
            raise RequestError(f"{path} has no adapter_config.json", param="lora_name")
        await super().load_adapter(name, path, replace=replace)


class AdaptedStreet(Street):
    def _entry(self, directory: Path, name: str, server: dict[str, Any]) -> Entry:
        entry = super()._entry(directory, name, {"allow_runtime_lora_updating": True, **server})
        modules = ("first=/first",) if name == "a" else ()
        return replace(entry, engine=replace(entry.engine, enable_lora=name != "c", max_loras=4, lora_modules=modules))

    def _make(self, config: EngineConfig, step_timeout: float) -> Any:
        self.engines.append(AdaptedEngine(self.log, config, self.slow))
        return self.engines[-1]

    @property
    def http(self) -> httpx.AsyncClient:
        self.site.starting = False
        state = self.hosts["a"].state
        assert state is not None
        return httpx.AsyncClient(transport=httpx.ASGITransport(app_of(self.site, state)), base_url="http://test")

    def serving(self) -> list[AdaptedEngine]:
        return [engine for engine in self.engines if engine.state == "ready" and isinstance(engine, AdaptedEngine)]


async def load(http: httpx.AsyncClient, name: str, path: Path, status: int = 200, **more: str) -> None:
    path.mkdir(exist_ok=True)
    response = await http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})
    assert response.status_code == status, response.text


async def ask(http: httpx.AsyncClient, model: str) -> int:
    return (await http.post("/v1/completions", json={"model": model, "prompt": "hello", "max_tokens": 2})).status_code


async def test_they_come_back_when_an_engine_has_died(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    street = AdaptedStreet(model_dir, {"a": 4}, 8)
    await street.ask("a")
    async with street.http as http:
        await load(http, "second", tmp_path / "second")
        await load(http, "third", tmp_path / "third")
        assert (await http.post("/v1/unload_lora_adapter", json={"lora_name": "first"})).status_code == 200
        (engine,) = street.serving()
        monkeypatch.setattr(AdaptedEngine, "gone", frozenset({str(tmp_path / "third")}))
        with caplog.at_level(logging.ERROR):
            engine.die("exit code -9")
            await soon(lambda: street.serving() != [] and street.hosts["a"].status == "ok")
        (engine,) = street.serving()
        assert engine.adapters == {"second": str(tmp_path / "second")} and engine.config.max_loras == 4
        assert "the adapter third cannot be loaded again, and is left out: " in caplog.text
        cards = (await http.get("/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == ["a", "second"]
        assert [await ask(http, name) for name in ("a", "second", "first", "third")] == [200, 200, 404, 404]
    await street.end()


async def test_nobody_is_served_before_they_are_back(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    street = AdaptedStreet(model_dir, {"a": 4}, 8)
    await street.ask("a")
    async with street.http as http:
        await load(http, "second", tmp_path / "second")
        monkeypatch.setattr(AdaptedEngine, "held", held := asyncio.Event())
        street.serving()[0].die("exit code -9")
        await soon(lambda: street.serving() != [])
        assert street.hosts["a"].status == "loading" and await ask(http, "second") == await ask(http, "a") == 503
        assert (await http.get("/health")).status_code == 503
        held.set()
        await soon(lambda: street.hosts["a"].status == "ok")
        assert await ask(http, "second") == await ask(http, "first") == 200
    await street.end()


async def test_they_come_back_when_their_model_is_loaded_on_demand(model_dir: Path, tmp_path: Path) -> None:
    street = AdaptedStreet(model_dir, {"a": 4, "b": 6, "c": 1}, 8, idle_unload=0.0)
    await street.ask("b")
    await street.hosts["a"].prepare()
    async with street.http as http:
        assert street.hosts["a"].status == "unloaded"
        await load(http, "of-b", tmp_path / "b", model="b")
        await load(http, "of-a", tmp_path / "a")
        assert street.log == ["load b", "ask b", "end b", "load a"], "the first model that takes any is loaded for it"
        assert street.hosts["b"].adapters.paths.keys() == {"of-b"}
        await load(http, "of-b", tmp_path / "b", 400, model="a")
        await load(http, "b", tmp_path / "b", 400)
        cards = {card["id"]: card for card in (await http.get("/v1/models")).json()["data"]}
        assert (
            cards["of-b"]["parent"] == "b" and cards["of-b"]["status"] == "unloaded" and list(cards)[:3] == ["a", "first", "of-a"]
        )
        assert await ask(http, "of-b") == 200 and street.hosts["a"].status == "unloaded"
        answer = await http.post("/v1/unload_lora_adapter", json={"lora_name": "first"})
        assert answer.status_code == 200 and street.hosts["a"].status == "unloaded", "for that nothing is loaded"
        assert await ask(http, "of-a") == 200 and await ask(http, "first") == 404
        (engine,) = street.serving()
        assert engine.adapters == {"of-a": str(tmp_path / "a")}
    await street.end()


async def test_one_that_is_unloaded_while_its_model_comes(model_dir: Path) -> None:
    street = AdaptedStreet(model_dir, {"a": 4}, 8, slow=True)
    assert street.slow is not None
    await street.hosts["a"].prepare()
    async with street.http as http:
        asking = asyncio.create_task(ask(http, "first"))
        await soon(lambda: street.hosts["a"].status == "loading")
        unloading = asyncio.create_task(http.post("/v1/unload_lora_adapter", json={"lora_name": "first"}))
        await asyncio.sleep(0)
        street.slow.set()
        assert await asking == 200 and (await unloading).status_code == 200
        assert street.serving()[0].adapters == {} and await ask(http, "first") == 404
    await street.end()


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_engines_have_what_is_listed(
    model_dir: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters and models that come and go, engines that die, and requests, all at once, in any order."""
    monkeypatch.setattr(host_module, "LIVED_S", 0.0)  # so many deaths are none too many
    rng = random.Random(seed)
    street = AdaptedStreet(model_dir, {"a": 4, "b": 6}, 8)
    await street.ask("a")
    names = ["first", "x", "y", "z"]
    allowed = {
        "load": {200, 400, 503}, "replace": {200, 400, 503}, "unload": {200, 404, 503}, "ask": {200, 404, 500, 503},
        "model": {200, 503}, "die": {200},
    }  # fmt: skip

    async def act(http: httpx.AsyncClient, what: str, name: str) -> int:
        await asyncio.sleep(rng.choice((0, 0, 0.001, 0.003)))
        body = {"lora_name": name, "lora_path": str(tmp_path), "model": rng.choice(["a", "b"])}
        match what:
            case "load" | "replace":
                return (await http.post("/v1/load_lora_adapter", json={**body, "load_inplace": what == "replace"})).status_code
            case "unload":
                return (await http.post("/v1/unload_lora_adapter", json=body)).status_code
            case "ask":
                return await ask(http, name)
            case "model":
                change = rng.choice(["load", "unload"])
                return (await http.post(f"/v1/models/{change}", json={"model": body["model"]})).status_code
        for engine in rng.sample(street.serving(), min(1, len(street.serving()))):
            engine.die("exit code -9")
        return 200

    async with street.http as http:
        for _ in range(25):
            todo = [(rng.choice(list(allowed)), rng.choice(names)) for _ in range(rng.randrange(1, 7))]
            async with asyncio.timeout(20):
                found = await asyncio.gather(*(act(http, *one) for one in todo))
            assert all(status in allowed[what] for (what, _), status in zip(todo, found, strict=True)), (todo, found)
            await soon(lambda: all(host.status in ("ok", "unloaded") for host in street.hosts.values()))
            engines = {engine.name: engine for engine in street.serving()}
            owned = [name for host in street.hosts.values() for name in host.adapters.paths]
            assert len(set(owned)) == len(owned)
            for model, host in street.hosts.items():
                assert (model in engines) == (host.status == "ok")
                assert model not in engines or engines[model].adapters == host.adapters.paths
        assert [await ask(http, name) for name in names] == [200 if name in owned else 404 for name in names]
    await street.end()
