"""--serve: a server that is started, watched, and ended with the dashboard; a stand-in does what `appliance serve` does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from appliance.server.run import bind
from appliance.tui.app import Dashboard
from appliance.tui.child import Child, as_log
from appliance.tui.feed import Feed, LogLine
from appliance.tui.http import Server
from quant.errors import InputError
from tests.server.test_lifecycle import eventually
from tests.tiny_model import make_checkpoint
from tests.tui.fake_server import FakeServer
from tests.tui.stage import Stage

SERVER = """
import http.server, json, signal, sys, threading
port = int(sys.argv[1])
body = json.load(open(sys.argv[3]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(body).encode())
    def log_message(self, *a): pass
print("the plan")
print("2026-11-21 12:00:00.123 INFO appliance.server: loading", file=sys.stderr, flush=True)
import os, time
while not os.path.exists(sys.argv[2]): time.sleep(0.01)
server = http.server.HTTPServer(("127.0.0.1", port), Handler)
def end(*_):
    print("appliance: stopping", flush=True)
    threading.Thread(target=server.shutdown).start()
signal.signal(signal.SIGTERM, end)
print("appliance: ready", flush=True)
server.serve_forever()
print("bye", flush=True)
"""


def stand_in(tmp_path: Path, running: int = 0) -> Child:
    """It loads until there is a file of the name go."""
    body = FakeServer(arrivals=0.0).body()
    body["engine"]["running"] = running
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "body.json").write_text(json.dumps(body))
    child = Child("demo", [])
    port = child.url.rpartition(":")[2]
    child.command = [sys.executable, str(tmp_path / "server.py"), port, str(tmp_path / "go"), str(tmp_path / "body.json")]
    return child


def wait_for(child: Child, words: str) -> None:
    eventually(lambda: any(words in line.message for line in list(child.lines)), 60)


def test_the_command_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child("org/model", ["--max-model-len", "8k", "--api-key", "k"])
    port = child.url.rpartition(":")[2]
    assert child.url.startswith("http://127.0.0.1:") and child.api_key == "k"
    assert child.command[1:] == [
        "-m",
        "appliance",
        "serve",
        "org/model",
        "--max-model-len",
        "8k",
        "--api-key",
        "k",
        "--port",
        port,
    ]
    child = Child("demo", ["--port=9000", "--host", "0.0.0.0", "--ssl-certfile=x"])
    assert child.url == "https://127.0.0.1:9000" and child.command[3:] == [
        "serve",
        "demo",
        "--port=9000",
        "--host",
        "0.0.0.0",
        "--ssl-certfile=x",
    ]
    child = Child("m", ["--port", "0", "--host=::"])
    assert child.url.startswith("http://[::1]:") and "0" not in child.command[4:] and child.command.count("--port") == 1
    monkeypatch.setenv("APPLIANCE_PORT", "9001")
    assert Child("m", []).url == "http://127.0.0.1:9001" and "--port" not in Child("m", []).command
    with pytest.raises(InputError, match="'web' is not a port"):
        Child("m", ["--port", "web"])


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost", "::1", "nowhere.invalid", "192.0.2.1"])
def test_nobody_else_gets_its_port(host: str) -> None:
    """Among those who ask for any; the server, which asks for this one, does get it."""
    child = Child("m", ["--host", host])
    port = int(child.url.rpartition(":")[2])
    mine = "::1" if host == "::1" else "127.0.0.1"
    others = [socket.socket(socket.AF_INET6 if ":" in mine else socket.AF_INET) for _ in range(2000)]
    try:
        for other in others:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind((mine, 0))
        assert port not in {other.getsockname()[1] for other in others}
    finally:
        for other in others:
            other.close()
    if host not in ("nowhere.invalid", "192.0.2.1"):
        bind(host, port).close()


def test_lines_of_its_log() -> None:
    line = as_log("2026-11-21 12:00:00.123 WARNING appliance.engine: gave way: slow")
    assert line == LogLine("2026-11-21T12:00:00.123", "warning", "appliance.engine", "gave way: slow")
    assert as_log("a table  of four  words") == LogLine("", "", "", "a table  of four  words")
    assert as_log("appliance: error: no such directory: x").level == "error"


def test_it_ends_when_it_is_told_to(tmp_path: Path) -> None:
    child = stand_in(tmp_path)
    (tmp_path / "go").touch()
    child.start()
    wait_for(child, "appliance: ready")
    assert child.running and child.ended is None
    child.stop()
    assert not child.running and child.code == 0
    assert [line.message for line in child.lines] == ["the plan", "loading", "appliance: ready", "appliance: stopping", "bye"]
    child.stop()


def test_one_that_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.tui.child.PATIENCE_S", 0.1)
    child = Child("m", ["--shutdown-timeout", "0.1"])
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); time.sleep(60)"
    child.command = [sys.executable, "-c", script]
    child.start()
    wait_for(child, "here")
    child.stop()
    assert not child.running and child.ended == f"the server has ended by signal {signal.SIGKILL.value}"


def test_one_that_cannot_start_says_why(tmp_path: Path) -> None:
    child = Child("/nowhere/at/all", [])
    child.start()
    wait_for(child, "appliance: error")
    eventually(lambda: not child.running, 60)
    assert child.ended == "the server has ended with exit code 2: no such directory: /nowhere/at/all" and child.code == 2


DASHBOARD = """
import sys, time
from appliance.tui.child import Child
child = Child(sys.argv[2], sys.argv[3:])
child.start()
while not any(sys.argv[1] in line.message for line in list(child.lines)): time.sleep(0.02)
print(child._process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("when", ["", "appliance: ready"])
def test_a_dashboard_that_is_killed_takes_its_server_along(tmp_path: Path, when: str) -> None:
    """While it loads, and when it serves; and the engine as well."""
    make_checkpoint(tmp_path / "tiny")
    flags = ["--reference-ops", "--threads", "1", "--kv-cache-memory-bytes", "4000000", "--shutdown-timeout", "1"]
    command = [sys.executable, "-c", DASHBOARD, when or "MiB", str(tmp_path / "tiny"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as dashboard:
        assert dashboard.stdout is not None
        server = psutil.Process(int(dashboard.stdout.readline()))
        if when:
            assert server.children(), "its engine"
        left = [server, *server.children()]
        dashboard.kill()
    _, alive = psutil.wait_procs(left, 60)
    for one in alive:
        one.kill()
    assert not alive


async def test_the_log_is_shown_while_it_loads_and_quitting_asks(tmp_path: Path) -> None:
    child = stand_in(tmp_path, running=3)
    app = Dashboard([Feed(Server(child.url))], interval=0.1, child=child)
    child.start()
    try:
        async with app.run_test(size=(90, 30)) as pilot:
            stage = Stage(app, (), pilot)
            await stage.until("the server is starting")
            await stage.until("INFO  loading")
            (tmp_path / "go").touch()
            text = await stage.until("● serving")
            text = await stage.until("all levels", gone=True)
            assert "3 running" in text, "the log makes room for what it does"
            await stage.press("q")
            await stage.until("works on 3 requests. End it?")
            await stage.press("n")
            await stage.until("End it?", gone=True)
            await stage.press("q", "y")
            for _ in range(100):
                await pilot.pause(0.02)
                if app._exit:
                    break
        assert app.return_code == 0 and child.running, "it is ended by whoever started the dashboard"
    finally:
        child.stop()
    assert child.lines[-1].message == "bye"


async def test_a_server_that_dies_is_told_with_its_words() -> None:
    child = Child("/nowhere/at/all", [])
    app = Dashboard([Feed(Server(child.url))], interval=0.1, child=child)
    child.start()
    async with app.run_test(size=(120, 30)) as pilot:
        stage = Stage(app, (), pilot)
        await stage.until("✖ the server has ended with exit code 2: no such directory: /nowhere/at/all")
        await stage.until("ERROR appliance: error: no such directory")
        await stage.press("q")
    assert app.return_code == 0


async def test_a_signal_ends_the_dashboard_and_the_server(tmp_path: Path) -> None:
    child = stand_in(tmp_path)
    (tmp_path / "go").touch()
    app = Dashboard([Feed(Server(child.url))], interval=0.1, child=child)
    child.start()
    try:
        async with app.run_test(size=(90, 30)) as pilot:
            await Stage(app, (), pilot).until("● serving")
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(100):
                await pilot.pause(0.02)
                if app._exit:
                    break
            assert app._exit
    finally:
        child.stop()
    assert not child.running
