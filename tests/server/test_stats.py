"""GET /stats: whose each request is, what late requests waited, and that nothing of their text is in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from appliance.config import EngineConfig, ServerConfig
from appliance.core.messages import RequestStat, Stats
from appliance.server import stats as stats_module
from appliance.server.stats import MOST, Recent, absent_body, stats_body
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient


class Listing(FakeClient):
    """Lists what runs, as the engine does."""

    async def stats(self) -> Stats:
        prompts = {submit.request_id: len(submit.prompt_token_ids) for submit in self.submitted}
        rows = tuple(
            RequestStat(name, index, "running", prompts[name], 1, 3, 2, 0.5, 0, cached_tokens=1)
            for name, alive in self.running.items()
            for index in sorted(alive)
        )
        stray = RequestStat("left-behind", 0, "waiting", 1, 0, 0, 0, 0.1, 0)
        return replace(await super().stats(), requests_now=(*rows, stray), blocks_shared=3)


@pytest.fixture
def listing(tokenizer: Tokenizer, model_dir: Path) -> Iterator[Served]:
    config = ServerConfig(served_model_name=("tiny",), api_key=("first", "second"))
    with serve_in_thread(lambda: Listing(delay_s=0.02), tokenizer, EngineConfig(model=str(model_dir)), config) as one:
        yield one


def get(served: Served, key: str = "first") -> dict[str, Any]:
    with served.http as http:
        return http.get("/stats", headers={"Authorization": f"Bearer {key}"}).json()


def test_each_request_has_its_public_id_its_key_and_its_settings(listing: Served) -> None:
    body = {"model": "tiny", "prompt": ["a secret", "bb"], "n": 2, "max_tokens": 400, "temperature": 0.5, "stop": ["zzz"]}
    headers = {"Authorization": "Bearer first", "X-Request-Id": "mine"}
    asking = threading.Thread(target=lambda: httpx.post(f"{listing.url}/v1/completions", json=body, headers=headers, timeout=20))
    asking.start()
    for _ in range(200):
        found = get(listing)
        rows = found["engine"]["requests_now"]
        if len(rows) == 5 and all(row["ttft_s"] for row in rows[:4]):
            break
        time.sleep(0.02)
    assert [(row["id"], row["prompt"], row["index"]) for row in rows[:4]] == [("cmpl-mine", k, i) for k in (0, 1) for i in (0, 1)]
    names = {name for key in ("first", "second") for name in (listing.state.keys.find([(b"x-api-key", key.encode())])[0].name,)}
    assert all(row["key"] in names and row["temperature"] == 0.5 and row["max_tokens"] == 400 for row in rows[:4])
    assert all(row["n"] == 2 and row["model"] == "tiny" and row["cached_tokens"] == 1 for row in rows[:4])
    assert "id" not in rows[4] and rows[4]["request_id"] == "left-behind", "the engine is still about to hear that it ended"
    text = str(found)
    assert "secret" not in text and "zzz" not in text and "first" not in text.replace("first_", ""), "no text, no keys"
    assert found["engine"]["blocks_shared"] == 3
    with listing.http as http:
        path = f"/v1/requests/{rows[0]['id']}"
        refused = http.delete(path, headers={"Authorization": "Bearer second"})
        assert refused.status_code == 404 and "no running request has the id 'cmpl-mine'" in refused.json()["error"]["message"]
        assert http.delete(path, headers={"Authorization": "Bearer first"}).status_code == 200
    asking.join(20)
    assert [row["request_id"] for row in get(listing)["engine"]["requests_now"]] == ["left-behind"]


def test_latency_counts_every_completion(served: Served) -> None:
    with served.http as http:
        before = http.get("/stats").json()["latency"]
        served.post("/v1/completions", prompt="abc", max_tokens=5, n=2)
        after = http.get("/stats").json()["latency"]
    assert after["ttft"]["count"] - before["ttft"]["count"] == 2 and after["itl"]["count"] - before["itl"]["count"] == 8
    assert after["ttft"]["sum_s"] > before["ttft"]["sum_s"]
    assert 0 < after["ttft"]["p50_s"] <= after["ttft"]["p95_s"] <= after["ttft"]["p99_s"] < 10


def test_percentiles_are_values_of_the_last_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(stats_module, "time", SimpleNamespace(monotonic=lambda: now))  # the servers' own clock goes on
    recent = Recent()
    assert recent.summary() == {"count": 0, "sum_s": 0, "window": 0, "p50_s": None, "p95_s": None, "p99_s": None}
    recent.add(500.0)
    now += 61
    for value in range(100, 0, -1):
        recent.add(float(value))
    assert recent.summary() == {"count": 101, "sum_s": 5550.0, "window": 100, "p50_s": 50.0, "p95_s": 95.0, "p99_s": 99.0}
    recent.add(0.5)
    now += 60
    assert recent.summary()["window"] == 101
    now += 1
    assert recent.summary()["window"] == 0 and recent.summary()["count"] == 102
    for value in range(2 * MOST):
        recent.add(float(value))
    assert recent.summary()["window"] == MOST, "no more than these are kept, however fast they come"


async def test_a_model_that_was_never_loaded_has_the_same_fields(served: Served) -> None:
    host = SimpleNamespace(names=("late",), status="unloaded")
    site = SimpleNamespace(shared=SimpleNamespace(started=time.monotonic() - 5))
    absent, known = absent_body(site, host), await stats_body(served.state)  # type: ignore[arg-type]
    assert absent.keys() == known.keys() and absent["engine"].keys() == known["engine"].keys()
    assert absent["latency"]["ttft"].keys() == known["latency"]["ttft"].keys()
    assert (absent["model"], absent["state"], absent["info"]) == ("late", "unloaded", None) and 5 <= absent["uptime_s"] < 60
