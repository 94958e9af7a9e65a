"""What every request passes: its headers' size, its key, the key's limits; and the audit log's record of it."""

from __future__ import annotations

import time
from contextlib import ExitStack
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance.core.params import RequestError
from appliance.server.errors import error_response
from appliance.server.limits import Account
from appliance.server.logs import tell_request
from appliance.server.pages import Pages
from appliance.server.redact import line
from appliance.web import pages

if TYPE_CHECKING:
    from appliance.server.job import Job
    from appliance.server.state import ServerState

PUBLIC = frozenset({"/health", "/v1/health", "/ready", "/ping", "/"}) | pages.PATHS  # all else needs a key, where there are keys
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
MAX_HEADERS, MAX_HEADER_BYTES = 100, 32 * 1024
HEADERS = {400: {"Connection": "close"}, 431: {"Connection": "close"}, 401: {"WWW-Authenticate": 'Bearer realm="appliance"'}}


class Ticket:
    """One HTTP request: whose it is, and what it has cost so far."""

    def __init__(self) -> None:
        self.key: str | None = None
        self.account: Account | None = None
        self.model: str | None = None
        self.prompt_tokens = self.generated_tokens = 0
        self.finish_reasons: list[str] = []
        self.jobs: list[Job] = []
        self.held = ExitStack()  # what ends with the answer

    def begin(self, job: Job) -> None:
        """Charge the prompts of a job that is about to be computed. Raises RateLimited."""
        tokens = sum(len(prompt.token_ids) for prompt in job.prompts)
        if self.account:
            self.account.prompt(tokens)
        self.prompt_tokens += tokens
        self.model = job.body.model or job.state.names[0]
        self.jobs.append(job)

    @property
    def first_s(self) -> float | None:
        """Seconds from the arrival to the first token of any of its completions."""
        return min((c.first_s for job in self.jobs for c in job.courses if c.first_s is not None), default=None)

    def generated(self, tokens: int) -> None:
        if self.account:
            self.account.tokens(tokens)
        self.generated_tokens += tokens


current: ContextVar[Ticket | None] = ContextVar("current", default=None)  # of the task that answers a request


class Guard:
    """Where keys are given, nothing but PUBLIC is answered without one: a route that is added is guarded by itself."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app, self.state = app, state
        server = state.server_config
        self.pages = None if server.insecure else Pages(server.host, server.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # no websockets here: they would pass unseen
            return await self.app(scope, receive, send) if scope["type"] == "lifespan" else None
        ticket, begun, status = Ticket(), time.monotonic(), 500
        current.set(ticket)

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status >= 400:  # now, and not when it is sent: whoever got it finds it counted
                    self.state.shared.http.failed(status, scope["state"].get("error_code"))
                if ticket.account:
                    MutableHeaders(scope=message).update(ticket.account.headers())
            elif not message.get("more_body"):
                ticket.held.close()  # before the client knows that it may ask again
            await send(message)

        try:
            _check_head(scope)
            with ticket.held:
                self._admit(scope, ticket)
                await self.app(scope, receive, send_noted)
        except RequestError as error:
            await error_response(error, scope, HEADERS.get(error.status))(scope, receive, send_noted)
        finally:
            self._note(scope, ticket, status, time.monotonic() - begun)

    def _admit(self, scope: Scope, ticket: Ticket) -> None:
        """Raises RequestError: 401, 403, 429. Limits are for what computes, which is asked for by POST."""
        if _public(scope):
            return
        if not self.state.keys.required:
            return self.pages.check(scope) if self.pages else None
        key, ticket.account = self.state.keys.find(scope["headers"])
        ticket.key = key.name
        if scope["method"] == "POST":
            ticket.held.enter_context(ticket.account.request())

    def _note(self, scope: Scope, ticket: Ticket, status: int, took_s: float) -> None:
        """Count it; in the log, and in the audit log all but reading what there is to read: dashboards do that every second."""
        route = str(getattr(scope.get("route"), "path", scope["path"] if scope["path"] in PUBLIC else "none"))
        method = scope["method"] if scope["method"] in METHODS else "other"
        self.state.shared.http.answered(method, route, status, took_s)
        if status < 400 and "error_code" in scope["state"]:  # in the middle of a stream
            self.state.shared.http.failed(status, scope["state"]["error_code"])
        reads = _public(scope) or (scope["method"] in ("GET", "HEAD", "OPTIONS") and status < 400)
        record: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": scope["state"]["request_id"],
            "client": (scope.get("client") or (None,))[0],
            "key": ticket.key,
            "endpoint": f"{method} {route}" if route == scope["path"] else line(f"{scope['method']} {scope['path']}"),
            "model": ticket.model,
            "status": status,
            "prompt_tokens": ticket.prompt_tokens,
            "generated_tokens": ticket.generated_tokens,
            "latency_s": round(took_s, 4),
            "finish_reasons": ticket.finish_reasons,
        }
        if code := scope["state"].get("error_code"):
            param = scope["state"].get("error_param")
            record |= {"error_code": code, "error_param": param and line(str(param))}
        if self.state.server_config.enable_log_requests:
            tell_request(record, reads=reads, first_s=ticket.first_s)
        if self.state.audit is None or reads:
            return
        if self.state.server_config.audit_content:
            record["prompts"] = [p.text if p.text is not None else p.token_ids for job in ticket.jobs for p in job.prompts]
            record["answers"] = [output.text for job in ticket.jobs for output in job.outputs]
        self.state.audit.add(record)


def _public(scope: Scope) -> bool:
    """Whether it is for everybody: no request of a key, whatever comes of it (a 503 while a model loads)."""
    return scope["path"] in PUBLIC and scope["method"] in ("GET", "HEAD")


def _check_head(scope: Scope) -> None:
    headers = scope["headers"]
    size = len(scope["method"]) + len(scope["raw_path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        found = f"{len(headers)} headers of {size} bytes"
        raise RequestError(f"the limit is {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes in all, got {found}", status=431)
    names = [name for name, _ in headers]
    if b"transfer-encoding" in names and b"content-length" in names:  # somebody in between may have read it otherwise
        raise RequestError("Content-Length and Transfer-Encoding do not go together: where the body ends is not clear")
