"""Streams go to the socket by a way of their own: their bytes are the same as by the usual one, for every kind of client."""

from __future__ import annotations

import json
import re
import socket
import time
from typing import Any

import httpx
import pytest

from appliance.bench.http import BodyReader, EventReader
from appliance.server import http
from appliance.server.app import create_app
from appliance.server.errors import as_json
from appliance.server.pieces import Chunks
from tests.server.conftest import Served
from tests.server.fake import FakeClient

TEXT = "the quick brown fox jumps over the lazy dog " * 4


def request(version: str = "1.1", tokens: int = 100, **more: Any) -> bytes:
    body = json.dumps(
        {"model": "tiny", "prompt": TEXT, "max_tokens": tokens, "ignore_eos": True, "stream": True, **more}
    ).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nX-Request-Id: same\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def connect(served: Served) -> socket.socket:
    sock = socket.socket()
    sock.settimeout(30)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # before it connects: the window is as small
    host, port = served.url.removeprefix("http://").split(":")
    sock.connect((host, int(port)))
    return sock


def answer(sock: socket.socket, pause_s: float = 0.0) -> tuple[dict[str, str], bytes]:
    """The next answer's headers and its body, without framing."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(4096)
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    assert first.split()[1] == "200", data
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    time.sleep(pause_s)
    reader = BodyReader(headers)
    body = reader.feed(rest)
    while not reader.done and (data := sock.recv(4096)):
        body += reader.feed(data)
    return headers, body


def texts(body: bytes) -> list[str]:
    events = EventReader().feed(body)
    assert events.pop() == b"[DONE]"
    return [json.loads(event)["choices"][0]["text"] for event in events]


@pytest.fixture(scope="module")
def expected(served: Served) -> str:
    """Not streamed."""
    body = {"model": "tiny", "prompt": TEXT, "max_tokens": 100, "ignore_eos": True}
    return str(served.post("/v1/completions", **body).json()["choices"][0]["text"])


def test_one_stream_after_the_other_on_one_connection(served: Served, expected: str) -> None:
    with connect(served) as sock:
        for _ in range(3):
            sock.sendall(request())
            headers, body = answer(sock)
            assert headers["transfer-encoding"] == "chunked"
            assert "".join(texts(body)) == expected
            assert len(texts(body)) > 50  # as it comes, in pieces


def test_a_request_that_is_sent_before_the_last_one_is_answered(served: Served) -> None:
    with connect(served) as sock:
        sock.sendall(request() + request())
        raw = b""
        while raw.count(b"[DONE]") < 2 and (data := sock.recv(4096)):
            raw += data
    raw = re.sub(rb'"created":\d+', b'"created":0', raw)  # a second may end between the two
    first, second = (part.partition(b"\r\n\r\n")[2] for part in raw.split(b"HTTP/1.1 200 OK\r\n")[1:])
    assert first.startswith(second[:200])  # its chunks, whole, before those of the other


def test_a_client_of_http_1_0_gets_no_chunks(served: Served, expected: str) -> None:
    with connect(served) as sock:
        sock.sendall(request("1.0"))
        headers, body = answer(sock)
    assert "transfer-encoding" not in headers
    assert "".join(texts(body)) == expected


def test_a_client_that_reads_late_misses_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the buffers of both sides hold, so that writing has to wait."""
    short, waited = http._write, []

    def noted(cycle: Any, data: bytes) -> bool:
        cycle.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        if not (written := short(cycle, data)):
            waited.append(len(data))
        return written

    monkeypatch.setattr(http, "_write", noted)
    with connect(served) as sock:
        sock.sendall(request(tokens=100, n=16, logprobs=5, temperature=1.0, return_token_ids=True))
        _, body = answer(sock, pause_s=0.5)
    choices: dict[int, int] = {}
    events = EventReader().feed(body)
    assert events.pop() == b"[DONE]"
    for event in events:
        choice = json.loads(event)["choices"][0]
        choices[choice["index"]] = choices.get(choice["index"], 0) + len(choice["token_ids"])
    assert choices == dict.fromkeys(range(16), 100)
    assert waited


async def test_a_server_that_does_not_know_the_short_way(served: Served, expected: str) -> None:
    known = served.state
    app = create_app(FakeClient(), known.tokenizer, known.engine_config, known.server_config)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        body = {"model": "tiny", "prompt": TEXT, "max_tokens": 100, "ignore_eos": True, "stream": True}
        found = await client.post("/v1/completions", json=body)
    assert "".join(texts(found.content)) == expected


@pytest.mark.parametrize("more", [{}, {"usage": None}, {"usage": {"total_tokens": 3}}])
@pytest.mark.parametrize("logprobs", [None, {"content": [{"token": "ä", "logprob": -9999.0, "bytes": [195]}], "refusal": None}])
def test_chunks_are_the_json_of_the_whole(logprobs: Any, more: dict[str, Any]) -> None:
    base = {"id": 'a"b', "created": 5, "model": "ü"}
    choice = {"index": 3, "text": 'say "\n😀"', "logprobs": logprobs, "finish_reason": None}
    parts = logprobs and {**logprobs, "content": [as_json(one) for one in logprobs["content"]]}
    assert Chunks(base)({**choice, "logprobs": parts}, **more) == as_json({**base, "choices": [choice], **more})
    assert Chunks(base)(None, **more) == as_json({**base, "choices": [], **more})
