"""Bad luck of all kinds over a real engine: others' answers stay what they were, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.processes import gone
from tests.server.test_lifecycle import eventually
from tests.server.test_real import FLAGS, READY, ROOT, Running, started
from tests.tiny_model import Shape, make_checkpoint

MIB = 2**20
ASK = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
TEXTS = [f"{k} bottles" for k in range(6)]
ENDLESS = json.dumps({"prompt": "abc", "max_tokens": 3000, "ignore_eos": True, "stream": True}).encode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", shape=Shape(max_len=4096))


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Running]:
    with started(str(model), *FLAGS, "--shutdown-timeout", "1") as one:
        yield one


@pytest.fixture(scope="module")
def known(running: Running) -> dict[str, str]:
    """What a quiet server answers."""
    with running.http as http:
        begin = {"prompt": "a", "guided_regex": "b+", "max_tokens": 2}  # begins the process that tries grammars
        assert http.post("/v1/completions", json=begin).status_code == 200
        return {text: http.post("/v1/completions", json={**ASK, "prompt": text}).json()["choices"][0]["text"] for text in TEXTS}


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No request, no block, no open file."""
    if "running" not in request.fixturenames:
        yield
        return
    one, _ = request.getfixturevalue("running"), request.getfixturevalue("known")
    process = psutil.Process(one.process.pid)
    eventually(lambda: not left(one))
    files = process.num_fds()
    yield
    if one.process.poll() is not None:
        return
    eventually(lambda: not left(one))
    eventually(lambda: process.num_fds() <= files)


def left(running: Running) -> dict[str, int]:
    with running.http as http:
        engine = http.get("/stats").json()["engine"]
        load = http.get("/load").json()["server_load"]
    found = {"load": load, **{name: engine[name] for name in ("running", "waiting", "swapped", "blocks_used")}}
    return {name: count for name, count in found.items() if count}


def post(body: bytes, *, length: int | None = None) -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % (length or len(body)) + body


async def bystanders(running: Running, known: dict[str, str], until: asyncio.Event) -> int:
    """Ask until the event; how many answers there were. All must be right."""
    answers = 0
    async with httpx.AsyncClient(base_url=running.url, timeout=60, trust_env=False) as http:
        while not until.is_set() or not answers:
            response = await http.post("/v1/completions", json={**ASK, "prompt": list(TEXTS)})
            assert [choice["text"] for choice in response.json()["choices"]] == list(known.values())
            answers += 1
    return answers


async def vanish(running: Running, rng: random.Random) -> None:
    """Ask for much, read some of it or none, and go: politely or not, perhaps in the middle of the request."""
    place = urlsplit(running.url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    whole = rng.random() < 0.8
    writer.write(post(ENDLESS) if whole else post(ENDLESS[:20], length=len(ENDLESS)))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(rng.uniform(0, 1.5)):
            while await reader.read(500):
                pass
    if rng.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()


def test_500_streams_of_which_450_vanish(running: Running, known: dict[str, str]) -> None:
    rng = random.Random(0)

    async def stay(http: httpx.AsyncClient, text: str) -> None:
        found = ""
        async with http.stream("POST", "/v1/completions", json={**ASK, "prompt": text, "stream": True}) as response:
            async for line in response.aiter_lines():
                found += json.loads(line[6:])["choices"][0]["text"] if line.startswith("data: {") else ""
        assert found == known[text]

    async def crowd() -> None:
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=running.url, timeout=120, limits=limits, trust_env=False) as http:
            staying = [stay(http, rng.choice(TEXTS)) for _ in range(50)]
            everybody = [*staying, *(vanish(running, rng) for _ in range(450))]
            rng.shuffle(everybody)
            await asyncio.gather(*everybody)

    asyncio.run(crowd())


HOSTILE: tuple[bytes, ...] = (
    b"rubbish\r\n\r\n",
    b"GET /" + b"a" * 50_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    post(b'{"prompt": "\\ud800"}'),
    post(b'{"prompt": "\xff"}'),
    post(b"[" * 100_000),
    post(b'{"prompt": "a", "temperature": 1, "top_k": ' + b"9" * 300 + b"}"),
    post(b'{"prompt": "a", "temperature": 1e300}'),
    post(json.dumps({"prompt": "ab " * 300_000}).encode()),
    post(json.dumps({"prompt": ["a"] * 5000}).encode()),
    post(json.dumps({"prompt": "a", "bad_words": ["x"] * 1000, "stop": ["yy"] * 1000, "max_tokens": 2}).encode()),
    post(json.dumps({"prompt": "a", "logit_bias": {str(k): 1 for k in range(20_000)}}).encode()),
    post(json.dumps({"prompt": "a", "guided_regex": "(a{1,900}){1,900}", "max_tokens": 3}).encode()),
    post(json.dumps({"prompt": "a", "guided_json": {"type": "string", "pattern": "(a|b)*a(a|b){20}"}, "max_tokens": 3}).encode()),
    b"\r\n" * 1000 + b"GET /ping HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 5000 + b"\r\n",
)


