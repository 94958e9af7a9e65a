"""One look as text or JSON, and what the command line refuses."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.cli import run as command
from appliance.config import EngineConfig
from appliance.memory.planner import make_plan
from appliance.tui import run
from appliance.tui.feed import Feed, FeedError
from appliance.tui.run import Asked, main
from appliance.tui.snapshot import snapshot
from appliance.tui.widgets.memory import plan_parts
from appliance.tui.widgets.requests import columns, table_lines
from quant.errors import InputError
from tests.tiny_model import make_checkpoint
from tests.tui.fake_server import FakeServer
from tests.tui.stage import FakeVllm


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put stand-ins for servers behind ``main``, in order; each is told the key it is asked with."""

    def install(*servers: Any) -> None:
        left = list(servers)

        def make(url: str, key: str | None = None, **tls: object) -> Any:
            one = left.pop(0)
            one.url, one.asked_with = url, key
            return one

        monkeypatch.setattr(run, "Server", make)

    return install


def busy() -> FakeServer:
    server = FakeServer()
    for _ in range(60):
        server.tick()
    return server


def away() -> FakeServer:
    server = FakeServer()
    server.away = FeedError("no answer from http://127.0.0.1:8000: Connection refused")
    return server


def test_once_prints_a_plain_snapshot(serve: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    serve(server := busy())
    assert main(Asked(["http://127.0.0.1:8000"], once=True)) == 0
    out, stats = capsys.readouterr().out, server.engine()
    assert "\x1b" not in out and max(map(len, out.splitlines())) <= 100
    assert "● serving │ Llama-3.2-1B-Instruct-AWQ" in out and f"{stats.running} running" in out
    assert f"{stats.blocks_shared} shared · {stats.blocks_kept:,} kept" in out and "prefix hits 40 % (5 % in host memory)" in out
    assert "60 swapped, 130 kept of 512 blocks, 256 MiB" in out and "1 swapped" in out
    assert "CPU 98 %, 64 °C · RAM 11.0 GiB of 32.0 GiB" in out and "first token after" in out
    assert f"{stats.prompt_tokens:,} prompt and {stats.generation_tokens:,} generated tokens" in out
    ids = [row["id"] for row in server.body()["engine"]["requests_now"]]
    assert all(name[:10] in out for name in ids)


def test_a_pipe_gets_the_snapshot_without_asking_for_it(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(busy())
    pipe = io.StringIO()
    monkeypatch.setattr("sys.stdout", pipe)
    assert main(Asked()) == 0
    assert "of 1,536 used" in pipe.getvalue()


def test_json_is_the_servers_own_stats(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    serve(server := busy())
    assert main(Asked(["127.0.0.1:8000"], once=True, json=True)) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(server.body()))


def test_one_of_several_models(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = busy(), busy()
    serve(one, two)
    assert main(Asked(["a:1", "b:2"], json=True, model="coder")) == 0 and (one.model, two.model) == ("coder", "coder")
    capsys.readouterr()


def test_several_servers_and_their_keys(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = busy(), FakeVllm()
    serve(one, two)
    assert main(Asked(["a:1", "b:2"], ["k1", "k2"], json=True)) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["http://a:1", "http://b:2"] and found["http://b:2"]["kind"] == "vllm"
    assert (one.asked_with, two.asked_with) == ("k1", "k2")
    serve(one, two)
    assert main(Asked(["a:1", "b:2"], ["one-for-all"], once=True)) == 0
    assert (one.asked_with, two.asked_with) == ("one-for-all", "one-for-all")
    out = capsys.readouterr().out
    assert "vLLM 0.11.0 │ ● serving │ Qwen/Qwen2.5-7B-Instruct-AWQ" in out and "5,378 of 14,835 used, 36 %" in out
    serve(one, away())
    assert main(Asked(["a:1", "b:2"], once=True)) == 1, "one of them is away"
    streams = capsys.readouterr()
    assert "serving" in streams.out and "Connection refused" in streams.err


def test_a_terminal_that_nothing_can_be_drawn_on_gets_one_look(
    serve: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(run, "Dashboard", None)
    monkeypatch.setenv("TERM", "dumb")
    serve(away(), away())
    assert main(Asked(["127.0.0.1:8000"])) == 1
    assert capsys.readouterr().err == "appliance: no answer from http://127.0.0.1:8000: Connection refused\n"
    with pytest.raises(InputError, match="--serve needs a terminal to draw on"):
        main(Asked(serve="demo"))


@pytest.mark.parametrize("as_json", [False, True])
def test_one_look_at_nothing_fails(serve: Any, capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    serve(away())
    assert main(Asked(["127.0.0.1:8000"], once=True, json=as_json)) == 1
    streams = capsys.readouterr()
    assert (streams.out, streams.err) == ("", "appliance: no answer from http://127.0.0.1:8000: Connection refused\n")


REFUSED = [
    (Asked(interval=0.0), r"--interval 0 is not possible: give seconds, 0.1 or more"),
    (Asked(interval=float("nan")), r"--interval nan is not possible"),
    (Asked(interval=float("inf")), r"--interval inf is not possible"),
    (Asked(["a:1", "b:2", "c:3"], ["k", "l"]), r"--api-key was given 2 times for 3 servers: give one for all, or one for each"),
    (Asked(once=True, serve="demo"), r"--serve does not go with --once"),
    (Asked(json=True, record=Path("x")), r"--record does not go with --json"),
    (Asked(["a:1"], replay=Path("x")), r"--url does not go with --replay"),
    (Asked(model="coder", replay=Path("x")), r"--model does not go with --replay"),
    (Asked(flags=["--port", "1"]), r"there is no option --port; what is behind -- is for a server that --serve MODEL starts"),
    (Asked(flags=["box:8000"]), r"'box:8000': the address of a server is given as --url box:8000"),
    (Asked(serve=""), r"--serve needs a model"),
    (Asked(serve="demo"), r"--serve needs a terminal"),
    (Asked(record=Path("/nowhere/x")), r"--record needs a terminal to draw on"),
    (Asked(replay=Path("/nowhere")), r"--replay /nowhere: No such file or directory"),
]


@pytest.mark.parametrize(("asked", "message"), REFUSED)
def test_refuses_in_one_line(asked: Asked, message: str) -> None:
    with pytest.raises(InputError, match=message):
        main(asked)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """What the command line comes to."""
    seen: list[Asked] = []
    monkeypatch.setattr(run, "main", lambda one: seen.append(one) or 0)
    return seen


def test_the_command_line(asked: list[Asked], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["tui", "--url", "a", "--url", "b", "--api-key", "k", "--interval", "0.5", "--record", "s.gz"]) == 0
    assert asked.pop() == Asked(("a", "b"), ("k",), 0.5, record=Path("s.gz"))
    assert command(["tui", "--serve", "demo", "--", "--max-model-len", "8k", "--port=9"]) == 0
    assert asked.pop() == Asked(serve="demo", flags=("--max-model-len", "8k", "--port=9"))
    monkeypatch.setenv("APPLIANCE_API_KEY", "from-the-environment")
    monkeypatch.setenv("APPLIANCE_MODEL", "/srv/m")  # a server's
    assert command(["tui", "--once", "--json"]) == 0
    assert asked.pop() == Asked(api_key=("from-the-environment",), once=True, json=True)
    assert command(["tui", "--once", "--model", "coder"]) == 0 and asked.pop().model == "coder"
    assert command(["tui", "--interval", "often"]) == 2 and "--interval" in capsys.readouterr().err


def test_snapshot_while_loading_and_in_a_narrow_place() -> None:
    server = FakeServer(arrivals=0.0)
    server.state = "loading"
    feed = Feed(server)
    feed.poll()
    assert "reading the model" in snapshot(feed, 100) and "no pool yet" in snapshot(feed, 100)
    feed = Feed(busy())
    feed.poll()
    head = next(line for line in snapshot(feed, 30).splitlines() if line.startswith("request "))
    assert head.split() == ["request", "key"], "columns that do not fit are left out"


def test_adapters_have_a_column_where_there_are_some() -> None:
    feed = Feed(busy())
    feed.poll()
    view = feed.view
    assert view is not None and "adapter" not in {column.name for column, _ in columns(view.rows, 160)}
    first, *others = view.rows
    rows = [replace(first, stat=replace(first.stat, adapter="sql-expert")), *others]
    assert ("adapter", len("sql-expert") + 2) in {(column.name, width) for column, width in columns(rows, 160)}
    _, *lines = table_lines(replace(view, rows=tuple(rows)), 160)
    assert sum("  sql-expert  " in f" {line} " for line in lines) == 1


def test_state_of_a_request() -> None:
    feed = Feed(busy())
    feed.poll()
    assert feed.view is not None
    row = next(row for row in feed.view.rows if row.stat.state == "running")

    def state(**more: Any) -> str:
        return replace(row, stat=replace(row.stat, **more)).state

    assert state(prompt_tokens=100, output_tokens=0, computed_tokens=64) == "prefill 64 %"
    assert state(prompt_tokens=100, output_tokens=1, computed_tokens=100) == "decode"
    assert state(prompt_tokens=100, output_tokens=100, computed_tokens=50) == "prefill 25 %", "read again"
    assert state(state="waiting") == "waiting"


@pytest.mark.parametrize("swap", [0.0, 0.01])
def test_memory_bar_reads_the_planners_own_words(tmp_path: Path, swap: float) -> None:
    plan = make_plan(make_checkpoint(tmp_path), EngineConfig(model=str(tmp_path), device="cpu", swap_space=swap))
    parts = plan_parts(plan.to_dict())
    assert parts is not None and sum(parts.sizes.values()) == plan.total and parts.budget == plan.budget
    assert plan_parts({}) is None and plan_parts({"weights_bytes": 1}) is None
