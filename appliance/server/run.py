"""``appliance serve``: the port first, then the engine, then answers until a signal comes."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from tqdm import tqdm

from appliance.config import EngineConfig, ServerConfig
from appliance.hub import demo_model, resolve
from appliance.memory.planner import make_plan
from appliance.runtime.worker import Client, EngineDied
from appliance.server import logs
from appliance.server.app import create_app
from appliance.server.audit import check_writable
from appliance.server.errors import unavailable
from appliance.server.http import check_tls, http_config, raise_file_limit
from appliance.server.keys import Keyring
from appliance.server.state import ServerState
from appliance.text.tokenizer import Tokenizer
from quant.errors import InputError

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger("appliance.server")

RESTARTS = 3  # times that a dead engine is started again
LIVED_S = 60.0  # an engine that served this long may die without being counted


def serve(engine: EngineConfig, server: ServerConfig) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code; raises InputError where port, model or options do not do."""
    logs.setup(server)
    check_tls(server)
    if server.audit_log:
        check_writable(server.audit_log)
    elif server.audit_content:
        raise InputError("--audit-content needs --audit-log FILE")
    if server.max_num_queued_reqs == 0 or server.max_num_queued_reqs < -1:
        raise InputError(f"--max-num-queued-reqs is at least 1, or -1 for no limit, got {server.max_num_queued_reqs}")
    keys = Keyring(server.api_key, server.api_key_file)
    raise_file_limit()
    with contextlib.closing(bind(server.host, server.port)) as sock:
        if not keys.required and not server.insecure:
            check_local(server.host, sock)
        engine, server = locate(engine, server)
        assert engine.model is not None  # locate() has filled it in
        logs.tell(make_plan(Path(engine.model), engine).table(), server)
        return asyncio.run(_Service(sock, engine, server).run())


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to host and port. Raises InputError with one line for the user."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port is 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"--host {host}: {error.strerror or error}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        hint = "stop what listens there, or choose another --port (0 picks a free one)"
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror or error}; {hint}") from None
    return sock


def check_local(host: str, sock: socket.socket) -> None:
    """Raises InputError where other machines can reach a server that asks nobody for a key."""
    address = ipaddress.ip_address(sock.getsockname()[0])
    inner = getattr(address, "ipv4_mapped", None) or address
    if not inner.is_loopback:
        hint = (
            "give --api-key-file FILE (`appliance key NAME >> FILE` makes a key) or --api-key, or --insecure where that is meant"
        )
        raise InputError(f"--host {host} lets other machines in, and nobody is asked for a key: {hint}")


def locate(engine: EngineConfig, server: ServerConfig) -> tuple[EngineConfig, ServerConfig]:
    """The same options with local directories for model and tokenizer, and a name under which the model is served."""
    names = server.served_model_name or (engine.model or "demo",)
    directory = resolve(engine.model, engine.revision) if engine.model else demo_model()
    tokenizer = resolve(engine.tokenizer, engine.revision) if engine.tokenizer else directory
    return replace(engine, model=str(directory), tokenizer=str(tokenizer)), replace(server, served_model_name=tuple(names))


async def show_loading(client: Client) -> None:
    """A progress bar on a terminal's stderr while the weights are read."""
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc="Loading weights", leave=False, disable=None) as bar:
        while client.state == "loading":
            done, bar.total = client.loading
            bar.update(done - bar.n)
            await asyncio.sleep(0.1)


class _Http(uvicorn.Server):
    """uvicorn without its ten wake-ups a second and without its signal handling: idle is idle."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stop = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        self.server_state.default_headers = self.config.encoded_headers
        await self.stop.wait()


class _Service:
    """One server process: its HTTP side, and the engine that it starts, watches and ends."""

    def __init__(self, sock: socket.socket, engine: EngineConfig, server: ServerConfig) -> None:
        self.sock, self.engine, self.server = sock, engine, server
        self.stopping = asyncio.Event()

    async def run(self) -> int:
        self._catch_signals()
        client = Client(self.engine)
        loading = asyncio.create_task(client.start())
        try:
            await asyncio.sleep(0)  # the engine process starts while this one reads the tokenizer
            app = await self._app(client)
        except BaseException:
            loading.cancel()
            await client.stop(0)
            raise
        self.state: ServerState = app.state.server
        http = _Http(http_config(app, self.server))
        answering = asyncio.create_task(http.serve(sockets=[self.sock]))
        try:
            return await self._live(client, loading)
        finally:
            http.stop.set()
            await self._drain()
            await self.state.client.stop(0)
            await answering
            if self.state.audit:
                self.state.audit.close()

    async def _app(self, client: Client) -> FastAPI:
        tokenizer = None
        if not self.engine.skip_tokenizer_init:
            assert self.engine.tokenizer is not None  # locate() has filled it in
            tokenizer = await asyncio.to_thread(Tokenizer.load, self.engine.tokenizer, self.server.chat_template)
        return create_app(client, tokenizer, self.engine, self.server)

    async def _live(self, client: Client, loading: asyncio.Task[None]) -> int:
        """Wait for the engine, then for a signal; start a dead engine again, a few times."""
        deaths = 0
        while True:
            stop = asyncio.create_task(self.stopping.wait())
            bar = asyncio.create_task(show_loading(client))
            try:
                await asyncio.wait({loading, stop}, return_when=asyncio.FIRST_COMPLETED)
                bar.cancel()
                await asyncio.wait({bar})  # it clears its line before anything else is said
                if self.stopping.is_set():
                    loading.cancel()
                    return 0
                loading.result()  # raises what the engine said
                self._say_ready(client)
                begun = time.monotonic()
                died = asyncio.create_task(client.wait_ended())
                await asyncio.wait({died, stop}, return_when=asyncio.FIRST_COMPLETED)
                died.cancel()
                if self.stopping.is_set():
                    return 0
            except EngineDied as error:
                if not deaths:
                    raise InputError(str(error)) from error
                begun = time.monotonic()
            finally:
                stop.cancel()
                bar.cancel()
            deaths = 1 if time.monotonic() - begun > LIVED_S else deaths + 1
            if deaths > RESTARTS:
                print(f"appliance: error: the engine died {deaths} times in a row: {client.failure}", file=sys.stderr)
                return 1
            log.error("the engine has died (%s); it is started again", client.failure)
            await client.stop(0)
            client = Client(self.engine)
            self.state.client = client
            loading = asyncio.create_task(client.start())

    def _say_ready(self, client: Client) -> None:
        info = client.info
        assert info is not None
        host, port = self.sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        url = f"{'https' if self.server.ssl_certfile else 'http'}://{shown}:{port}/v1"
        logs.tell(
            f"appliance: ready at {url} with model {self.state.names[0]}: up to {info.max_model_len} tokens a "
            f"sequence, {info.plan['max_concurrency']:.1f} such sequences at once, loaded in {info.ready_s:.1f} s",
            self.server,
        )

    async def _drain(self) -> None:
        """Refuse new requests, let running ones finish for a while, then end the rest with an error."""
        self.state.draining = True
        deadline = time.monotonic() + 0.9 * self.server.shutdown_timeout
        if self.state.jobs:
            log.info("waiting up to %g s for %d running requests", self.server.shutdown_timeout, len(self.state.jobs))
        while self.state.jobs and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for job in list(self.state.jobs):
            job.fail(unavailable("the server is shutting down", "shutting_down"))

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self.stopping.is_set():
            os._exit(130)  # asked twice: the engine process sees the pipe close and ends too
        print("appliance: stopping (again to stop at once)", file=sys.stderr, flush=True)
        self.stopping.set()
