"""The command as a user starts it, over a real engine: a small random model, computed by the reference operators."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.processes import gone
from tests.server.test_lifecycle import eventually
from tests.tiny_model import Shape, make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
READY = re.compile(r"appliance: ready at (http://127\.0\.0\.1:\d+)/v1 with model (\S+)")
FLAGS = ["--port", "0", "--dtype", "float32", "--reference-ops", "--threads", "1", "--kv-cache-memory-bytes", "4000000"]


LONG = {"prompt": "abc", "max_tokens": 1000, "ignore_eos": True, "stream": True}


@dataclass
class Running:
    process: subprocess.Popen[str]
    url: str
    output: list[str]

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    @property
    def engine(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def ended(self) -> int:
        return self.process.wait(30)


@contextmanager
def started(*args: str, path: str = "") -> Iterator[Running]:
    process = subprocess.Popen(
        [sys.executable, "-m", "appliance", "serve", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{path}:{ROOT}", "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True)
    reader.start()
    try:
        eventually(lambda: any(READY.match(line) for line in output) or process.poll() is not None, 90)
        match = next((m for line in output if (m := READY.match(line))), None)
        assert match, "".join(output)
        yield Running(process, match[1], output)
    finally:
        process.kill()
        process.wait(10)
        reader.join(10)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", shape=Shape(max_len=4096))


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose processes note every attempt to reach another machine, and are not let through."""
    folder = tmp_path_factory.mktemp("site")
    calls = folder / "calls.txt"
    (folder / "sitecustomize.py").write_text(
        "import socket\n"
        "def blocked(*args, **kwargs):\n"
        f"    open({str(calls)!r}, 'a').write(repr(args) + '\\n')\n"
        "    raise OSError('no network')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = socket.gethostbyname = blocked\n"
        "open(" + repr(str(folder / "loaded")) + ", 'a').write('x')\n"
    )
    with started(str(model), *FLAGS, "--served-model-name", "tiny", path=str(folder)) as one:
        yield one
    assert (folder / "loaded").read_text() >= "xx"  # the server's process and the engine's
    assert not calls.exists(), calls.read_text()


def post(running: Running, **body: Any) -> Any:
    with running.http as http:
        response = http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()


def used(running: Running) -> int:
    with running.http as http:
        return int(http.get("/stats").json()["engine"]["blocks_used"])


def test_ready_means_ready(running: Running) -> None:
    with running.http as http:
        assert http.get("/health").json() == {"status": "ok"}
        stats = http.get("/stats").json()
    assert stats["model"] == "tiny" and stats["info"]["quantization"] == "awq" and stats["engine"]["blocks_total"] > 0
    assert any("KV cache" in line for line in running.output)  # the plan comes before the model


def test_greedy_is_the_same_alone_streamed_and_in_company(running: Running) -> None:
    prompts = ["hello", "who are you?", "a b c d e f g"]
    alone = [post(running, prompt=p, temperature=0, max_tokens=20, ignore_eos=True)["choices"][0]["text"] for p in prompts]
    together = post(running, prompt=prompts, temperature=0, max_tokens=20, ignore_eos=True)["choices"]
    assert [c["text"] for c in together] == alone
    scored = post(running, prompt=prompts[0], max_tokens=1, echo=True, logprobs=3)["choices"][0]["logprobs"]
    assert scored["tokens"][1:6] == list("hello") and scored["token_logprobs"][0] is None
    assert all(value < 0 for value in scored["token_logprobs"][1:])


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_beams_whole_and_streamed(running: Running, path: str) -> None:
    prompt = {"prompt": "hello"} if path == "completions" else {"messages": [{"role": "user", "content": "hello"}]}
    body = {**prompt, "n": 3, "use_beam_search": True, "max_tokens": 8, "length_penalty": 0.0, "return_token_ids": True}
    with running.http as http:
        first, second = (http.post(f"/v1/{path}", json=body).json() for _ in range(2))
        stream = http.post(f"/v1/{path}", json={**body, "stream": True, "stream_options": {"include_usage": True}}).text
    tokens = [c["token_ids"] for c in first["choices"]]
    assert len({*map(tuple, tokens)}) == 3 and [c["index"] for c in first["choices"]] == [0, 1, 2]
    assert second["choices"] == first["choices"]
    chunks = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
    told: list[list[int]] = [[], [], []]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        told[choice["index"]] += choice.get("token_ids", [])
    assert told == tokens and chunks[-1]["usage"]["completion_tokens"] == first["usage"]["completion_tokens"]


