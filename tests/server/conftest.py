"""A real HTTP server on a loopback port, over a client that only pretends to be an engine."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from appliance.config import EngineConfig, ServerConfig
from appliance.server.app import create_app
from appliance.server.http import BACKLOG, HttpServer, http_config
from appliance.server.state import ServerState
from appliance.text.tokenizer import Tokenizer
from tests.server.fake import FakeClient
from tests.tiny_model import write_tokenizer

TLS = ssl.create_default_context()  # to make one for each client takes longer than most requests

LONG_S = 0.05


@dataclass
class Served:
    url: str
    client: FakeClient
    state: ServerState
    loop: asyncio.AbstractEventLoop

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False, verify=TLS)

    @property
    def openai(self) -> OpenAI:
        http = httpx.Client(trust_env=False)
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20, http_client=http)

    def post(self, path: str, **body: Any) -> httpx.Response:
        with self.http as http:
            return http.post(path, json=body)

    def answer_in_turns(self, ask: Callable[[], httpx.Response]) -> httpx.Response:
        """The answer, made without that the event loop was ever busy for long (processor time) before all others had their turn.

        In one of three times: what a busy host takes away from this machine counts as processor time too.
        """
        for _ in range(3):
            gc.collect()
            gc.freeze()  # as the server does when it is ready
            longest = [0.0]
            watching = asyncio.run_coroutine_threadsafe(_watch(longest), self.loop)
            try:
                answer = ask()
            finally:
                watching.cancel()
            if longest[0] < LONG_S:
                return answer
        pytest.fail(f"a turn of {longest[0]} s in {answer.status_code} {answer.text[:200]}")

    def run(self, function: Any, *args: Any) -> Any:
        """Call in the server's event loop."""

        async def call() -> Any:
            return function(*args)

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(10)


async def _watch(longest: list[float]) -> None:
    begun = time.thread_time()
    while True:
        await asyncio.sleep(0)
        now = time.thread_time()
        longest[0], begun = max(longest[0], now - begun), now


@contextmanager
def serve_in_thread(make: Any, tokenizer: Tokenizer | None, engine: EngineConfig, server: ServerConfig) -> Iterator[Served]:
    """``make()`` builds the engine client inside the server's event loop."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    ready, box = threading.Event(), {}

    async def main() -> None:
        client = make()
        app = create_app(client, tokenizer, engine, server)
        http = HttpServer(http_config(app, replace(server, shutdown_timeout=1)))
        url = f"{'https' if server.ssl_certfile else 'http'}://127.0.0.1:{sock.getsockname()[1]}"
        box.update(http=http, served=Served(url, client, app.state.server, asyncio.get_running_loop()))
        task = asyncio.create_task(http.serve(sockets=[sock]))
        while not http.started:
            await asyncio.sleep(0.005)
        sock.listen(BACKLOG)
        ready.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield box["served"]
    finally:
        box["http"].should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.load(model_dir)


@pytest.fixture(scope="module")
def served(tokenizer: Tokenizer, model_dir: Path) -> Iterator[Served]:
    """One server for a module's tests, with a fast client."""
    engine = EngineConfig(model=str(model_dir))
    with serve_in_thread(FakeClient, tokenizer, engine, ServerConfig(served_model_name=("tiny", "alias/of-tiny"))) as one:
        yield one


@pytest.fixture
def slow(tokenizer: Tokenizer, model_dir: Path) -> Iterator[Served]:
    """A server of its own, whose engine takes 20 ms a token."""
    engine = EngineConfig(model=str(model_dir))
    with serve_in_thread(lambda: FakeClient(delay_s=0.02), tokenizer, engine, ServerConfig(served_model_name=("tiny",))) as one:
        yield one
