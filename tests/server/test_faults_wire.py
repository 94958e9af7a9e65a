"""What strangers write to the socket: it is answered in JSON or not at all, and whoever asks next is answered rightly."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from appliance.config import EngineConfig, ServerConfig
from appliance.server import http as server_http
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient
from tests.server.test_http import connect, rest
from tests.server.test_lifecycle import eventually

Start = Callable[..., AbstractContextManager[Served]]
BODY = b'{"prompt":[5,6,7],"max_tokens":2,"return_token_ids":true}'
PING = b"GET /ping HTTP/1.1\r\nhost: a\r\n\r\n"
LAST = b"GET /ping HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"


def post(headers: bytes = b"", body: bytes = BODY) -> bytes:
    length = b"" if b"transfer-encoding" in headers else b"content-length: %d\r\n" % len(body)
    return b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n" + headers + length + b"\r\n" + body


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return post(b"transfer-encoding: chunked\r\n", body + end)


def head(text: bytes) -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n" + text + b"\r\n\r\n" + BODY


def statuses(found: bytes) -> list[int]:
    return [int(part[:3]) for part in found.split(b"HTTP/1.1 ")[1:]]


@pytest.fixture
def start(tokenizer: Tokenizer, model_dir: Path) -> Start:
    def start(delay_s: float = 0.0, **options: Any) -> AbstractContextManager[Served]:
        config = ServerConfig(served_model_name=("tiny",), **options)
        return serve_in_thread(lambda: FakeClient(delay_s=delay_s), tokenizer, EngineConfig(model=str(model_dir)), config)

    return start


@pytest.fixture(autouse=True)
def others_are_answered(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "served" in request.fixturenames:
        served = request.getfixturevalue("served")
        with connect(served) as sock:
            sock.sendall(post(b"connection: close\r\n"))
            assert b'"token_ids":[5,6]' in rest(sock)
        eventually(lambda: not served.state.jobs and not served.client.running)


REFUSED = {
    "two lengths": head(b"content-length: 5\r\ncontent-length: 57"),
    "a negative length": head(b"content-length: -5"),
    "a length with a sign": head(b"content-length: +57"),
    "a length in hexadecimal": head(b"content-length: 0x39"),
    "an endless length": head(b"content-length: " + b"9" * 40),
    "length and chunks": post(b"content-length: 5\r\ntransfer-encoding: chunked\r\n", b"0\r\n\r\n" + PING),
    "chunks and length": post(b"transfer-encoding: chunked\r\ncontent-length: 57\r\n", b"0\r\n\r\n" + PING),
    "another coding": head(b"transfer-encoding: gzip, chunked"),
    "chunked twice": head(b"transfer-encoding: chunked, chunked"),
    "a space before the colon": head(b"transfer-encoding : chunked"),
    "no chunk size": chunked(end=b"zz\r\n"),
    "a negative chunk": chunked(end=b"-1\r\n"),
    "a chunk in C's hexadecimal": chunked(end=b"0x5\r\nabcde\r\n"),
    "an empty chunk size": chunked(end=b"\r\n"),
    "a chunk that is longer than it says": chunked(end=b"1\r\nabc\r\n0\r\n\r\n"),
    "trailers without end": chunked(BODY, end=b"0\r\n" + b"x: y\r\n" * 20_000),
    "no host": b"GET /ping HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /ping HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
    "NUL in a header": b"GET /ping HTTP/1.1\r\nhost: a\r\nx: a\0b\r\n\r\n",
    "a bare CR in a header": b"GET /ping HTTP/1.1\r\nhost: a\r\nx: a\rb\r\n\r\n",
    "a header that is folded first": b"GET /ping HTTP/1.1\r\n x: a\r\n\r\n",
    "a path that is no ASCII": b"GET /v1/models/\xff HTTP/1.1\r\nhost: a\r\n\r\n",
    "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    "rubbish": bytes(range(255, 0, -1)) + b"\r\n\r\n",
    "a line without end": b"A" * 100_000,
    "an address without end": b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_and_nothing_behind_it_is_read(served: Served, name: str) -> None:
    with connect(served) as sock:
        try:
            sock.sendall(REFUSED[name] + PING)
        except OSError:
            pass  # closed on the way
        found = rest(sock)
    assert statuses(found) in ([400], [431]) or (not found and len(REFUSED[name]) > 50_000), found
    if found:
        assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


TAKEN = {
    "chunks": (chunked(BODY[:10], BODY[10:]) + LAST, [200, 200]),
    "a chunk a byte": (chunked(*(BODY[i : i + 1] for i in range(len(BODY)))) + LAST, [200, 200]),
    "chunks with extensions": (chunked(end=b"39;x=y\r\n" + BODY + b"\r\n0;z\r\n\r\n") + LAST, [200, 200]),
    "trailers": (chunked(BODY, end=b"0\r\nauthorization: Bearer a\r\n\r\n") + LAST, [200, 200]),
    "the same length twice": (head(b"content-length: 57\r\ncontent-length: 57") + LAST, [200, 200]),
    "20 at once": (post() * 20 + LAST, [200] * 21),
    "questions and answers at once": ((PING + post()) * 10 + LAST, [200] * 21),
    "a byte order mark": (post(body=b"\xef\xbb\xbf" + BODY) + LAST, [200, 200]),
    "HEAD has no body": (b"HEAD /ping HTTP/1.1\r\nhost: a\r\n\r\n" + LAST, [200, 200]),
    "GET with a body": (b"GET /ping HTTP/1.1\r\nhost: a\r\ncontent-length: 57\r\n\r\n" + BODY + LAST, [200, 200]),
    "an upgrade": (b"GET /ping HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n" + LAST, [200, 200]),
    "what does not exist": (b"BREW /coffee HTTP/1.1\r\nhost: a\r\n\r\n" + LAST, [404, 200]),
    "a path of bytes": (b"GET /v1/models/%ff%00%fe HTTP/1.1\r\nhost: a\r\n\r\n" + LAST, [404, 200]),
    "an id of bytes": (b"GET /ping HTTP/1.1\r\nhost: a\r\nx-request-id: \xff\xfe\r\n\r\n" + LAST, [200, 200]),
    "too much, said before": (head(b"content-length: 33554433"), [413]),
}


@pytest.mark.parametrize("name", TAKEN)
def test_it_is_answered_and_so_is_what_comes_behind_it(served: Served, name: str) -> None:
    sent, expected = TAKEN[name]
    with connect(served) as sock:
        sock.sendall(sent)
        if expected == [413]:
            sock.shutdown(socket.SHUT_WR)
        assert statuses(rest(sock)) == expected


def test_a_client_that_asks_before_it_sends(served: Served) -> None:
    with connect(served) as sock:
        sock.sendall(post(b"expect: 100-continue\r\nconnection: close\r\n")[: -len(BODY)])
        assert sock.recv(100).startswith(b"HTTP/1.1 100")
        sock.sendall(BODY)
        assert statuses(rest(sock)) == [200]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_ends_its_side_and_reads_on(start: Start, stream: bool) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 30, "ignore_eos": True, "stream": stream, "return_token_ids": True}
    with start(0.02) as served, connect(served) as sock:
        sock.sendall(post(body=json.dumps(body).encode()))
        sock.shutdown(socket.SHUT_WR)
        found = rest(sock)
        assert statuses(found)[-1] == 200 and not served.client.aborted
        assert b"data: [DONE]" in found if stream else b'"completion_tokens":30' in found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("polite", [False, True])
def test_a_client_that_is_gone_before_the_first_token(start: Start, stream: bool, polite: bool) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "stream": stream}
    with start(60.0) as served:
        with connect(served) as sock:
            sock.sendall(post(body=json.dumps(body).encode()))
            eventually(lambda: served.client.running)
            if not polite:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
        eventually(lambda: not served.client.running and not served.state.jobs)
        assert not served.client.tokens and served.client.aborted


def test_many_requests_on_a_connection(served: Served) -> None:
    with connect(served) as sock:
        for k in range(300):
            sock.sendall(PING if k % 10 else post(body=b'{"prompt":[%d],"max_tokens":1,"return_token_ids":true}' % (3 + k % 90)))
            found = sock.recv(65536)
            while not found.endswith(b"}"):
                found += sock.recv(65536)
            assert (b'"token_ids":[%d]' % (3 + k % 90) in found) == (k % 10 == 0)


# Spellings of /stats and /metrics: the guard and the routes must see the same path.
TRICKS = r"""
    //stats /stats/ /./stats /%73tats /stats%2f /%2fstats /ping/../stats /ping/..%2fstats /ping;/stats /ping%00/stats
    /health/%2e%2e/stats /stats?x=/ping /stats#/ping /Stats /v1/v1/models /models /ping/metrics http://a/stats http://a/ping *
    /ping/stats /stats;/ping /\stats /ping\..\stats /logs /openapi.json
