"""Many connections at once: nothing is lost, nothing is mixed, and the loop stays awake."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import httpx

from tests.server.conftest import Served
from tests.server.test_completions import events


async def ask(http: httpx.AsyncClient, number: int) -> None:
    """Every answer must be made of its own question's tokens."""
    rng = random.Random(number)
    prompt = [rng.randrange(3, 98) for _ in range(rng.randrange(1, 40))]
    tokens, n = rng.randrange(1, 30), rng.choice((1, 1, 2))
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "n": n, "return_token_ids": True, "temperature": 1}
    expected = [[prompt[(k + i) % len(prompt)] for k in range(tokens)] for i in range(n)]
    headers = {"X-Request-Id": f"load-{number}"}
    if rng.random() < 0.5:
        response = await http.post("/v1/completions", json=body, headers=headers)
        assert [c["token_ids"] for c in response.json()["choices"]] == expected
        assert response.json()["id"] == f"cmpl-load-{number}"
    else:
        response = await http.post("/v1/completions", json={**body, "stream": True}, headers=headers)
        found: list[list[int]] = [[] for _ in range(n)]
        for chunk in events(response.text):
            assert chunk["id"] == f"cmpl-load-{number}"
            found[chunk["choices"][0]["index"]] += chunk["choices"][0]["token_ids"]
        assert found == expected
    assert response.headers["x-request-id"] == f"load-{number}"


async def test_64_connections(slow: Served) -> None:
    limits = httpx.Limits(max_connections=70, max_keepalive_connections=70)
    slow.client.delay_s = 0.002
    async with httpx.AsyncClient(base_url=slow.url, timeout=60, limits=limits, trust_env=False) as http:
        gate = asyncio.Semaphore(64)
        worst = 0.0

        async def one(number: int) -> None:
            async with gate:
                await ask(http, number)

        async def watch() -> None:
            nonlocal worst
            while True:
                begun = time.monotonic()
                assert (await http.get("/health")).status_code == 200
                worst = max(worst, time.monotonic() - begun)
                await asyncio.sleep(0.05)

        watcher = asyncio.create_task(watch())
        await asyncio.gather(*(one(number) for number in range(256)))
        watcher.cancel()
    assert not slow.client.running and not slow.state.jobs
    assert len(slow.client.submitted) == 256
    assert worst < 10
