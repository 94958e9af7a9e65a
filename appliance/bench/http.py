"""A light HTTP/1.1 client for streams of server-sent events: the time of every byte is that of its arrival in this process."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from appliance.tls import base_url, trust
from quant.errors import InputError

OnBody = Callable[[bytes, float], None]  # a piece of a 200's body, and when it came
MAX_HEAD = 64 * 1024


class Broken(Exception):
    """The connection or what came over it is not as it should be; the text says how, as a kind of error."""


class BodyReader:
    """Takes the framing off a body whose pieces are cut anywhere. ``done`` once it is complete."""

    def __init__(self, headers: Mapping[str, str], *, empty: bool = False) -> None:
        self.done = empty
        self._chunked = headers.get("transfer-encoding", "").lower().endswith("chunked")
        length = headers.get("content-length")
        self._left = int(length) if length is not None and not self._chunked else 0  # of the body, or of the chunk
        self.until_close = length is None and not self._chunked
        self._buffer = b""
        self._state = "size"  # then data, end (of a chunk), trailer
        if length is not None and not self._chunked and self._left == 0:
            self.done = True

    def feed(self, data: bytes) -> bytes:
        """The body's own bytes in ``data``. Raises Broken. Bytes behind its end are left aside."""
        if not self._chunked:
            if not self.until_close:
                data = data[: self._left]
                self._left -= len(data)
                self.done = self._left == 0
            return data
        parts: list[bytes] = []
        data, at = self._buffer + data if self._buffer else data, 0
        while not self.done and at < len(data):
            if self._state == "data":
                piece = data[at : at + self._left]
                parts.append(piece)
                at += len(piece)
                self._left -= len(piece)
                self._state = "end" if self._left == 0 else "data"
                continue
            end = data.find(b"\n", at)
            if end < 0:
                break
            self._line(data[at:end].rstrip(b"\r"))
            at = end + 1
        self._buffer = data[at:]
        return b"".join(parts)

    def _line(self, line: bytes) -> None:
        if self._state == "size":
            try:
                self._left = int(line.split(b";")[0], 16)
            except ValueError:
                raise Broken(f"a chunk's size is {line[:40]!r}") from None
            self._state = "data" if self._left else "trailer"
        elif self._state == "end":
            self._state = "size"
        else:
            self.done = not line


