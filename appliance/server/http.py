"""uvicorn as it is run here: what a connection may cost, and TLS."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import socket
import ssl
from functools import partial
from pathlib import Path
from typing import Any

import h11
import uvicorn
from pydantic_core import to_json
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from appliance.config import ServerConfig
from appliance.server.errors import error_body
from appliance.server.guard import MAX_HEADER_BYTES
from appliance.server.plain import answer_plain_http
from appliance.server.respond import WRITE
from quant.errors import InputError

READ_S = 20.0  # for a request's head, from its first byte; for the rest of a body that nobody waits for any more
WRITE_S = 60.0  # that a client may leave its answer unread, once the buffers are full
PEER = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 60_000))  # s, s, times, ms
MAX_FILES = 65_536
MAX_CONNECTIONS, SPARE_FILES = 8192, 64  # files for all that is no connection; a head that does not end holds 32 KiB for READ_S
BACKLOG, AT_ONCE = 2048, 16  # connections that wait in the kernel; those taken at once, before any of them can be refused
FAREWELL_S = 0.3  # for what of an answer is not sent yet, and for a TLS client to take its leave, when the server ends
GONE_S = 0.1  # how often it is asked whether a client that sends no more is gone
CERTIFICATE, PRIVATE_KEY = (
    re.compile(rb"-----BEGIN [A-Z0-9 ]*CERTIFICATE-----"),
    re.compile(rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----"),
)
KEEP_ALIVE_S = 30  # longer than the 5 s after which many clients' pools give a connection up: it is for them to close it


class Protocol(H11Protocol):
    """uvicorn's, which waits for ever for a client that stops in the middle of its headers, or does not read its answer."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._half_open: asyncio.TimerHandle | None = None  # the client sends no more

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            error = error_body("the server has as many connections as it can have", status=503, code="server_overloaded")
            self._say("503 Service Unavailable", error, "Retry-After: 1\r\n")
            return
        _watch_peer(transport.get_extra_info("socket"))
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_started:  # a new one, whose task has not begun
            self.scope["extensions"] = {WRITE: partial(_write, self.cycle)}  # type: ignore[dict-item]

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP has an answer in JSON like everything else, unless there was one already."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or self.transport.is_closing():
            self.transport.close()
        else:
            self._say("400 Bad Request", error_body("this is no HTTP request", status=400))

    def _say(self, status: str, body: dict[str, Any], headers: str = "") -> None:
        data = to_json(body)
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n{headers}"
        self.transport.write(f"{head}Connection: close\r\n\r\n".encode() + data)
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Anybody can ask for that, and is answered without it."""

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more: nearly always it is gone, but some end their side only, and read on.

        Sending tells them apart: who is gone answers with a reset. An answer that has not begun lets 100 Continue go ahead,
        which every client skips.
        """
        answering = self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body
        if not answering or self.scheme == "https" or self.scope["http_version"] != "1.1":
            return False
        if not self.cycle.response_started:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._half_open = self.loop.call_later(GONE_S, self._ask)
        return True

    def _ask(self) -> None:
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        else:
            self._half_open = self.loop.call_later(GONE_S, self._ask)

    def shutdown(self) -> None:
        """The server ends. A client that keeps a connection for later does not answer the end of TLS, for which asyncio waits."""
        super().shutdown()
        if self.scheme == "https" and self.transport.is_closing():
            self.loop.call_later(FAREWELL_S, self.transport.abort)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._half_open is not None:
            self.transport.close()
        if self.conn.their_state is h11.SEND_BODY:
            self._watch()

    def _watch(self) -> None:
        """One time for all of a head, or of a body that is thrown away: a byte now and then buys none."""
        answering = self.cycle is not None and not self.cycle.response_complete
        done = answering or self.transport.is_closing() or (self.cycle is not None and self._at_rest())
        if done and self._reading is not None:
            self._reading.cancel()
            self._reading = None
        elif not done and self._reading is None:
            self._reading = self.loop.call_later(READ_S, self.transport.abort)

    def _at_rest(self) -> bool:
        """Between two requests: uvicorn's own timer runs."""
        return self.timeout_keep_alive_task is not None and self.conn.their_state is h11.IDLE

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self._writing or self.loop.call_later(WRITE_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._reading, self._writing, self._half_open):
            if timer is not None:
                timer.cancel()


class Accepted(socket.socket):
    """A connection that is among others until it is closed."""

    def __init__(self, sock: socket.socket, all_: set[Accepted]) -> None:
        super().__init__(fileno=sock.detach())
        self._all = all_
        all_.add(self)

    def close(self) -> None:
        self._all.discard(self)
        super().close()


