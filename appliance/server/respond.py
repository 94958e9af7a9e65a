"""Reading bodies, answering, and noticing clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from appliance.core.params import RequestError
from appliance.server.beside import SMALL_BODY, Share, one_at_a_time, weight
from appliance.server.errors import as_json, describe, unavailable
from appliance.server.guard import Ticket, current
from appliance.server.schemas import Body, parse

if TYPE_CHECKING:
    from appliance.server.shortcut import Shortcut

log = logging.getLogger("appliance.server")

MAX_BODY = 16 * 1024**2  # read in less than 50 ms, in which nothing else runs
BODY_S, BODY_RATE = 20.0, 16 * 1024  # seconds that a body may take, and one more for so many bytes that have come
BOM = b"\xef\xbb\xbf"  # what some editors and shells put in front of UTF-8
WRITE = "appliance.write"  # an extension of ASGI: a streamed body's piece to the socket, or False for "send it as usual"
DONE = b"data: [DONE]\n\n"
ALIVE = b": ping\n\n"  # a comment, which readers pass over
QUIET_S = 15.0  # after so much silence a stream says that it lives: proxies close those that do not


async def read(request: Request, schema: type[Body]) -> Body:
    """The request's JSON body, whatever content type it claims. Raises RequestError (400, 408, 413, 415, 503)."""
    if (coding := request.headers.get("content-encoding", "identity")).lower() not in ("identity", ""):
        message = f"Content-Encoding {coding!r:.40} is not understood: send the body as it is"
        raise RequestError(message, code="unsupported_encoding", status=415)
    if int(request.headers.get("content-length", 0)) > MAX_BODY:
        raise _too_large()
    raw, begun, share = bytearray(), asyncio.get_running_loop().time(), Share()
    (current.get() or Ticket()).held.callback(share.close)
    try:
        async with asyncio.timeout_at(begun + BODY_S) as limit:
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > MAX_BODY:
                    raise _too_large()
                if len(raw) > SMALL_BODY:
                    share.grow(len(raw))
                limit.reschedule(begun + BODY_S + len(raw) / BODY_RATE)
    except TimeoutError:
        raise RequestError("the body came too slowly", code="request_timeout", status=408) from None
    if raw.startswith(BOM):
        del raw[: len(BOM)]
    if len(raw) <= SMALL_BODY:
        return parse(schema, bytes(raw))
    share.grow(await one_at_a_time(weight, raw))
    return await one_at_a_time(_parse_large, schema, raw)


def _parse_large(schema: type[Body], raw: bytearray) -> Body:
    gc.disable()  # it would go through all of the new values again and again
    try:
        return parse(schema, bytes(raw))
    finally:
        gc.enable()


def _too_large() -> RequestError:
    return RequestError(f"the body is longer than {MAX_BODY} bytes", code="body_too_large", status=413)


@dataclass(eq=False)
class Asked:
    """A request that is worked on. Until it has a job it waits: for its model, a grammar, a template."""

    ids: Mapping[str, Any]  # its scope's, where the id may come to be the body's
    ticket: Ticket
    task: asyncio.Task[Response]
    aborted: bool = False

    def abort(self) -> None:
        self.aborted = True
        self.task.cancel()


async def while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Answer a request whose body is read; cancel the work when the client goes away. Raises RequestError (499) when aborted."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request.receive))
    every: set[Asked] = request.app.state.server.shared.asked
    every.add(asked := Asked(request.scope["state"], current.get() or Ticket(), task))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.cancelled() and asked.aborted:
            raise RequestError("the request was aborted", code="aborted", status=499)
        if task.done():
            return task.result()
        log.info("a client went away; its request is aborted")
        return Response(status_code=499)  # nobody reads it
    except asyncio.CancelledError:  # by the HTTP server, when its time to drain is over
        raise unavailable("the server is shutting down", "shutting_down") from None
    finally:
        every.discard(asked)
        await _end(task, gone)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class Form:
    """How a stream is written: chunks, an error on the way, the end; ``alive`` is sent after ``quiet_s`` seconds of silence."""

    chunk: Callable[[Any], bytes]
    error: Callable[[Exception], bytes]
    end: bytes = b""
    alive: bytes = b""
    quiet_s: float = math.inf


class EventStream(Response):
    """Server-sent events: each chunk goes out as it comes; when the client goes away the generator is closed."""

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], alive: bytes = b"", quiet_s: float = math.inf, shortcut: Shortcut | None = None
    ) -> None:
        """``alive`` is sent where nothing else was for ``quiet_s``. ``shortcut``: of the job that the chunks come from."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.chunks, self._alive, self._quiet_s, self._latest = chunks, alive, quiet_s, 0.0
        self._shortcut = shortcut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task, gone = asyncio.create_task(self._send(scope, send)), asyncio.create_task(_gone(receive))
        more = [asyncio.create_task(self._keep_alive(send))] if self._alive else []
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            else:
                log.info("a client went away from its stream; its request is aborted")
        finally:
            await _end(task, gone, *more)
            await self.chunks.aclose()

    async def _send(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        write: Callable[[bytes], bool] | None = scope.get("extensions", {}).get(WRITE)
        async for chunk in self.chunks:
            self._latest = time.monotonic()
            if write is None or not write(chunk):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            elif self._shortcut is not None and self._shortcut.write is None:
                self._shortcut.write = partial(self._write_now, write)
        self._latest = math.inf
        await send({"type": "http.response.body", "body": b""})

    def _write_now(self, write: Callable[[bytes], bool], data: bytes) -> bool:
        self._latest = time.monotonic()
        return write(data)

    async def _keep_alive(self, send: Send) -> None:
        while True:
            await asyncio.sleep(self._quiet_s)
            if self._latest and time.monotonic() - self._latest >= self._quiet_s:
                await send({"type": "http.response.body", "body": self._alive, "more_body": True})


async def stream(chunks: AsyncGenerator[Any, None], form: Form | None = None, shortcut: Shortcut | None = None) -> EventStream:
    """Start to stream: with the first chunk, or after ``form.quiet_s``.

    What fails before is raised, and so has its HTTP status; later it is an error event.
    """
    form = form or OPENAI
    first = asyncio.ensure_future(anext(chunks))
    try:
        await asyncio.wait({first}, timeout=None if form.quiet_s == math.inf else form.quiet_s)
        if first.done():
            first.result()
    except BaseException:
        await _end(first)
        await chunks.aclose()
        raise
    return EventStream(_events(first, chunks, form), form.alive, form.quiet_s, shortcut)


async def _events(first: asyncio.Future[Any], chunks: AsyncGenerator[Any, None], form: Form) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(chunks):
        if not first.done():
            yield form.alive
        try:
            yield form.chunk(await first)
            async for chunk in chunks:
                yield form.chunk(chunk)
        except Exception as error:
            yield form.error(error)
        if form.end:
            yield form.end


def sse(data: Any) -> bytes:
    """``data``: JSON, or what it is made of."""
    return b"data: %b\n\n" % (data if isinstance(data, bytes) else as_json(data))


def named_event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\n" + sse(data)


OPENAI = Form(sse, lambda error: sse(describe(error)[1]), DONE, ALIVE, QUIET_S)
