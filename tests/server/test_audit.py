"""The audit log over HTTP: what it says, what it keeps to itself, and disks that fail under it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from appliance import cli
from appliance.config import EngineConfig, ServerConfig
from appliance.server.audit import AuditLog
from appliance.text.tokenizer import Tokenizer
from quant.errors import InputError
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient
from tests.server.test_keys import bearer, digest
from tests.server.test_lifecycle import LONG, eventually

KEY = "sk-a-key-of-alice"
FIELDS = {"time", "request_id", "client", "key", "endpoint", "model", "status", "prompt_tokens", "generated_tokens", "latency_s"}
ERROR = {"error_code", "error_param"}
FIELDS |= {"finish_reasons"}


@pytest.fixture
def start(tokenizer: Tokenizer, model_dir: Path, tmp_path: Path) -> Callable[..., AbstractContextManager[Served]]:
    def start(log: str | Path, *, delay_s: float = 0.0, **options: Any) -> AbstractContextManager[Served]:
        file = tmp_path / "keys.toml"
        file.write_text(f'alice = {{ sha256 = "{digest(KEY)}", concurrency = 70 }}\n')
        config = ServerConfig(served_model_name=("tiny",), api_key_file=str(file), audit_log=str(log), **options)
        engine = EngineConfig(model=str(model_dir))
        return serve_in_thread(lambda: FakeClient(delay_s=delay_s), tokenizer, engine, config)

    return start


def ask(served: Served, key: str = KEY, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    with served.http as http:
        return http.post(path, json=body, headers=bearer(key))


def lines(file: Path, count: int) -> list[dict[str, Any]]:
    eventually(lambda: file.exists() and file.read_bytes().count(b"\n") >= count)
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(found) == count
    return found


def metric(served: Served, name: str) -> float:
    with served.http as http:
        text = http.get("/metrics", headers=bearer(KEY)).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"appliance:{name}"))


def test_what_it_says(start: Any, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    with start(log) as served:
        ask(served, prompt="xyzzy", max_tokens=3, request_id="first")
        ask(served, prompt=["xyzzy", "ab"], max_tokens=2, n=2, temperature=1, stream=True)
        ask(served, path="/v1/chat/completions", messages=[{"role": "user", "content": "xyzzy"}], max_tokens=4)
        ask(served, "sk-wrong", prompt="xyzzy")
        ask(served, prompt="xyzzy", temperature=-1)
        ask(served, path="/tokenize", prompt="xyzzy")
        served.client.fail_at = 1
        ask(served, prompt="xyzzy", max_tokens=3)
        served.client.fail_at = 2  # when the stream has begun
        ask(served, prompt="xyzzy", max_tokens=3, stream=True)
        with served.http as http:
            for path in ("/health", "/stats", "/metrics", "/v1/models"):  # looked at every second
                http.get(path, headers=bearer(KEY))
            http.get("/stats")  # but this one was refused
            http.delete("/v1/requests/none", headers=bearer(KEY))
            served.client.state = "loading"
            for path in ("/health", "/v1/health", "/ready", "/ping", "/stats", "/metrics"):  # not yet 200, some of them
                http.get(path, headers=bearer(KEY))
            http.get("/metrics")
            http.get("/health", headers={"Authorization": "Bearer sk-wrong"})
            http.post("/health", headers=bearer(KEY))
            http.options("/health")  # as much as any other that has no key
            ask(served, prompt="xyzzy")
        found = lines(log, 14)
    text = log.read_text()
    assert "xyzzy" not in text and KEY not in text and "sk-wrong" not in text
    assert all(set(line) == FIELDS | (ERROR if line["status"] >= 400 else set(line) & ERROR) for line in found)
    assert {(line["error_code"], line["error_param"]) for line in found if "error_code" in line} >= {
        ("invalid_request_error", "temperature"), ("invalid_api_key", None), ("engine_error", None),
    }  # fmt: skip
    assert [line["status"] for line in found] == [200, 200, 200, 401, 400, 200, 500, 200, 401, 404, 401, 405, 401, 503]
    assert [line["key"] for line in found] == ["alice"] * 3 + [None] + ["alice"] * 4 + [None, "alice"] * 3
    assert [(line["prompt_tokens"], line["generated_tokens"]) for line in found[:3]] == [
        (6, 3),
        (6 + 3, 8),
        (found[2]["prompt_tokens"], 4),
    ]
    assert found[2]["prompt_tokens"] > 10  # the template's words, too
    assert [line["finish_reasons"] for line in found[:5]] == [["length"], ["length"] * 4, ["length"], [], []]
    assert [line["finish_reasons"] for line in found[6:8]] == [["error"], ["error"]]
    assert [(line["prompt_tokens"], line["generated_tokens"]) for line in found[6:8]] == [(6, 1), (6, 2)]
    assert found[0]["request_id"] == "first"
    assert [line["model"] for line in found] == ["tiny"] * 3 + [None] + ["tiny"] * 4 + [None] * 5 + ["tiny"]
    assert [line["endpoint"] for line in found[2:4]] == ["POST /v1/chat/completions", "POST /v1/completions"]
    assert [line["endpoint"] for line in found[8:]] == [
        *("GET /stats", "DELETE /v1/requests/none", "GET /metrics", "POST /health", "OPTIONS /health", "POST /v1/completions")
    ]
    assert found[0]["client"] == "127.0.0.1" and 0 < found[0]["latency_s"] < 5
    assert abs(datetime.fromisoformat(found[0]["time"]).timestamp() - time.time()) < 60
    assert log.stat().st_mode & 0o777 == 0o600


def test_content_only_where_it_is_asked_for(start: Any, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    with start(log, audit_content=True) as served:
        ask(served, prompt="xyzzy", max_tokens=3, stream=True)
        ask(served, prompt=[5, 6], max_tokens=2)
        ask(served, path="/v1/chat/completions", messages=[{"role": "user", "content": "plugh"}], max_tokens=3)
        first, ids, chat = lines(log, 3)
    assert first["prompts"] == ["xyzzy"] and first["answers"] == ["xy"]
    assert ids["prompts"] == [[5, 6]] and "plugh" in chat["prompts"][0] and chat["answers"] == ["us"]


def test_a_client_that_goes_away(start: Any, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    with start(log, delay_s=0.01) as served, served.http as http:
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}, headers=bearer(KEY)) as response:
            one = response.iter_lines()
            next(one)
        (line,) = lines(log, 1)
        assert line["finish_reasons"] == ["abort"] and 0 < line["generated_tokens"] < 100


def test_rotation(start: Any, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    with start(log) as served:
        served.state.audit = AuditLog(str(log), max_bytes=1000, files=3)
        for number in range(40):
            ask(served, prompt="a", max_tokens=1, request_id=f"number-{number:02}")

        def told() -> bool:
            with suppress(FileNotFoundError):  # it has just been put aside
                return "number-39" in log.read_text()
            return False

        eventually(told)
    files = sorted(tmp_path.glob("audit.jsonl*"))
    assert [file.name for file in files] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all(file.stat().st_size <= 1000 for file in files)
    kept = [json.loads(line)["request_id"] for file in reversed(files) for line in file.read_text().splitlines()]
    assert len(kept) >= 6 and kept == [f"number-{number:02}" for number in range(40 - len(kept), 40)]  # the latest, none twice
    assert served.state.audit.lost == 0


def test_a_line_longer_than_a_file(tmp_path: Path) -> None:
    log = AuditLog(str(tmp_path / "log"), max_bytes=10, files=2)
    for number in range(3):
        log.add({"number": number, "long": "x" * 50})
    log.close()
    assert [json.loads((tmp_path / name).read_text())["number"] for name in ("log", "log.1")] == [2, 1]
    single = AuditLog(str(tmp_path / "one"), max_bytes=10, files=1)
    single.add({"number": 1})
    single.add({"number": 2})
    single.close()
    assert json.loads((tmp_path / "one").read_text()) == {"number": 2} and not (tmp_path / "one.1").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    with start("/dev/full") as served:
        for _ in range(5):
            assert ask(served, prompt="a", max_tokens=1).status_code == 200
        eventually(lambda: served.state.audit.lost == 5)
        assert metric(served, "audit_lines_lost_total") == 5
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(told) == 1 and "No space left on device; requests are answered all the same" in told[0]


def test_a_disk_that_comes_back(start: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "place"
    place.mkdir()
    log = place / "audit.jsonl"
    with start(log) as served:
        ask(served, prompt="a", max_tokens=1, request_id="before")
        lines(log, 1)
        os.replace(place, tmp_path / "away")
        for _ in range(3):
            assert ask(served, prompt="a", max_tokens=1).status_code == 200
        eventually(lambda: served.state.audit.lost == 3)
        place.mkdir()
        ask(served, prompt="a", max_tokens=1, request_id="after")
        assert lines(log, 1)[0]["request_id"] == "after" and metric(served, "audit_lines_lost_total") == 3
        os.replace(log, place / "rotated")  # as logrotate does
        ask(served, prompt="a", max_tokens=1, request_id="later")
        assert lines(log, 1)[0]["request_id"] == "later"
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(told) == 2 and "No such file" in told[0] and "is written again; 3 lines were lost" in told[1]


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(str(tmp_path / "log"))
    real = os.write

    def short(file: int, data: bytes) -> int:
        return real(file, data[:5]) if b"two" in data else real(file, data)

    monkeypatch.setattr(os, "write", short)
    for name in ("one", "two", "three"):
        log.add({"name": name})
    log.close()
    assert [json.loads(line)["name"] for line in (tmp_path / "log").read_text().splitlines()] == ["one", "three"]
    assert log.lost == 1


def test_a_disk_that_hangs_delays_nobody(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = threading.Event()
    with start(tmp_path / "log") as served:
        monkeypatch.setattr(served.state.audit, "_write", lambda line: stuck.wait(20))
        served.state.audit._queue.maxsize = 3
        begun = time.monotonic()
        for _ in range(8):
            assert ask(served, prompt="a", max_tokens=1).status_code == 200
        assert time.monotonic() - begun < 15
        eventually(lambda: served.state.audit.lost == 4)  # one is being written, three wait
        stuck.set()


def test_content_that_waits_for_the_disk_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.server.audit.MAX_WAITING", 1000)
    log, begun, stuck, written = AuditLog(str(tmp_path / "log")), threading.Event(), threading.Event(), list[bytes]()

    def write(line: bytes) -> None:
        begun.set()
        assert stuck.wait(20)
        written.append(line)

    monkeypatch.setattr(log, "_write", write)
    log.add({"prompts": "a"})
    assert begun.wait(20)
    for text in ("b" * 2000, "c" * 2000, "d"):  # one that is larger than all may wait alone
        log.add({"prompts": text})
    assert log.lost == 2
    stuck.set()
    log.close()
    assert [line[12:13] for line in written] == [b"a", b"b"]
    assert log._given == log._taken > 2000


async def test_many_at_once(start: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with start(log, delay_s=0.001) as served:
        async with httpx.AsyncClient(base_url=served.url, timeout=30, trust_env=False, headers=bearer(KEY)) as http:
            await asyncio.gather(*(
                http.post("/v1/completions", json={"prompt": [5] * k, "max_tokens": k}, headers={"X-Request-Id": f"r{k}"})
                for k in range(1, 65)
            ))  # fmt: skip
        found = await asyncio.to_thread(lines, log, 64)
    expected = {f"r{k}": (k, k) for k in range(1, 65)}
    assert {line["request_id"]: (line["prompt_tokens"], line["generated_tokens"]) for line in found} == expected


def test_text_that_is_no_text(tmp_path: Path) -> None:
    log = AuditLog(str(tmp_path / "log"))
    log.add({"endpoint": "\ud800"})
    log.add({"endpoint": "fine"})
    log.close()
    assert (tmp_path / "log").read_text() == '{"endpoint":"fine"}\n' and log.lost == 1


def test_a_pipe_holds_nothing_up(tmp_path: Path) -> None:
    """Opened or written as files are, one that nobody reads would wait for ever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="pipe: a pipe that nobody reads"):
        AuditLog(str(pipe))
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = AuditLog(str(pipe))
    log.add({"number": 1})

    def told() -> bool:
        with suppress(BlockingIOError):  # whoever writes it has just opened the pipe
            return os.read(reader, 100) == b'{"number":1}\n'
        return False

    eventually(told)
    for _ in range(100):
        log.add({"text": "x" * 4000})  # more than it holds
    log.close()
    assert not log._thread.is_alive() and 0 < log.lost < 100
    os.close(reader)