def test_a_siege(running: Running, known: dict[str, str]) -> None:
    """All at once, each many times; a second and a third siege find the memory that the first one took."""
    rng, process = random.Random(1), psutil.Process(running.process.pid)
    place = urlsplit(running.url)

    async def throw(raw: bytes) -> None:
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        with contextlib.suppress(ConnectionError, TimeoutError):
            writer.write(raw)
            await writer.drain()
            if rng.random() < 0.7:
                assert b" 500 " not in await asyncio.wait_for(reader.read(2000), 5)
        writer.transport.abort()

    async def siege() -> int:
        over, gate = asyncio.Event(), asyncio.Semaphore(20)

        async def one(raw: bytes) -> None:
            async with gate:
                await throw(raw)

        others = asyncio.create_task(bystanders(running, known, over))
        await asyncio.gather(*(one(raw) for raw in rng.sample(HOSTILE * 4, 4 * len(HOSTILE))))
        over.set()
        return await others

    memory = []
    for _ in range(3):
        assert asyncio.run(siege()) > 0
        memory.append(process.memory_info().rss)
    assert memory[-1] - memory[0] < 30 * MIB, memory


def test_clients_that_do_not_read(running: Running, known: dict[str, str]) -> None:
    """They cost a buffer each, and hold up nobody."""
    place = urlsplit(running.url)
    stuck = [socket.create_connection((place.hostname, place.port)) for _ in range(8)]
    for sock in stuck:
        sock.sendall(post(ENDLESS.replace(b"3000", b"300")))
    over = asyncio.Event()
    over.set()
    assert asyncio.run(bystanders(running, known, over)) == 1
    for sock in stuck:
        sock.close()


def test_a_log_that_nobody_reads_few_files_and_a_sudden_end(model: Path) -> None:
    """stderr is a pipe that is full soon; of 64 open files, connections take what they get, and others come when they go.

    When the server is killed in the middle of an answer, its other processes end by themselves.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "appliance", "serve", str(model), *FLAGS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,  # never read
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )
    assert process.stdout is not None
    try:
        url = next(match[1] for line in process.stdout if (match := READY.match(line)))
        place = urlsplit(url)
        with httpx.Client(base_url=url, timeout=20, trust_env=False) as http:
            for k in range(500):  # each is told in the log
                assert http.get(f"/nowhere/{k}/{'a' * 150}").status_code == 404
            body = {"prompt": "a", "guided_regex": "b+", "max_tokens": 2}
            assert http.post("/v1/completions", json=body).status_code == 200  # now there is a process that tries grammars, too
        crowd = [socket.create_connection((place.hostname, place.port)) for _ in range(100)]
        time.sleep(0.5)
        for sock in crowd:
            sock.close()

        def answered() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.post(f"{url}/v1/completions", json={**ASK, "prompt": "a"}, trust_env=False).status_code == 200
            return False

        eventually(answered)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 2
        with httpx.stream("POST", f"{url}/v1/completions", content=ENDLESS, trust_env=False) as response:
            with contextlib.suppress(httpx.TransportError):
                for _ in response.iter_lines():
                    process.kill()
        process.wait(5)
        eventually(lambda: not [p for p in family if not gone(p)])
    finally:
        process.kill()
        process.wait(10)


def test_it_stops_in_time_whoever_is_still_there(running: Running, known: dict[str, str]) -> None:
    """Clients that do not read, that have not finished asking, that say nothing."""
    place = urlsplit(running.url)
    with contextlib.ExitStack() as stack:
        for raw in (post(ENDLESS), post(ENDLESS[:20], length=len(ENDLESS)), b"GET /ping HTTP/1.1\r\nhos", b""):
            sock = stack.enter_context(socket.create_connection((place.hostname, place.port)))
            sock.sendall(raw)
        time.sleep(0.3)
        running.process.send_signal(signal.SIGTERM)
        assert running.ended() == 0
