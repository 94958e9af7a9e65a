from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.config import EngineConfig
from appliance.memory.planner import make_plan
from appliance.tui import app
from appliance.tui.feed import Feed, FeedError
from appliance.tui.snapshot import snapshot
from appliance.tui.widgets.memory import plan_parts
from appliance.tui.widgets.requests import state
from quant.errors import InputError
from tests.tiny_model import make_checkpoint
from tests.tui.fake_server import FakeServer


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeServer], None]:
    """Put a stand-in server behind ``main``."""

    def install(server: FakeServer) -> None:
        monkeypatch.setattr(app, "fetch", server)
        monkeypatch.setattr(app, "Feed", lambda url, source: Feed(url, source=server))

    return install


def busy() -> FakeServer:
    server = FakeServer()
    for _ in range(60):
        server.tick()
    return server


def test_once_prints_a_plain_snapshot(serve: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    serve(server := busy())
    assert app.main("http://127.0.0.1:8000", once=True) == 0
    out = capsys.readouterr().out
    stats = server.stats()
    assert "\x1b" not in out and max(map(len, out.splitlines())) <= 100
    assert "● serving │ Llama-3.2-1B-Instruct-AWQ" in out and f"{stats.running} running" in out
    assert f"{stats.blocks_kept:,} kept · prefix hits 40 % (5 % in host memory)" in out
    assert "256 MiB: 60 of 512 blocks used, 130 kept" in out and "1 swapped" in out
    assert f"{stats.prompt_tokens:,} prompt and {stats.generation_tokens:,} generated tokens" in out
    assert all(request.request_id in out for request in stats.requests_now)


def test_a_pipe_gets_the_snapshot_without_asking_for_it(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(busy())
    pipe = io.StringIO()
    monkeypatch.setattr("sys.stdout", pipe)
    assert app.main("127.0.0.1:8000") == 0
    assert "of 1,536 used" in pipe.getvalue()


def test_json_is_the_servers_own_stats(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    serve(server := busy())
    assert app.main("127.0.0.1:8000", once=True, json_output=True) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(server.body()))


@pytest.mark.parametrize("json_output", [False, True])
def test_one_look_at_nothing_fails(serve: Any, capsys: pytest.CaptureFixture[str], json_output: bool) -> None:
    server = FakeServer()
    server.away = FeedError("no answer from http://127.0.0.1:8000: Connection refused")
    serve(server)
    assert app.main("127.0.0.1:8000", once=True, json_output=json_output) == 1
    streams = capsys.readouterr()
    assert (streams.out, streams.err) == ("", "appliance: no answer from http://127.0.0.1:8000: Connection refused\n")


@pytest.mark.parametrize("interval", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_an_impossible_interval(interval: float) -> None:
    with pytest.raises(InputError, match=r"--interval .* is not possible: give seconds, 0.1 or more"):
        app.main("127.0.0.1:8000", interval=interval)


def test_snapshot_while_loading_and_in_a_narrow_place() -> None:
    server = FakeServer(arrivals=0.0)
    server.state = "loading"
    feed = Feed("127.0.0.1:8000", source=server)
    feed.poll()
    assert "reading the model" in snapshot(feed, 100) and "no pool yet" in snapshot(feed, 100)
    feed = Feed("127.0.0.1:8000", source=busy())
    feed.poll()
    head = next(line for line in snapshot(feed, 30).splitlines() if line.startswith("request "))
    assert head.split() == ["request", "state"], "columns that do not fit are left out"


def test_state_of_a_request() -> None:
    server = busy()
    request = next(r for r in server.stats().requests_now if r.state == "running")
    assert state(replace(request, prompt_tokens=100, output_tokens=0, computed_tokens=64)) == "prefill 64 %"
    assert state(replace(request, prompt_tokens=100, output_tokens=1, computed_tokens=100)) == "decode"
    assert state(replace(request, prompt_tokens=100, output_tokens=100, computed_tokens=50)) == "prefill 25 %", "read again"
    assert state(replace(request, state="waiting")) == "waiting"


@pytest.mark.parametrize("swap", [0.0, 0.01])
def test_memory_bar_reads_the_planners_own_words(tmp_path: Path, swap: float) -> None:
    plan = make_plan(make_checkpoint(tmp_path), EngineConfig(model=str(tmp_path), device="cpu", swap_space=swap))
    parts = plan_parts(plan.to_dict())
    assert parts is not None and sum(parts.sizes.values()) == plan.total and parts.budget == plan.budget
    assert plan_parts({}) is None and plan_parts({"weights_bytes": 1}) is None