def test_a_pipe_takes_lines_of_any_length(tmp_path: Path) -> None:
    """From whoever reads late; of a line that is cut off because nobody reads, the next one is a line all the same."""
    pipe, found = tmp_path / "pipe", bytearray()
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = AuditLog(str(pipe))

    def read() -> int:
        with suppress(BlockingIOError):  # there is nothing now
            while data := os.read(reader, 5000):
                found.extend(data)
        return found.count(b"\n")

    for k in range(5):
        log.add({"number": k, "text": "x" * 100_000})  # a pipe holds 65,536 bytes
        log.add({"number": k, "text": "y" * 4050})  # which goes into it whole or not at all
    eventually(lambda: read() == 10)
    assert [json.loads(line)["number"] for line in found.splitlines()] == [k // 2 for k in range(10)] and not log.lost
    log.add({"text": "z" * 100_000})
    eventually(lambda: log.lost)
    read()
    found.clear()
    log.add({"number": 11})
    eventually(lambda: read() == 2)
    log.close()
    os.close(reader)
    assert log.lost == 1 and json.loads(found.splitlines()[-1]) == {"number": 11}


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["serve", "--audit-log", str(tmp_path / "no" / "log")]) == 2
    assert capsys.readouterr().err == f"appliance: error: --audit-log {tmp_path}/no/log: No such file or directory\n"
    assert cli.run(["serve", "--audit-content"]) == 2
    assert "--audit-content needs --audit-log FILE" in capsys.readouterr().err
    assert cli.run(["serve", "--max-num-queued-reqs", "0"]) == 2
    assert "--max-num-queued-reqs is at least 1, or -1 for no limit, got 0" in capsys.readouterr().err