class TlsListener(socket.socket):
    """Counts connections from when they are accepted: before its handshake is done nobody else knows of a client."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(fileno=os.dup(sock.fileno()))
        self.accepted: set[Accepted] = set()

    def accept(self) -> tuple[socket.socket, Any]:
        """One too many is closed unanswered: an answer would take a handshake. Raises ConnectionAbortedError then."""
        connection, address = super().accept()
        if len(self.accepted) >= most_connections():
            connection.close()
            raise ConnectionAbortedError
        return Accepted(connection, self.accepted), address


class HttpServer(uvicorn.Server):
    """uvicorn, with an end to handshakes: a minute by asyncio, and by uvicorn nothing else."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on sockets that are bound."""
        await self.lifespan.startup()  # which is off
        config, self.servers = self.config, []
        make = partial(Protocol, config=config, server_state=self.server_state, app_state={})
        tls: dict[str, Any] = {"ssl": config.ssl, "ssl_handshake_timeout": READ_S, "ssl_shutdown_timeout": READ_S}
        if config.ssl is not None:
            answer_plain_http(config.ssl)
        for sock in sockets or ():
            listener, more = (TlsListener(sock), tls) if config.ssl else (sock, {})
            server = await asyncio.get_running_loop().create_server(make, sock=listener, backlog=config.backlog, **more)
            self.servers.append(server)
        self.started = True


def _write(cycle: RequestResponseCycle, data: bytes) -> bool:
    """A piece of a streamed body as one HTTP chunk, at a fraction of what h11 and the middleware in between take for it.

    Only once the answer has begun, without a Content-Length. False: it has to go the long way. Nothing: whether that is so now.
    """
    if cycle.flow.write_paused or cycle.disconnected or cycle.response_complete:
        return False
    if cycle.scope["http_version"] != "1.1" or cycle.scope["method"] == "HEAD":
        return False
    if data:
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
    return True


def _watch_peer(sock: socket.socket) -> None:
    """Notice a machine that went away without a word, while an answer is computed as well as while it is sent."""
    options = [(socket.SOL_SOCKET, "SO_KEEPALIVE", 1), (socket.IPPROTO_TCP, "TCP_NODELAY", 1)]
    options += [(socket.IPPROTO_TCP, name, value) for name, value in PEER]
    for level, name, value in options:
        if hasattr(socket, name):  # not every system has all of them
            sock.setsockopt(level, getattr(socket, name), value)


def raise_file_limit() -> None:
    """Each connection is an open file, and many systems allow 1024 of them unless more are asked for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def most_connections() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, max(soft // 2, soft - SPARE_FILES))


def http_config(app: ASGIApp, server: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Protocol,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        backlog=AT_ONCE,  # asyncio goes on so often where there are no files left, too; the socket gets its BACKLOG afterwards
        timeout_keep_alive=KEEP_ALIVE_S,
        log_config=None,
        access_log=False,  # the server's own lines have more, and no query strings: some clients put keys there
        lifespan="off",
        ws="none",
        date_header=False,
        server_header=False,
        proxy_headers=bool(server.forwarded_allow_ips),
        forwarded_allow_ips=list(server.forwarded_allow_ips),
        timeout_graceful_shutdown=max(1, round(server.shutdown_timeout)),
        ssl_certfile=server.ssl_certfile,
        ssl_keyfile=server.ssl_keyfile,
        ssl_ca_certs=server.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_REQUIRED if server.ssl_ca_certs else ssl.CERT_NONE,
    )


def check_tls(server: ServerConfig) -> None:
    """Raises InputError where the files do not do: uvicorn finds out when the model is loaded, and asks for passwords."""
    if not server.ssl_certfile:
        if flag := next((f for f in ("ssl_keyfile", "ssl_ca_certs") if getattr(server, f)), None):
            raise InputError(f"--{flag.replace('_', '-')} needs --ssl-certfile")
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    flags = f"--ssl-certfile {server.ssl_certfile}" + (f" --ssl-keyfile {server.ssl_keyfile}" if server.ssl_keyfile else "")
    try:
        _check_papers(server.ssl_certfile, server.ssl_keyfile)
        context.load_cert_chain(server.ssl_certfile, server.ssl_keyfile, _no_password)
        if server.ssl_ca_certs:
            flags = f"--ssl-ca-certs {server.ssl_ca_certs}"
            context.load_verify_locations(server.ssl_ca_certs)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise InputError(f"{flags}: {str(reason).replace('_', ' ').lower()}") from None


def _check_papers(certfile: str, keyfile: str | None) -> None:
    """Raises OSError, or InputError naming the file that does not hold what it should: OpenSSL says no more than "PEM lib"."""
    has_key = {file: PRIVATE_KEY.search(Path(file).read_bytes()) is not None for file in (certfile, keyfile) if file}
    if not CERTIFICATE.search(Path(certfile).read_bytes()):
        found = ", but a private key, which is for --ssl-keyfile" if has_key[certfile] else ""
        raise InputError(f"--ssl-certfile {certfile} holds no certificate (PEM){found}")
    if not has_key[keyfile or certfile]:
        said = f"--ssl-keyfile {keyfile} holds no private key (PEM)"
        raise InputError(said if keyfile else f"--ssl-certfile {certfile} holds no private key: name its file with --ssl-keyfile")


def _no_password() -> str:
    raise ValueError("keys with a password are not supported")