class EventReader:
    """Server-sent events of pieces of text that are cut anywhere: the data of each."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        found: list[bytes] = []
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                found.append(b"\n".join(self._data))
                self._data = []
        return found

    def finish(self) -> list[bytes]:
        """What is complete but for the empty line behind it."""
        return self.feed(b"\n\n")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes  # empty where somebody listened to it as it came


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.status, self.headers = 0, dict[str, str]()
        self.body = b""  # where the answer is no 200, or nobody listens
        self.reusable = True
        self.heard = False  # anything since the request
        self._head = b""
        self._reader: BodyReader | None = None
        self._on_body: OnBody | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def ask(self, request: bytes, on_body: OnBody | None = None) -> Answer:
        """Send a request and read its answer to the end. Raises Broken."""
        assert self._transport is not None
        self.status, self.headers, self.body, self._head, self._reader = 0, {}, b"", b"", None
        self.heard = False
        self._on_body, self._waiter = on_body, asyncio.get_running_loop().create_future()
        if self._transport.is_closing():
            raise Broken("the connection was closed before an answer")
        self._transport.write(request)
        try:
            await self._waiter
        except asyncio.CancelledError:
            self.close()
            raise
        return Answer(self.status, self.headers, self.body)

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        now, self.heard = time.perf_counter(), True
        try:
            while data and self._reader is None:
                data = self._take_head(data)
            if self._reader is not None:
                self._take_body(data, now)
        except (Broken, ValueError) as error:
            self._end(error if isinstance(error, Broken) else Broken("an answer that is not HTTP"))

    def eof_received(self) -> None:
        if self._reader is not None and self._reader.until_close:
            self.reusable = False
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        where = "before an answer" if not self.status else "in the middle of an answer"
        self._end(Broken(f"the connection was closed {where}"))

    def _take_head(self, data: bytes) -> bytes:
        """What comes behind the head, once that is complete."""
        self._head += data
        head, found, rest = self._head.partition(b"\r\n\r\n")
        if not found:
            if len(self._head) > MAX_HEAD:
                raise Broken("an answer whose head does not end")
            return b""
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, status = first.partition(" ")
        status = status[:3]
        if not version.startswith("HTTP/1.") or not status.isdecimal():
            raise Broken("an answer that is not HTTP")
        if int(status) < 200:  # a better one follows
            self._head = b""
            return rest
        self.status = int(status)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._reader = BodyReader(self.headers, empty=self.status in (204, 304))
        self.reusable = self.headers.get("connection", "").lower() != "close" and version == "HTTP/1.1"
        if not rest:
            self._take_body(b"", 0.0)
        return rest

    def _take_body(self, data: bytes, now: float) -> None:
        assert self._reader is not None
        if self._waiter is None or self._waiter.done():
            return
        body = self._reader.feed(data) if data else b""
        if self.status == 200 and self._on_body is not None:
            if body:
                self._on_body(body, now)
        else:
            self.body += body
        if self._reader.done:
            self._end(None)

    def _end(self, error: Broken | None) -> None:
        if error is not None:
            self.close()
        if self._waiter is not None and not self._waiter.done():
            if error is None:
                self._waiter.set_result(None)
            else:
                self._waiter.set_exception(error)


class Target:
    """A server, and the connections to it that are idle."""

    def __init__(self, url: str, headers: Mapping[str, str], *, ca_certs: str | None = None, insecure: bool = False) -> None:
        """Raises InputError for a URL that is none, or certificates that are none."""
        self.url = base_url(url, "--base-url")
        parts = urlsplit(self.url)
        self.host, self.port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
        self._path, self._idle = parts.path.rstrip("/"), list[Connection]()
        self._ssl = trust(ca_certs, insecure=insecure) if parts.scheme == "https" else None
        for name, value in headers.items():
            if any(c in name + value for c in "\r\n\0") or not (name + value).isascii():
                raise InputError(f"--header {name!r}: neither names nor values hold line breaks or letters beyond ASCII")
        self._headers = {"Host": parts.netloc.rpartition("@")[2], "User-Agent": "appliance-bench", **headers}

    def request(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> bytes:
        """The bytes of a request: POST with a body (JSON), else GET."""
        raw = b"" if body is None else json.dumps(body).encode()
        all_headers = {**self._headers, **({"Content-Type": "application/json"} if raw else {}), **(headers or {})}
        lines = [f"{'POST' if raw else 'GET'} {self._path}{path} HTTP/1.1", *(f"{k}: {v}" for k, v in all_headers.items())]
        lines += [f"Content-Length: {len(raw)}"] if raw else []
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + raw

    async def send(self, request: bytes, on_body: OnBody | None = None) -> Answer:
        """The answer to a request; ``on_body`` listens to a 200's body. Raises Broken."""
        while True:
            connection, fresh = await self._connect()
            try:
                answer = await connection.ask(request, on_body)
                break
            except Broken:
                if fresh or connection.heard:
                    raise  # else the server had given the idle connection up, and never saw the request
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    async def json(self, path: str, body: Any = None) -> Any:
        """The answer to a request as JSON; None where that is not to be had. Raises Broken where there is no server."""
        answer = await self.send(self.request(path, body))
        try:
            return json.loads(answer.body) if answer.status == 200 else None
        except ValueError:
            return None

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _connect(self) -> tuple[Connection, bool]:
        """A connection, and whether it is a new one."""
        while self._idle:
            if (known := self._idle.pop()).reusable:
                return known, False
        try:
            _, connection = await asyncio.get_running_loop().create_connection(Connection, self.host, self.port, ssl=self._ssl)
        except ssl.SSLError as error:
            raise Broken(f"TLS: {error.reason or error}".lower().replace("_", " ")) from None
        except OSError as error:
            raise Broken(f"no connection: {_why(error)}") from None
        return connection, True


def _why(error: OSError) -> str:
    text = error.strerror or str(error)
    return "connection refused" if isinstance(error, ConnectionRefusedError) or "refused" in text.lower() else text.lower()
