"""Clients that go away, engines that die, requests that are aborted, servers that load and drain."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from appliance.config import EngineConfig, ServerConfig
from appliance.core.params import RequestError
from appliance.server import structured
from appliance.server.errors import unavailable
from appliance.server.respond import while_connected
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient

LONG = {"prompt": "abc", "max_tokens": 400, "ignore_eos": True}


def eventually(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


class Asker(threading.Thread):
    """Posts in a thread of its own."""

    def __init__(self, served: Served, **body: Any) -> None:
        super().__init__(daemon=True)
        self.served, self.body = served, body
        self.response: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.response = self.served.post("/v1/completions", **self.body)

    def answer(self) -> httpx.Response:
        self.join(20)
        assert self.response is not None
        return self.response


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["abc", ["abc", "def"]])
def test_a_client_that_goes_away_frees_the_engine(slow: Served, stream: bool, prompt: Any) -> None:
    number = 1 if isinstance(prompt, str) else 2
    body = json.dumps({**LONG, "prompt": prompt, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", int(slow.url.rsplit(":", 1)[1])), timeout=20) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        eventually(lambda: slow.client.tokens >= number)
        assert not stream or b"data: " in sock.recv(65536) + sock.recv(65536)
        if not stream:  # who is gone from a stream is told by its next token from those who only ended their side
            slow.client.delay_s = 60.0
    eventually(lambda: len(slow.client.aborted) == number and not slow.client.running and not slow.state.jobs)
    assert slow.client.tokens < 400 * number  # it did not go on to the end
    slow.client.delay_s = 0.0
    assert slow.post("/v1/completions", prompt="abc", max_tokens=1).status_code == 200


def test_delete_aborts(slow: Served) -> None:
    with slow.http as http:
        asker = Asker(slow, **LONG, request_id="long-one")
        eventually(lambda: slow.client.tokens > 3)
        assert http.delete("/v1/requests/long-one").json() == {"id": "long-one", "object": "request", "aborted": True}
        choice = asker.answer().json()["choices"][0]
        assert choice["finish_reason"] == "abort" and choice["text"].startswith("ab")
        gone = http.delete("/v1/requests/cmpl-long-one")
        assert gone.status_code == 404 and gone.json()["error"]["code"] == "request_not_found"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("id_in", ["header", "body"])
def test_delete_aborts_what_waits(slow: Served, stream: bool, id_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its grammar, as for its model or its turn with a template: there is nothing in the engine yet."""
    begun, gone = threading.Event(), threading.Event()

    async def never(*_: Any, **__: Any) -> str:
        begun.set()
        try:
            return await asyncio.Future()
        finally:
            gone.set()

    monkeypatch.setattr(structured, "compiled", never)
    body: dict[str, Any] = {"prompt": "a", "structured_outputs": {"regex": "a"}, "stream": stream}
    headers = {"X-Request-Id": "waits"} if id_in == "header" else {}
    with ThreadPoolExecutor(1) as pool, slow.http as http, httpx.Client(base_url=slow.url, trust_env=False) as asker:
        answer = pool.submit(
            asker.post, "/v1/completions", json=body | ({} if headers else {"request_id": "waits"}), headers=headers, timeout=30
        )
        assert begun.wait(20) and http.delete("/v1/requests/waits").status_code == 200
        error = answer.result().json()["error"]
        assert answer.result().status_code == 499 and error["code"] == "aborted" and error["message"] == "the request was aborted"
        assert gone.wait(20) and not slow.state.shared.asked
        assert http.delete("/v1/requests/waits").status_code == 404


def test_the_same_request_id_twice_at_once(slow: Served) -> None:
    askers = [Asker(slow, prompt="abc", max_tokens=9, request_id="twin") for _ in range(2)]
    assert [a.answer().status_code for a in askers] == [200, 200]


def test_engine_death_reaches_everyone_at_once(slow: Served) -> None:
    waiting = [Asker(slow, **LONG) for _ in range(3)]
    with slow.http as http, http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        eventually(lambda: len(slow.client.running) == 4)
        slow.run(slow.client.die, "the engine process ended unexpectedly (exit code -9)")
        died = time.monotonic()
        rest = [line for line in lines if line]
        error = json.loads(rest[-2].removeprefix("data: "))["error"]
        assert error["code"] == "engine_dead" and "exit code -9" in error["message"] and rest[-1] == "data: [DONE]"
        for asker in waiting:
            assert asker.answer().status_code == 503 and asker.answer().json()["error"]["code"] == "engine_dead"
        assert time.monotonic() - died < 10  # half of what a client waits
        health = http.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "dead" and "exit code -9" in health.text
        again = http.post("/v1/completions", json=LONG)
        assert again.status_code == 503 and again.headers["retry-after"]
        assert http.get("/ping").status_code == 200


def test_loading(tokenizer: Tokenizer, model_dir: Path) -> None:
    engine = EngineConfig(model=str(model_dir))
    with (
        serve_in_thread(lambda: FakeClient(state="loading"), tokenizer, engine, ServerConfig()) as served,
        served.http as http,
    ):
        health = http.get("/health")
        assert health.status_code == 503 and health.headers["retry-after"]
        assert health.json()["status"] == "loading"
        assert (health.json()["loaded_bytes"], health.json()["total_bytes"]) == (3, 10)
        refused = http.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "model_loading"
        assert http.get("/v1/models").status_code == 200
        assert http.get("/stats").json()["state"] == "loading"
        assert http.get("/metrics").status_code == 200


async def test_who_is_cut_off_at_the_end_is_told_why() -> None:
    """Before there is a job that could be failed: in its chat template, or waiting for its grammar."""
    app = SimpleNamespace(state=SimpleNamespace(server=SimpleNamespace(shared=SimpleNamespace(asked=set()))))
    request = Request({"type": "http", "app": app, "state": {}}, receive=asyncio.Event().wait)  # type: ignore[arg-type]
    task = asyncio.create_task(while_connected(request, asyncio.sleep(60)))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(RequestError) as caught:
        await task
    assert (caught.value.status, caught.value.code) == (503, "shutting_down")
    assert not app.state.server.shared.asked


def test_draining(slow: Served) -> None:
    asker = Asker(slow, **LONG)
    eventually(lambda: slow.client.tokens > 3)
    slow.state.draining = True
    refused = slow.post("/v1/completions", prompt="a")
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
    for job in list(slow.state.jobs):
        slow.run(job.fail, unavailable("the server is shutting down", "shutting_down"))
    assert asker.answer().status_code == 503
    eventually(lambda: not slow.client.running)
