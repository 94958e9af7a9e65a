"""A model of the server: its engine is started, watched, started again when it dies, and ended to make room."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextvars import Context
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from appliance.core.messages import EngineInfo
from appliance.core.params import RequestError
from appliance.models_file import Entry
from appliance.runtime.client import Client, EngineDied
from appliance.server.adapters import Adapters
from appliance.server.errors import unavailable
from appliance.server.state import Outline, ServerState, Shared
from appliance.text.tokenizer import Tokenizer
from quant.errors import InputError

if TYPE_CHECKING:
    from appliance.server.site import Site

log = logging.getLogger("appliance.server")

DEATHS = 3  # in a row after which an engine is not started again
LIVED_S = 60.0  # an engine that served this long may die without being counted


class Planned(Outline, Protocol):
    """What a host needs of its model's MemoryPlan."""

    @property
    def total(self) -> int:
        """Bytes of the device that it takes while loaded."""


class EngineHost:
    """A model with an engine process of its own. All methods belong to one event loop."""

    def __init__(self, entry: Entry, plan: Planned, shared: Shared, make: Callable[..., Client] = Client) -> None:
        """``entry``'s model and tokenizer are local directories."""
        self.entry, self.size, self.shared = entry, plan.total, shared
        self.outline: Outline = plan  # or what the latest engine has said of itself
        self.site: Site | None = None  # that it belongs to
        self.state: ServerState | None = None
        self.idle_s = entry.server.idle_unload
        self.used = time.monotonic()  # when the latest request came or ended
        self.closing = False  # whether it is to make room for another model
        self.hopeless = asyncio.Event()  # it died too often, and is not started again
        self.adapters = Adapters(entry.engine)
        self._furnished = True  # whether an engine that is ready has them
        self._make = make
        self._fresh = self._client()
        self._reading = asyncio.Lock()
        self._present: set[object] = set()  # requests that are being served
        self._waiting: set[object] = set()  # for it to be loaded
        self._quiet = asyncio.Event()  # no requests are being served
        self._quiet.set()
        self._turn: asyncio.Task[None] | None = None  # that loads it on demand
        self._life: asyncio.Task[None] | None = None  # that watches the engine
        self._timer: asyncio.TimerHandle | None = None  # that unloads it when idle

    def _client(self) -> Client:
        options = self.entry.engine
        if isinstance(self.outline, EngineInfo):  # adapters that are gone shall not keep an engine that follows from starting
            options = replace(options, lora_modules=())
        return self._make(options, step_timeout=self.entry.server.engine_step_timeout)

    @property
    def names(self) -> tuple[str, ...]:
        return self.entry.server.served_model_name

    @property
    def client(self) -> Client:
        return self.state.client if self.state else self._fresh  # type: ignore[return-value]

    @property
    def status(self) -> str:
        bare = {"ready": "loading", "stopped": "unloaded"}
        found = self.state.status if self.state else bare.get(self._fresh.state, self._fresh.state)
        if found == "ok" and not self._furnished:
            return "loading"
        return "unloaded" if found == "draining" and not self.shared.draining else found

    @property
    def root(self) -> str:
        return self.entry.engine.model or self.names[0]

    @property
    def max_model_len(self) -> int:
        return (self.client.info or self.outline).max_model_len

    @property
    def loaded(self) -> bool:
        """Whether its memory is taken, or about to be: that of an engine that is started again, too."""
        return self.client.state in ("loading", "ready") or (self._life is not None and not self._life.done())

    @property
    def busy(self) -> bool:
        return bool(self._present)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def turning(self) -> bool:
        """Whether it is loaded for those who wait, or leaves in good order: it can be had."""
        return self._turn is not None or self.closing

    async def prepare(self) -> ServerState:
        """Read the tokenizer. Raises InputError."""
        engine, server = self.entry.engine, self.entry.server
        async with self._reading:
            if self.state is None:
                tokenizer = None
                if not engine.skip_tokenizer_init:
                    assert engine.tokenizer is not None
                    tokenizer = await asyncio.to_thread(
                        Tokenizer.load, engine.tokenizer, server.chat_template, server.default_chat_template_kwargs
                    )
                self.state = ServerState(self._fresh, tokenizer, engine, server, self.shared, self.outline, self.adapters)
            return self.state

    async def load(self) -> None:
        """Start the engine and serve, from now on until ``unload``. Raises InputError or EngineDied with its words."""
        await self.unload()  # what is left of an earlier engine, and whoever would start it again
        starting = asyncio.create_task(self._start())  # while this process reads the tokenizer
        try:
            await asyncio.sleep(0)
            await self.prepare()
            await starting
        except BaseException:
            starting.cancel()
            await self._renew()
            raise
        self.client.give_way()
        self.hopeless.clear()
        self._life = asyncio.create_task(self._keep())
        self.used = time.monotonic()
        self._rest()

    async def _start(self) -> None:
        """The engine, with all adapters: until they are there, it is loading."""
        self._furnished = False
        await self.client.start()
        await self.adapters.bring_back(self.client, self.client.info.adapters if self.client.info else ())
        self._furnished = True

    async def _renew(self) -> None:
        """A client for another engine process, in place of the one that is there."""
        await self.client.stop(0)
        self.outline = self.client.info or self.outline
        self._fresh = self._client()
        if self.state:
            await self.state.succeed(self._fresh, self.outline)

    async def _keep(self) -> None:
        """Start a dead engine again, a few times."""
        deaths, begun = 0, time.monotonic()
        while True:
            await self.client.wait_ended()
            while self.client.state != "ready":
                if self.client.state == "stopped":
                    return
                deaths = 1 if time.monotonic() - begun > LIVED_S else deaths + 1
                if deaths >= DEATHS:
                    log.error("%s: the engine died %d times in a row: %s", self.names[0], deaths, self.client.failure)
                    return self.hopeless.set()
                log.error("%s: the engine has died (%s); it is started again", self.names[0], self.client.failure)
                if self.state:
                    self.state.metrics.restarts += 1
                await self._renew()
                try:
                    await self._start()
                    log.info("%s: the engine is ready again", self.names[0])
                    self._rest()  # its time may have been up meanwhile
                except (InputError, EngineDied) as error:
                    self.client.failure = self.client.failure or str(error)
                    self.client.state = "dead"
                begun = time.monotonic()

    async def unload(self) -> None:
        """End the engine; its memory is free when this returns. Requests that are being served get a 503."""
        self.closing = True
        if self._timer:
            self._timer.cancel()
        if self._life:
            self._life.cancel()
            await asyncio.wait({self._life})
        if self.client.state != "unloaded":
            await self._renew()
        self.hopeless.clear()
        self.closing = False

    async def end(self) -> None:
        """End the engine for good."""
        for task in (self._turn, self._life):
            if task:
                task.cancel()
                await asyncio.wait({task})
        await self.client.stop(0)

    async def enter(self, visitor: object) -> ServerState:
        """As Host has it: a model that is not loaded is loaded for whoever asks for it, in its turn."""
        self.used = time.monotonic()
        if self.shared.draining or (self._turn is None and self.status in ("dead", "loading") and not self._starts_later):
            raise self._refusal()
        if self.status == "ok" and not self.closing:
            self._present.add(visitor)
            self._quiet.clear()
            return self.state  # type: ignore[return-value]
        if 0 <= (most := self.entry.server.max_num_queued_reqs) <= (waiting := len(self._waiting)):
            raise unavailable(f"{waiting} requests wait already, and --max-num-queued-reqs is {most}", "server_overloaded")
        self._waiting.add(visitor)
        try:
            await self.come()
        except BaseException:
            self.leave(visitor)
            raise
        assert self.state is not None
        return self.state

    async def read(self) -> ServerState:
        """As Host has it: whoever asks for its tokenizer alone neither loads a model nor keeps it."""
        try:
            return await self.prepare()
        except InputError as error:
            raise self._unloadable(error) from None

    @property
    def _starts_later(self) -> bool:
        """Whether it is loaded at start, behind the first model: as for one that is loaded on demand, it can be waited for."""
        return self.site is not None and self.site.starting and self is not self.site.hosts[0] and self.status == "loading"

    async def come(self) -> None:
        """Be loaded, in the turn that others wait for already, where there is one; whoever gives up waiting does not stop it.

        Raises RequestError (503).
        """
        if self.shared.draining:
            raise self._refusal()
        if self._turn is None:
            self._turn = asyncio.create_task(self._take_turn(), context=Context())  # what it leaves behind is not this request's
            self._turn.add_done_callback(lambda turn: turn.cancelled() or turn.exception())  # whoever waited may have left
        turn = self._turn
        try:
            await asyncio.shield(turn)
        except asyncio.CancelledError:
            if turn.cancelled() and self.shared.draining:  # not this request, but the server ends
                raise self._refusal() from None
            raise

    async def _take_turn(self) -> None:
        assert self.site is not None
        try:
            await self.site.bring(self)
            log.info("%s: loaded on demand", self.names[0])
            self._present |= self._waiting
            self._waiting.clear()
            self._rest()
        except (InputError, EngineDied) as error:
            log.error("%s cannot be loaded: %s", self.names[0], error)
            raise self._unloadable(error) from None
        finally:
            self._turn = None

    def _unloadable(self, error: Exception) -> RequestError:
        return unavailable(f"the model {self.names[0]} cannot be loaded: {error}", "model_not_loaded")

    def _refusal(self) -> RequestError:
        if self.shared.draining:
            return unavailable("the server is shutting down", "shutting_down")
        return self.state.refusal() if self.state else unavailable("the model is still loading", "model_loading")

    def leave(self, visitor: object) -> None:
        """As Host has it."""
        self._waiting.discard(visitor)
        self._present.discard(visitor)
        self.used = time.monotonic()
        self._rest()

    def _rest(self) -> None:
        """Nobody may be there any more: then others can have the room, at once or when time is up."""
        if self._present:
            return self._quiet.clear()
        self._quiet.set()
        if self._timer:
            self._timer.cancel()
        if self.idle_s and self.client.state == "ready":
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self.idle_s, lambda: loop.create_task(self._unload_idle()), context=Context())

    async def _unload_idle(self) -> None:
        if self.site and not self._present and self.client.state == "ready":
            log.info("%s: no request for %g s; it is unloaded", self.names[0], self.idle_s)
            await self.site.send_away(self)

    async def quiet(self) -> None:
        """Let nobody else in, and wait until the last one has left."""
        self.closing = True
        await self._quiet.wait()