"""


@pytest.fixture(scope="module")
def locked(tokenizer: Tokenizer, model_dir: Path) -> Iterator[Served]:
    config = ServerConfig(served_model_name=("tiny",), api_key=("sk-right",))
    with serve_in_thread(FakeClient, tokenizer, EngineConfig(model=str(model_dir)), config) as one:
        yield one


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "get"])
def test_no_spelling_of_a_path_passes_the_guard(locked: Served, method: str) -> None:
    for path in TRICKS.split():
        with connect(locked) as sock:
            sock.sendall(f"{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".encode())
            public = path == "http://a/ping" and method in ("GET", "HEAD")  # as proxies write /ping, which asks for no key
            assert statuses(rest(sock)) in ([[200]] if public else ([401], [400])), path


RIGHT, WRONG = b"authorization: Bearer sk-right\r\n", b"authorization: Bearer sk-wrong\r\n"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (RIGHT, 200),
        (RIGHT + RIGHT, 200),
        (WRONG + RIGHT, 401),  # who reads the other one must not be fooled
        (RIGHT + WRONG, 401),
        (b"x-api-key: sk-right\r\n" + WRONG, 401),
        (b"x-api-key: sk-right\r\n", 200),
        (b"authorization: bearer   sk-right  \r\n", 200),
        (b"authorization: Basic sk-right\r\n", 401),
        (b"authorization: Bearer sk-right sk-right\r\n", 401),
        (b"authorization: Bearer sk-righ\xc3\xbc\r\n", 401),
        (b"authorization: Bearer " + b"a" * 30_000 + b"\r\n", 401),
        (b"authorization: Bearer\r\n", 401),
        (b"Authorization:\tBearer sk-right\r\n", 200),
        (b"cookie: authorization=Bearer sk-right\r\n", 401),
    ],
)
def test_keys_as_they_are_sent(locked: Served, headers: bytes, status: int) -> None:
    with connect(locked) as sock:
        sock.sendall(b"GET /stats?api_key=sk-right HTTP/1.1\r\nhost: a\r\nconnection: close\r\n" + headers + b"\r\n")
        assert statuses(rest(sock)) == [status]


@pytest.mark.parametrize(("options", "client"), [({}, "127.0.0.1"), ({"forwarded_allow_ips": ("127.0.0.1",)}, "10.1.2.3")])
def test_who_asks_is_not_what_a_header_says(start: Start, tmp_path: Path, options: dict[str, Any], client: str) -> None:
    log = tmp_path / "audit"
    with start(audit_log=str(log), **options) as served, served.http as http:
        http.post("/v1/completions", json={"prompt": "a"}, headers={"X-Forwarded-For": "10.1.2.3", "Forwarded": "for=1.1.1.1"})
        eventually(lambda: log.read_text())
    assert json.loads(log.read_text())["client"] == client


def test_connections_have_an_end_and_it_passes(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_http, "most_connections", lambda: 5)
    with start() as served:
        some = [connect(served) for _ in range(5)]
        some[0].sendall(PING)
        assert some[0].recv(100).startswith(b"HTTP/1.1 200")
        with connect(served) as sock:
            found = rest(sock)
            assert statuses(found) == [503] and b'"code":"server_overloaded"' in found
        for sock in some:
            sock.close()
        eventually(lambda: served.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200)


def test_hundreds_that_connect_and_go(served: Served) -> None:
    def come_and_go() -> None:
        for k in range(100):
            with connect(served) as sock:
                sock.sendall(post()[: 7 * (k % 20)])

    crowd = [threading.Thread(target=come_and_go) for _ in range(4)]
    for one in crowd:
        one.start()
    begun, answers = time.monotonic(), 0
    while any(one.is_alive() for one in crowd) and time.monotonic() - begun < 60:
        with served.http as http:
            answer = http.post("/v1/completions", json={"prompt": [9, 8], "max_tokens": 3, "return_token_ids": True})
        answers += answer.json()["choices"][0]["token_ids"] == [9, 8, 9]
    assert answers > 0
