"""The models of one server: which of them are loaded, and who gives way to whom."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from appliance.core.params import RequestError
from appliance.runtime.client import EngineDied
from appliance.server.host import EngineHost
from appliance.server.hosts import Host
from appliance.server.state import Shared

log = logging.getLogger("appliance.server")


class Site:
    def __init__(self, hosts: Sequence[Host], shared: Shared, budget: int = 0) -> None:
        """``budget``: bytes that the models loaded at a time may take together."""
        self.hosts, self.shared, self.budget = hosts, shared, budget
        self.starting = True  # until the models are loaded that are loaded at start
        self._change = asyncio.Lock()  # one model comes or goes at a time
        self.adapting = asyncio.Lock()  # and so does one adapter
        for host in hosts:
            if isinstance(host, EngineHost):
                host.site = self

    def find(self, name: str | None) -> Host:
        """The model that has that name, or an adapter of it; the first one where none is named. Raises RequestError (404)."""
        for host in self.hosts:
            if not name or name in host.names or name in host.adapters.paths:
                return host
        names = ", ".join(one for host in self.hosts for one in (*host.names, *host.adapters.paths))
        message = f"The model `{name}` does not exist. This server has: {names}"
        raise RequestError(message, param="model", code="model_not_found", status=404)

    @property
    def status(self) -> str:
        """loading, ok, draining or dead: ok where some model can be had."""
        if self.shared.draining:
            return "draining"
        found = [host.status for host in self.hosts]
        turning = any(isinstance(host, EngineHost) and host.turning for host in self.hosts)
        if found[0] == "ok" or (not self.starting and (turning or {"ok", "unloaded"} & set(found))):
            return "ok"
        return "loading" if self.starting or "loading" in found else found[0]

    @property
    def stuck(self) -> bool:
        """Whether all engines that are ready are."""
        ready = [state.client for state in self.shared.states if state.status == "ok"]
        return bool(ready) and all(client.stuck for client in ready)

    def room_beside(self, host: EngineHost) -> int:
        """Bytes of the budget that are left when ``host`` is loaded, too."""
        return self.budget - host.size - sum(one.size for one in self._beside(host))

    async def bring(self, host: EngineHost) -> None:
        """Load a model, when its turn has come; those that were idle longest make room. Raises InputError, EngineDied."""
        async with self._change:
            if host.status == "ok" and not host.closing:
                return
            while self.room_beside(host) < 0 and (others := self._beside(host)):
                victim = min(others, key=lambda one: (one.busy, one.used))
                log.info("%s makes room for %s", victim.names[0], host.names[0])
                await victim.quiet()
                await victim.unload()
            if self.shared.draining:
                raise EngineDied("the server is shutting down")
            await host.load()

    def _beside(self, host: EngineHost) -> list[EngineHost]:
        """The other models that are loaded."""
        return [one for one in self.hosts if isinstance(one, EngineHost) and one is not host and one.loaded]

    async def send_away(self, host: EngineHost, *, wait: bool = False) -> None:
        """Unload a model if it is idle; ``wait``: as soon as it is."""
        async with self._change:
            if wait:
                await host.quiet()
            elif time.monotonic() - host.used < 0.99 * host.idle_s:
                return  # somebody came while this waited for its turn
            if not host.busy:
                await host.unload()