def test_the_best_of_several(running: Running) -> None:
    body = {"prompt": "hello", "max_tokens": 5, "temperature": 1.0, "seed": 4, "ignore_eos": True, "return_token_ids": True}
    every = post(running, **body, n=5, logprobs=0)["choices"]
    ranked = sorted(every, key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
    best = post(running, **body, n=2, best_of=5)
    assert [c["token_ids"] for c in best["choices"]] == [c["token_ids"] for c in ranked[:2]]
    assert best["usage"]["completion_tokens"] == 25


def test_cached_tokens(running: Running) -> None:
    def cached(**more: Any) -> int:
        answer = post(running, prompt="to be found again " * 5, max_tokens=1, **more)
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(), cached(), cached(cache_salt="s"), cached(cache_salt="s")] == [0, 80, 0, 80]
    with running.http as http:
        assert http.post("/reset_prefix_cache").json() == {"success": True}
    assert cached() == 0


async def test_64_connections_get_their_own_answers(running: Running) -> None:
    prompts = [f"{number} bottles of {number % 7} beers" for number in range(64)]
    body = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    some = {p: post(running, prompt=p, **body)["choices"][0]["text"] for p in prompts[::9]}
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=running.url, timeout=60, limits=limits, trust_env=False) as http:
        answers = await asyncio.gather(*(http.post("/v1/completions", json={**body, "prompt": p}) for p in prompts))
    texts = {p: answer.json()["choices"][0]["text"] for p, answer in zip(prompts, answers)}
    assert len(texts) == 64 and {p: texts[p] for p in some} == some
    eventually(lambda: used(running) == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_blocks(running: Running, stream: bool) -> None:
    eventually(lambda: used(running) == 0)
    body = {"prompt": "abc", "max_tokens": 3800, "ignore_eos": True, "stream": stream}
    with running.http as http:
        if stream:
            with http.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                assert next(lines)
                eventually(lambda: used(running) > 0)
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=0.5)
    eventually(lambda: used(running) == 0)


def test_refusals_come_from_the_door(running: Running) -> None:
    with running.http as http:
        response = http.post("/v1/completions", json={"prompt": "a" * 5000})
        assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"


def test_idle_costs_nothing(running: Running) -> None:
    eventually(lambda: used(running) == 0)
    processes = [psutil.Process(running.process.pid), running.engine]
    found = []
    for _ in range(3):  # what a host takes away in the middle of a tick can count as used
        time.sleep(0.3)
        before = [sum(p.cpu_times()[:2]) for p in processes]
        time.sleep(2.0)
        found.append([sum(p.cpu_times()[:2]) - used for p, used in zip(processes, before)])
        if max(found[-1]) <= 0.02:  # at most one or two clock ticks
            return
    pytest.fail(f"processor seconds of server and engine: {found}")


def test_second_server_on_the_same_port(running: Running, model: Path) -> None:
    port = running.url.rsplit(":", 1)[1]
    result = subprocess.run(
        [sys.executable, "-m", "appliance", "serve", str(model), "--port", port],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(
        f"appliance: error: cannot listen on 127.0.0.1 port {port}: Address already in use; stop what"
    )


def test_killed_engine_is_reported_and_started_again(model: Path) -> None:
    with started(str(model), *FLAGS) as running, running.http as http:
        first = running.engine
        body = {"prompt": "abc", "max_tokens": 3800, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines)
            first.send_signal(signal.SIGKILL)
            *_, error, done = [line for line in lines if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_dead" and done == "data: [DONE]"
        eventually(lambda: http.get("/health").status_code == 200, 60)
        assert running.engine.pid != first.pid
        assert http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2}).status_code == 200
        running.process.send_signal(signal.SIGTERM)
        assert running.ended() == 0


