"""What all routes share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from appliance.config import EngineConfig, ServerConfig
from appliance.core.messages import EngineInfo, Event, Stats, Submit, continued
from appliance.core.params import RequestError
from appliance.pooling import read_pooler
from appliance.server.adapters import Adapters
from appliance.server.audit import AuditLog
from appliance.server.errors import unavailable
from appliance.server.fields import unknown
from appliance.server.hardware import Hardware
from appliance.server.job import Job
from appliance.server.keys import Keyring
from appliance.server.metrics import HttpMetrics, Metrics
from appliance.server.parsers import Parsers
from appliance.server.redact import line
from appliance.server.respond import Asked
from appliance.server.responses.store import ResponseStore
from appliance.server.schemas import Fields
from appliance.server.scrape import Scrape
from appliance.text.defaults import model_defaults
from appliance.text.tokenizer import Tokenizer
from appliance.version import __version__

log = logging.getLogger("appliance.server")


class EngineClient(Protocol):
    """What the server needs of ``appliance.runtime.client.Client``."""

    state: str
    info: EngineInfo | None
    failure: str | None
    loading: tuple[int, int]

    @property
    def pid(self) -> int | None: ...
    def submit(self, submit: Submit, sink: Callable[[Event | Exception], None]) -> None: ...
    def close(self, request_id: str, *, abort: bool) -> None: ...
    def abort(self, request_id: str, index: int | None = None, reason: str = "abort") -> None: ...
    def reset_prefix_cache(self) -> None: ...
    def nudge(self) -> None: ...
    @property
    def stuck(self) -> bool: ...
    async def stats(self) -> Stats: ...
    async def load_adapter(self, name: str, path: str, *, replace: bool = False) -> None: ...
    async def unload_adapter(self, name: str) -> None: ...
    async def stop(self, drain_s: float = 0.0) -> None: ...


class Outline(Protocol):
    """What requests that need no engine go by: what it says when it is ready, else what the one before it said, or the plan."""

    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


class Shared:
    """What all models of one server have in common."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises InputError for a bad key file or audit log."""
        beside = f"{config.api_key_file}.used" if config.api_key_file else None
        self.keys = Keyring(config.api_key, config.api_key_file, config.api_key_usage or beside)
        self.audit = AuditLog(config.audit_log) if config.audit_log else None
        self.responses = ResponseStore(config.max_stored_responses)
        self.jobs: set[Job] = set()
        self.asked: set[Asked] = set()  # requests, also those that are no job yet
        self.begun, self.started = time.time(), time.monotonic()
        self.draining = False
        self.budget: int | None = None  # bytes that all models may take together, where there may be several
        self.named: set[str] = set()  # unknown request fields that the log has named already
        self.states: list[ServerState] = []  # of all models whose tokenizer was read so far
        self.http, self.hardware = HttpMetrics(), Hardware(self._engines)
        self.scrape = Scrape(self.http, vllm=config.vllm_metrics)

    def _engines(self) -> dict[str, int]:
        """The engine processes, by name: the first one has no other."""
        pids = [(state.names[0], state.client.pid) for state in self.states]
        return {f"engine {name}" if k else "engine": pid for k, (name, pid) in enumerate(pids) if pid}


