"""The asyncio client of an engine in a process of its own (appliance/runtime/worker.py).

The process is started with ``python -m appliance.runtime.worker FD``: no fork of a process that holds threads, no second import
of the caller's main module. One socket pair carries pickled tuples both ways; when either end goes away the other one sees it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from multiprocessing.connection import Connection
from typing import Any

import psutil

from appliance.config import EngineConfig
from appliance.core.messages import (
    Abort,
    EngineInfo,
    Event,
    LoadAdapter,
    Nudge,
    ResetPrefixCache,
    Stats,
    Submit,
    UnloadAdapter,
    joined,
)
from appliance.core.params import RequestError
from appliance.runtime.logs import take_lines
from appliance.runtime.pace import Pace, pace_beside, step_aside
from quant.errors import InputError

log = logging.getLogger("appliance.client")

Sink = Callable[[Event | Exception], None]
# Of engines: a process begins with the priority of the thread that starts it, and the event loop's may have less (give_way).
_starter = ThreadPoolExecutor(1, "engine-starter")
STILL_S = 30.0  # an engine that has work, says nothing for so long and used no processor time meanwhile: it is stopped, or waits
READING_S = 60.0  # so long it may take at least to read a vocabulary for grammars, in which the engine says nothing
STUCK_S = 5.0  # after so much of that it counts as stuck, though it may still go on
LOOK_S = 2.0  # how often it is looked at, at least


class EngineDied(RuntimeError):
    """The engine process is gone; the requests it held cannot be answered."""


class Client:
    """Starts the engine process and multiplexes requests over it. All methods belong to one event loop."""

    COMMAND = (sys.executable, "-m", "appliance.runtime.worker")  # and the number of its end of the socket pair

    def __init__(self, config: EngineConfig, *, step_timeout: float = 0.0) -> None:
        """``step_timeout``: seconds after which an engine that has work and finishes no step is ended; 0: never."""
        self.config, self.step_timeout = config, step_timeout
        self.state = "unloaded"  # then loading, ready, dead or stopped
        self.info: EngineInfo | None = None
        self.failure: str | None = None
        self.loading: tuple[int, int] = (0, 0)
        self._stats = Stats()
        self._sinks: dict[str, Sink] = {}
        self._adapters: deque[asyncio.Future[str | None]] = deque()  # of those who wait for one to be loaded, or unloaded
        self._outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._conn: Connection | None = None
        self._ended = asyncio.Event()
        self._inbox: deque[tuple[Any, ...]] = deque()  # messages that have come, and were not looked at
        self._pace = Pace()
        self._heard = 0  # messages of the engine
        self._owed = False  # whether it has said nothing since it was told something
        self._still = 0.0  # seconds for which it has had work, said nothing and used no processor time
        self._reading = False  # whether it has said that it reads a vocabulary
        self._watch: asyncio.Task[None] | None = None  # while there is work

    async def start(self) -> None:
        """Start the process and wait until the model is loaded. Raises InputError with the engine's words, or EngineDied."""
        self.state = "loading"
        try:
            self._conn = _starter.submit(self._spawn).result()
        except OSError as error:  # no file, process or memory to be had now
            self.state = "dead"
            raise EngineDied(f"the engine process cannot be started: {error}") from None
        assert self._process is not None
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._outbox.put((self.config, logging.getLogger("appliance").getEffectiveLevel()))
        threading.Thread(target=take_lines, args=(self._process.stderr,), name="engine-lines", daemon=True).start()
        threading.Thread(target=self._write, name="engine-writer", daemon=True).start()
        threading.Thread(target=self._read, args=(loop,), name="engine-reader", daemon=True).start()
        await self._ready

    def _spawn(self) -> Connection:
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            command = [*self.COMMAND, str(theirs.fileno())]
            pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], **pipes)  # type: ignore[call-overload]
            undo.pop_all()
        return Connection(ours.detach())

    def submit(self, submit: Submit, sink: Sink) -> None:
        """Hand a request to the engine. ``sink`` gets each Event of its ``n`` completions, or the error that ends them all.

        Errors: RequestError when the engine refuses the request, EngineDied when it dies on the way. Raises both, too.
        """
        if self.state != "ready":
            raise EngineDied(self.failure or f"the engine is {self.state}")
        if submit.request_id in self._sinks:
            raise RequestError(f"request id {submit.request_id!r} is already in use", param="request_id", status=409)
        self._sinks[submit.request_id] = sink
        self._tell(submit)

    def nudge(self) -> None:
        """Have an engine that is idle say something, so that ``stuck`` is known of it, too."""
        if self.state == "ready" and not self._owed and not self._sinks:
            self._tell(Nudge())

    @property
    def stuck(self) -> bool:
        """Whether it answers nothing, and does not even use the processor; known a few seconds after it was asked something."""
        return self.state == "ready" and self._still > STUCK_S

    async def load_adapter(self, name: str, path: str, *, replace: bool = False) -> None:
        """Load a LoRA adapter from a directory. Raises RequestError with what is wrong with it, or EngineDied."""
        await self._change(LoadAdapter(name, path, replace))

    async def unload_adapter(self, name: str) -> None:
        """Let no more requests have a LoRA adapter. Raises RequestError where there is none, or EngineDied."""
        await self._change(UnloadAdapter(name))

    async def _change(self, message: LoadAdapter | UnloadAdapter) -> None:
        if self.state != "ready":
            raise EngineDied(self.failure or f"the engine is {self.state}")
        done: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._adapters.append(done)
        self._tell(message)
        if (error := await done) is not None:
            raise RequestError(error, param="lora_name")

    def _tell(self, message: Submit | Nudge | LoadAdapter | UnloadAdapter) -> None:
        self._owed = True
        if self.step_timeout and (self._watch is None or self._watch.done()):
            self._watch = asyncio.create_task(self._watch_steps())
        self._outbox.put(message)

    def close(self, request_id: str, *, abort: bool) -> None:
        """No more events of a request for its sink; ``abort``: it has not come to its end."""
        if self._sinks.pop(request_id, None) and abort:
            self.abort(request_id)

    async def generate(self, submit: Submit) -> AsyncGenerator[Event, None]:
        """``submit`` as an iterator. Closing or cancelling it aborts what is left."""
        stream: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self.submit(submit, stream.put_nowait)
        left = submit.params.width
        try:
            while left:
                item = await stream.get()
                if isinstance(item, Exception):
                    left = 0
                    raise item
                left -= item.finish_reason is not None
                yield item
        finally:
            self.close(submit.request_id, abort=left > 0)

    def abort(self, request_id: str, index: int | None = None, reason: str = "abort") -> None:
        """End a request, or one of its completions, in the engine. Unknown or ended ones are ignored."""
        if self.state == "ready":
            self._owed = True
            self._outbox.put(Abort(request_id, index, reason))

    def reset_prefix_cache(self) -> None:
        """Requests that are generated from now on find nothing of earlier ones."""
        self._outbox.put(ResetPrefixCache())

    def give_way(self) -> None:
        """Where the engine has all processors, the calling thread works with a tenth of its weight from now on."""
        if self._pace.crowded:
            step_aside()

    @property
    def pid(self) -> int | None:
        """The engine process."""
        return self._process.pid if self._process else None

    @property
    def active(self) -> int:
        """Requests that are not yet answered to the end."""
        return len(self._sinks)

    def knows(self, request_id: str) -> bool:
        return request_id in self._sinks

    async def stats(self) -> Stats:
        """The latest snapshot; never waits for a step."""
        return self._stats

    async def wait_ended(self) -> None:
        """Until the engine process is gone."""
        await self._ended.wait()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Let running requests finish for up to ``drain_s`` seconds, abort the rest, and end the process."""
        deadline = time.monotonic() + drain_s
        while self.state == "ready" and self._sinks and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for request_id in list(self._sinks):
            self.abort(request_id)
        if self.state in ("loading", "ready"):
            self.state = "stopped"
        if self._process is None:
            return
        self._outbox.put(None)
        try:
            await asyncio.to_thread(self._process.wait, 2.0)
        except subprocess.TimeoutExpired:  # in the middle of a long step, or still loading
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    async def _watch_steps(self) -> None:
        """End an engine that is stuck, so that those who wait hear of it and another can be started. Only while there is work.

        Silence is counted and not measured: the clock goes on while this process is stopped, or its machine is.
        """
        assert self._process is not None
        process, heard, before, silent = psutil.Process(self._process.pid), -1, 0.0, 0.0
        look = min(LOOK_S, STILL_S / 8, self.step_timeout / 8)
        while (self._sinks or self._owed) and self.state == "ready":
            with contextlib.suppress(psutil.Error):  # it has just ended: the reader sees that too
                used = sum(process.cpu_times()[:2])
                if heard != self._heard:
                    heard, before, silent = self._heard, used, 0.0
                still = used - before < 0.01 * silent
                self._still = silent if still else 0.0
                most = max(self.step_timeout, READING_S) if self._reading else self.step_timeout
                if silent > most or (silent > STILL_S and still):
                    why = "uses no processor time" if still else "finishes no step"
                    self.failure = f"the engine is stuck: it has work, but {why} since {silent:.0f} s"
                    log.error("%s; it is ended", self.failure)
                    self._process.kill()
                    return
            await asyncio.sleep(look)
            silent += look
        self._still = 0.0

    def _write(self) -> None:
        assert self._conn is not None
        try:
            while (message := self._outbox.get()) is not None:
                self._conn.send(message)
            self._conn.send(None)
        except OSError:
            log.debug("the engine's end of the pipe is closed")  # the reader sees the same and reports it

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._conn is not None
        try:
            rest = 0.0
            while True:
                self._inbox.append(self._conn.recv())
                while rest and self._conn.poll():  # what came meanwhile
                    self._inbox.append(self._conn.recv())
                loop.call_soon_threadsafe(self._take_all)
                if rest := self._pace.rest():
                    time.sleep(rest)
        except (EOFError, OSError):
            with contextlib.suppress(RuntimeError):  # the loop may be closed already
                loop.call_soon_threadsafe(self._gone)

    def _take_all(self) -> None:
        """What has come since. Events of several steps are joined: where steps come faster than they can be told one by one,
        that costs hardly more than one step, and nobody falls behind ever further."""
        if self._inbox:
            self._pace.tell()
        steps: list[list[Event]] = []
        while self._inbox:
            message = self._inbox.popleft()
            self._heard, self._owed = self._heard + 1, False
            if message[0] == "events":
                steps.append(message[1])
                self._stats = message[2] or self._stats
            else:
                self._take(message)
        for event in steps[0] if len(steps) == 1 else joined(chain.from_iterable(steps)):
            if sink := self._sinks.get(event.request_id):
                sink(event)

    def _take(self, message: tuple[Any, ...]) -> None:
        match message:
            case ("refused", request_id, text, param, code, status):
                if sink := self._sinks.get(request_id):
                    sink(RequestError(text, param=param, code=code, status=status))
            case ("adapter", error):
                if not (waiting := self._adapters.popleft()).done():  # whoever waited may have left
                    waiting.set_result(error)
            case ("reading", reading):
                self._reading = reading
            case ("loading", done, total):
                self.loading = (done, total)
            case ("ready", info, stats):
                self.info, self._stats = info, stats
                self._pace = pace_beside(info.device, self.config.threads)
                if self.state == "loading":  # and not stopped since
                    self.state = "ready"
                    if not self._ready.done():
                        self._ready.set_result(None)
            case ("failed", text, is_input):
                self.failure = text
                if not self._ready.done():
                    self._ready.set_exception(InputError(text) if is_input else EngineDied(text))

    def _gone(self) -> None:
        """The pipe closed: the process has ended, or is about to."""
        self._take_all()
        self._ended.set()
        if self.state != "stopped":
            self.state = "dead"
            assert self._process is not None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.5)
            self.failure = self.failure or f"the engine process ended unexpectedly (exit code {self._process.returncode})"
            log.error("%s", self.failure)
        reason = self.failure or "the server is shutting down"
        if not self._ready.done():
            self._ready.set_exception(EngineDied(reason))
        for waiting in self._adapters:
            if not waiting.done():
                waiting.set_exception(EngineDied(reason))
        for sink in list(self._sinks.values()):
            sink(EngineDied(reason))