def test_ctrl_c_drains_then_ends_the_rest(model: Path) -> None:
    with started(str(model), *FLAGS, "--shutdown-timeout", "1") as running, running.http as http:
        engine = running.engine
        body = {"prompt": "abc", "max_tokens": 3800, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines)
            running.process.send_signal(signal.SIGINT)
            *_, error, done = [line for line in lines if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down" and done == "data: [DONE]"
        assert running.ended() == 0 and not engine.is_running()


def test_who_asks_while_it_drains_is_told_so(model: Path) -> None:
    """On a connection that was there before, and on a new one; who was there is served to the end."""
    with started(str(model), *FLAGS, "--shutdown-timeout", "60") as running, running.http as http, running.http as other:
        assert other.get("/health").status_code == 200
        with http.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            assert next(lines)
            running.process.send_signal(signal.SIGTERM)
            eventually(lambda: other.get("/health").status_code == 503)
            for client in (other, httpx.Client(base_url=running.url)):
                refused = client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2})
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
                assert int(refused.headers["retry-after"]) > 0
            *_, last, done = [line for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length" and done == "data: [DONE]"
        assert running.ended() == 0


def test_what_keys_have_used_outlives_the_server(model: Path, tmp_path: Path) -> None:
    keys, kept = tmp_path / "keys.toml", tmp_path / "usage.json"
    keys.write_text(f'mine = {{ sha256 = "{sha256(b"sk-mine").hexdigest()}", tokens_per_day = 100 }}\n')
    kept.write_text(json.dumps({"mine": {"since": time.time() - 60, "tokens": 80}}))
    with started(str(model), *FLAGS, "--api-key-file", str(keys), "--api-key-usage", str(kept)) as running, running.http as http:
        http.headers["authorization"] = "Bearer sk-mine"
        assert http.post("/v1/completions", json={"prompt": [5] * 10, "max_tokens": 6, "ignore_eos": True}).status_code == 200
        assert "used 96 of its 100" in http.post("/v1/completions", json={"prompt": [5] * 10}).json()["error"]["message"]
        running.process.send_signal(signal.SIGTERM)
        assert running.ended() == 0
    assert json.loads(kept.read_text())["mine"]["tokens"] == 96


def test_ctrl_c_twice_ends_at_once(model: Path) -> None:
    with started(str(model), *FLAGS, "--shutdown-timeout", "60") as running, running.http as http:
        engine = running.engine
        body = {"prompt": "abc", "max_tokens": 3800, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines)
            running.process.send_signal(signal.SIGINT)
            eventually(lambda: any("again to stop at once" in line for line in running.output))
            running.process.send_signal(signal.SIGINT)
            assert running.ended() == 130
        eventually(lambda: gone(engine))


def test_a_server_whose_starter_is_gone_says_why_it_ends(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = (
        "import os, subprocess, sys, time\nfrom appliance import leash\n"
        "process, held = leash.start(sys.argv[2:], dict(os.environ), stdout=open(sys.argv[1], 'w'), stderr=subprocess.STDOUT)\n"
        "print(process.pid, flush=True)\ntime.sleep(60)"
    )
    serve = [sys.executable, "-m", "appliance", "serve", str(model), "--port", "0", "--kv-cache-memory-bytes", "4000000"]
    command = [sys.executable, "-c", script, str(log), *serve]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}) as starter:
        try:
            assert starter.stdout is not None
            server = psutil.Process(int(starter.stdout.readline()))
            eventually(lambda: "appliance: ready at" in log.read_text(), 90)
        finally:
            starter.kill()
    eventually(lambda: gone(server))
    said = [line for line in log.read_text().splitlines() if "the program that started this server is gone: it ends, too" in line]
    assert len(said) == 1 and " WARNING appliance.server" in said[0]