class ServerState:
    """One model of the server."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer | None,
        engine_config: EngineConfig,
        server_config: ServerConfig,
        shared: Shared | None = None,
        outline: Outline | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        """``outline``: while the engine has said nothing of itself. ``adapters``: where others than the options' may come."""
        self.client, self.tokenizer, self.outline = client, tokenizer, outline
        self.shared = shared = shared or Shared(server_config)
        self.keys, self.audit, self.jobs = shared.keys, shared.audit, shared.jobs
        self.engine_config, self.server_config = engine_config, server_config
        self.adapters = Adapters(engine_config) if adapters is None else adapters
        self.names = tuple(server_config.served_model_name) or (engine_config.model or "demo",)
        directory = Path(engine_config.model) if engine_config.model else None
        self.defaults: dict[str, Any] = model_defaults(directory, server_config.generation_config)
        self.pooler = read_pooler(directory, engine_config.runner)
        self.parsers = Parsers.of(tokenizer, server_config)
        self.metrics = Metrics(self.names[0])
        self.hardware = shared.hardware
        shared.states.append(self)
        self.version = __version__
        self._counted = Stats()  # by the engines before this one
        self.token_name = lru_cache(maxsize=65536)(tokenizer.token_str if tokenizer else str)
        self.token_bytes = lru_cache(maxsize=65536)(self._bytes)

    @property
    def draining(self) -> bool:
        return self.shared.draining

    @draining.setter
    def draining(self, value: bool) -> None:
        self.shared.draining = value

    @property
    def status(self) -> str:
        """loading, ok, unloaded, draining or dead."""
        if self.client.state == "ready":
            return "draining" if self.draining else "ok"
        return self.client.state if self.client.state in ("loading", "unloaded", "dead") else "draining"

    @property
    def info(self) -> EngineInfo:
        """Raises RequestError (503) when no request can be served now."""
        if self.status != "ok" or self.client.info is None:
            raise self.refusal()
        return self.client.info

    @property
    def known(self) -> Outline:
        """What needs no engine. Raises RequestError (503) where nothing is known yet, and when the server ends."""
        found = self.client.info or self.outline
        if self.draining or found is None:
            raise self.refusal()
        return found

    @property
    def shown(self) -> EngineInfo | None:
        """What is known of the engine. Where there may be several, each knows its share, and no budget: theirs is shown."""
        found, budget = self.client.info, self.shared.budget
        if found is None or budget is None:
            return found
        shared = {"budget_bytes": budget, "budget_source": "what the models of this server may take together"}
        return replace(found, plan={**found.plan, **shared})

    async def stats(self) -> Stats:
        """The engine at this moment; its counters go on from those of the engines before it."""
        return continued(self._counted, await self.client.stats())

    async def succeed(self, client: EngineClient, outline: Outline) -> None:
        """Another engine takes over."""
        self._counted = await self.stats()
        self.client, self.outline = client, outline

    def adapter(self, model: str | None) -> str:
        """The adapter that a request for ``model`` means, which the engine has or has not; "": the model itself."""
        return "" if not model or model in self.names else model

    def refusal(self) -> RequestError:
        """Why no request is served now."""
        match "draining" if self.draining else self.status:
            case "draining":
                return unavailable("the server is shutting down", "shutting_down")
            case "dead":
                return unavailable(self.client.failure or "the engine has died", "engine_dead")
        return unavailable("the model is still loading", "model_loading")

    def check_queue(self) -> None:
        """Raises RequestError (503) when too many requests wait. The engine's own count would be as old as its latest step."""
        most = self.server_config.max_num_queued_reqs
        if 0 <= most <= (waiting := sum(len(job.submits) for job in self.jobs if not job.answering)):
            raise unavailable(f"{waiting} requests wait already, and --max-num-queued-reqs is {most}", "server_overloaded")

    def check_unknown(self, body: Fields) -> None:
        """Name unknown fields once in the log, or refuse them under --strict-requests."""
        names = unknown(body.model_extra or {})
        if names and self.server_config.strict_requests:
            raise RequestError(f"unknown field {names[0]!r} (--strict-requests)", param=names[0], code="unknown_parameter")
        fresh = set(names[:100]) - self.shared.named  # a client that makes names up shall fill neither time nor memory
        if fresh and len(self.shared.named) < 1000:
            self.shared.named |= fresh
            log.warning("requests hold fields that are unknown here and ignored: %s", line(", ".join(sorted(fresh)), 500))

    def _bytes(self, token: int) -> list[int] | None:
        raw = self.tokenizer.token_bytes(token) if self.tokenizer else None
        return None if raw is None else list(raw)
