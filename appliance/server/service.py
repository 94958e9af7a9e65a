"""One server process at work: HTTP in front, the models' engines behind, signals and the end of it all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence

import uvicorn
from tqdm import tqdm

from appliance import leash
from appliance.config import ServerConfig
from appliance.runtime.client import EngineDied
from appliance.server import logs
from appliance.server.app import app_of
from appliance.server.beside import keep_what_is_there
from appliance.server.errors import unavailable
from appliance.server.host import DEATHS, EngineHost
from appliance.server.http import BACKLOG, HttpServer, http_config
from appliance.server.notify import beat, notify
from appliance.server.site import Site
from appliance.server.state import Shared
from quant.errors import InputError

log = logging.getLogger("appliance.server")


async def show_loading(host: EngineHost) -> None:
    """A progress bar on a terminal's stderr while the weights are read."""
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc="Loading weights", leave=False, disable=None) as bar:
        while host.client.state in ("unloaded", "loading"):
            done, bar.total = host.client.loading
            bar.update(done - bar.n)
            await asyncio.sleep(0.1)


class _Http(HttpServer):
    """uvicorn without its ten wake-ups a second and without its signal handling: idle is idle."""

    def __init__(self, config: uvicorn.Config, sock: socket.socket) -> None:
        super().__init__(config)
        self.stop, self.sock = asyncio.Event(), sock

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        self.server_state.default_headers = self.config.encoded_headers
        self.sock.listen(BACKLOG)
        await self.stop.wait()


class Service:
    """One server process: its HTTP side, and the engines that it starts, watches and ends."""

    def __init__(
        self, sock: socket.socket, hosts: Sequence[EngineHost], shared: Shared, budget: int, server: ServerConfig
    ) -> None:
        """``budget``: bytes that engines may take together. The first host's model is loaded first."""
        self.sock, self.hosts, self.shared, self.server = sock, hosts, shared, server
        self.site = Site(hosts, shared, budget)
        self.stopping = asyncio.Event()

    async def run(self) -> int:
        """The exit code. Raises InputError where a model cannot be loaded at start."""
        self._catch_signals()
        first = self.hosts[0]
        loading = asyncio.create_task(self.site.bring(first))
        try:
            await asyncio.sleep(0)  # the engine process starts while this one reads the tokenizer
            app = app_of(self.site, await first.prepare())
        except BaseException:
            loading.cancel()
            await asyncio.wait({loading})
            raise
        http = _Http(http_config(app, self.server), self.sock)
        answering = asyncio.create_task(http.serve(sockets=[self.sock]))
        keys = self.shared.keys
        beside = [asyncio.create_task(beat()), *([asyncio.create_task(keys.usage.keep(keys.accounts))] if keys.usage else [])]
        try:
            return await self._live(loading)
        finally:
            for task in beside:
                task.cancel()
            notify("STOPPING=1")
            await self._drain()  # who asks meanwhile is told so, and not left before a closed door
            http.stop.set()
            await asyncio.gather(*(host.end() for host in self.hosts))
            await answering
            if keys.usage:
                keys.usage.write(keys.accounts)
            if self.shared.audit:
                self.shared.audit.close()

    async def _live(self, loading: asyncio.Task[None]) -> int:
        """Wait for the engines, then for a signal, or for engines that die again and again."""
        stop = asyncio.create_task(self.stopping.wait())
        work = asyncio.create_task(self._start(loading))
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if self.stopping.is_set():
                return 0
            work.result()  # raises what the engine said
            work = asyncio.create_task(self._all_hopeless())
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            return 0 if self.stopping.is_set() else 1
        except EngineDied as error:
            raise InputError(str(error)) from error
        finally:
            work.cancel()
            stop.cancel()
            await asyncio.wait({work, stop})

    async def _start(self, loading: asyncio.Task[None]) -> None:
        """Load the first model, and those that are to be loaded at start and fit beside those before them."""
        for host in self.hosts:
            if host is not self.hosts[0]:
                if host.entry.load != "start" or self.site.room_beside(host) < 0:
                    continue
                loading = asyncio.create_task(self.site.bring(host))
            bar = asyncio.create_task(show_loading(host))
            try:
                await loading
            finally:
                loading.cancel()
                bar.cancel()
                await asyncio.wait({loading, bar})  # it clears its line before anything else is said
            self._say_ready(host)
            notify("READY=1", f"STATUS=serves {host.names[0]}")
        self.site.starting = False
        keep_what_is_there()

    async def _all_hopeless(self) -> None:
        while not all(host.hopeless.is_set() for host in self.hosts):  # one that was may have been loaded again by hand
            for host in self.hosts:
                await host.hopeless.wait()
        why = self.hosts[0].client.failure
        logs.tell(f"appliance: error: the engine died {DEATHS} times in a row: {why}", self.server, stream=sys.stderr)

    def _say_ready(self, host: EngineHost) -> None:
        info = host.client.info
        if info is None:  # it has died since
            return
        address, port = self.sock.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        embeds = " for embeddings" if host.state is not None and host.state.pooler is not None else ""
        url = f"{'https' if self.server.ssl_certfile else 'http'}://{shown}:{port}/v1"
        logs.tell(
            f"appliance: ready at {url} with model {host.names[0]}{embeds}: up to {info.max_model_len} tokens a "
            f"sequence, {info.plan['max_concurrency']:.1f} such sequences at once, loaded in {info.ready_s:.1f} s",
            self.server,
        )

    async def _drain(self) -> None:
        """Refuse new requests, let running ones finish for a while, then end the rest with an error."""
        self.shared.draining = True
        deadline = time.monotonic() + 0.9 * self.server.shutdown_timeout
        if self.shared.jobs:
            log.info("waiting up to %g s for %d running requests", self.server.shutdown_timeout, len(self.shared.jobs))
        while self.shared.jobs and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for job in list(self.shared.jobs):
            job.fail(unavailable("the server is shutting down", "shutting_down"))

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        leash.hold(loop, self._let_go)

    def _let_go(self) -> None:
        log.warning("the program that started this server is gone: it ends, too")
        self.stopping.set()

    def _on_signal(self) -> None:
        if self.stopping.is_set():
            os._exit(130)  # asked twice: the engine process sees the pipe close and ends too
        self.stopping.set()
        with contextlib.suppress(OSError):  # nobody may read it any more
            logs.tell("appliance: stopping (again to stop at once)", self.server, stream=sys.stderr)
