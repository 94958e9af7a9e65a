"""The files of docs/deploy, and what a service manager is told."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from appliance import cli
from appliance.config import EngineConfig, ServerConfig
from appliance.server.notify import beat, notify, watchdog_s
from appliance.server.respond import MAX_BODY
from tests.server.conftest import Served
from tests.server.test_metrics import parse

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "docs/deploy"
UNIT = (DEPLOY / "appliance.service").read_text()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A service manager's end of the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(90)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


def settings(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)


def test_a_manager_hears_of_a_server_from_start_to_end(manager: socket.socket) -> None:
    """As the unit has it: Type=notify, a watchdog, and a signal to the main process alone."""
    env = {**os.environ, "WATCHDOG_USEC": "400000"}
    process = subprocess.Popen([sys.executable, "-m", "appliance", "serve", "--port", "0"], stdout=subprocess.DEVNULL, env=env)
    try:
        heard: list[str] = []
        while "READY=1\nSTATUS=serves demo" not in heard:
            heard.append(manager.recv(4096).decode())
        took = []
        for _ in range(3):  # beats that came while nobody looked are there at once
            begun, beats = time.monotonic(), 0
            while beats < 4:
                beats += manager.recv(4096) == b"WATCHDOG=1"
            took.append(time.monotonic() - begun)
            if took[-1] > 0.3:
                break
        assert min(took) < 5 and max(took) > 0.3, took
        process.send_signal(signal.SIGTERM)
        while heard[-1] != "STOPPING=1":
            heard.append(manager.recv(4096).decode())
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path in ("", "relative", str(tmp_path / "absent"), "@appliance-test-absent"):
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    asyncio.run(asyncio.wait_for(beat(), 1))


def test_an_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"appliance-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name)
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        notify("READY=1", "STATUS=x")
        assert sock.recv(100) == b"READY=1\nSTATUS=x"


@pytest.mark.parametrize(("usec", "pid", "period"), [("60000000", "", 30.0), ("0", "", None), ("x", "", None), ("2", "1", None)])
def test_how_often_a_sign_of_life_is_due(monkeypatch: pytest.MonkeyPatch, usec: str, pid: str, period: float | None) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", pid)
    assert watchdog_s() == period
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_s() == (None if usec in ("0", "x") else int(usec) / 2e6)


def test_the_unit_leaves_the_time_that_the_server_takes() -> None:
    (command,) = settings("ExecStart")
    grace = float(re.search(r"--shutdown-timeout (\S+)", command)[1])  # type: ignore[index]
    (stop,) = settings("TimeoutStopSec")
    assert float(stop) >= grace + 10, "the engine's own end takes some seconds more"
    assert settings("KillMode") == ["mixed"], "SIGTERM would end the engine before its requests"
    assert settings("RestartPreventExitStatus") == ["2"] and settings("Type") == ["notify"]
    assert "keys.toml:/etc/appliance/keys.toml" in settings("LoadCredential")


def test_the_services_user_can_read_its_options() -> None:
    """The unit reads them under their own name, as a user of its own; the keys come from root."""
    (command,) = settings("ExecStart")
    assert "--config /etc/appliance/appliance.toml" in command and "${CREDENTIALS_DIRECTORY}/keys.toml" in command
    text = (ROOT / "docs/operations.md").read_text()
    assert re.findall(r"^install -d( -\S+ \S+)* /etc/appliance ", text, re.MULTILINE) == [""], (
        "a directory that only root may enter"
    )
    assert "(umask 077; /opt/appliance/bin/appliance key alice >> /etc/appliance/keys.toml)" in text


def commands() -> list[tuple[str, list[str]]]:
    """Every command line of ours in the files."""
    (unit,) = settings("ExecStart")
    found = [("unit", shlex.split(unit)[1:])]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    found.append(("compose", compose["services"]["appliance"]["command"]))
    for name in ("Containerfile", "Containerfile.cuda"):
        (line,) = re.findall(r"^CMD (\[\"serve.*)$", (DEPLOY / name).read_text(), re.MULTILINE)
        found.append((name, yaml.safe_load(line)))
    return found


@pytest.mark.parametrize(("where", "arguments"), commands(), ids=[where for where, _ in commands()])
def test_commands_are_understood(where: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    served: list[Any] = []
    monkeypatch.setattr("appliance.server.run.serve", lambda engine, server: served.append((engine, server)) or 0)
    config = tmp_path / "appliance.toml"
    config.write_text('model = "m"\n')
    assert cli.run([str(config) if argument == "/etc/appliance/appliance.toml" else argument for argument in arguments]) == 0
    (engine, server) = served[0]
    assert isinstance(engine, EngineConfig) and isinstance(server, ServerConfig)
    assert (engine.model == "m") == (where == "unit")


def test_variables_are_options() -> None:
    known = {f"APPLIANCE_{f.name.upper()}" for kind in (EngineConfig, ServerConfig) for f in fields(kind)} | {
        "APPLIANCE_CACHE_DIR"
    }
    known |= {"APPLIANCE_CPU_ISA", "APPLIANCE_OPTION_NAME"}
    for path in (*DEPLOY.iterdir(), ROOT / "docs/operations.md"):
        assert set(re.findall(r"\bAPPLIANCE_[A-Z_]+\b", path.read_text())) <= known, path.name


INSTRUCTIONS = {
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "RUN",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
}


@pytest.mark.parametrize("name", ["Containerfile", "Containerfile.cuda"])
def test_container_files(name: str) -> None:
    text = re.sub(r"^#.*\n", "", (DEPLOY / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    assert {word for word, _ in lines} <= INSTRUCTIONS and lines[0][0] == "FROM"
    order = [word for word, _ in lines]
    assert order.index("USER") < order.index("ENTRYPOINT"), "not as root"
    for word, rest in lines:
        if word == "COPY" and "--from" not in rest:
            assert (ROOT / rest.split()[0]).exists()
        if word in ("CMD", "ENTRYPOINT"):
            assert isinstance(yaml.safe_load(rest), list), "no shell between the signal and the server"
    for needed in re.findall(r"-c (\S+)", text):
        assert (ROOT / Path(needed).name).exists()
    (user,) = re.findall(r"^USER (.*)$", text, re.MULTILINE)
    assert f"--uid {user} " in text and user.isdecimal(), "a number: Kubernetes' runAsNonRoot cannot tell from a name"


@pytest.mark.parametrize("name", ["Containerfile", "Containerfile.cuda"])
def test_health_of_a_container(name: str, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # is not asked
    (line,) = re.findall(r"^    CMD (.*)$", (DEPLOY / name).read_text(), re.MULTILINE)
    (_, option, code) = yaml.safe_load(line)
    for port, status in ((served.http.base_url.port, 0), (9, 1)):
        command = [sys.executable, option, code.replace("8000", str(port))]
        assert subprocess.run(command, stderr=subprocess.DEVNULL, timeout=60, check=False).returncode == status


def test_keys_are_not_sent_to_the_builder() -> None:
    left_out = (ROOT / ".dockerignore").read_text().split("\n")
    assert "docs" in left_out, "compose.yaml has its keys there"
    kept = (DEPLOY / ".gitignore").read_text().split()
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for secret in compose["secrets"].values():
        assert any(Path(secret["file"]).match(pattern) for pattern in kept), "nor to a repository"


def test_compose_and_scrape() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    server = compose["services"]["appliance"]
    assert (DEPLOY / server["build"]["context"]).resolve() == ROOT
    assert (ROOT / server["build"]["dockerfile"]).exists()
    assert all(port.startswith("127.0.0.1:") for service in compose["services"].values() for port in service.get("ports", ()))
    assert int(server["stop_grace_period"].removesuffix("s")) >= int(server["command"][-1]) + 10
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).exists(), volume
        assert set(service.get("secrets", ())) <= compose["secrets"].keys()
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]
    secret = compose["services"]["prometheus"]["secrets"][0]
    assert scrape["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert scrape["static_configs"][0]["targets"] == ["appliance:8000"]


def test_alerts_ask_for_what_there_is() -> None:
    documented = (ROOT / "docs/operations.md").read_text()
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
    for rule in rules:
        for metric, *_ in parse(rule["expr"]):
            name = re.sub(r"_(bucket|sum|count)$", "", metric.removeprefix("appliance:"))
            assert metric in ("up", "process_start_time_seconds") or f"`{name}" in documented, metric
        assert rule["labels"]["severity"] in ("critical", "warning")
    cases = yaml.safe_load((ROOT / "tests/server/alerts.yml").read_text())["tests"]
    rings = {(one["alertname"], bool(one["exp_alerts"])) for case in cases for one in case["alert_rule_test"]}
    assert rings == {(rule["alert"], rung) for rule in rules for rung in (True, False)}, "each one rings, and is silent in calm"


NGINX = (DEPLOY / "nginx.conf").read_text()


def test_nginx_lets_streams_through() -> None:
    assert "proxy_buffering off;" in NGINX and "proxy_http_version 1.1;" in NGINX and "proxy_next_upstream off;" in NGINX
    assert f"client_max_body_size {MAX_BODY // 2**20}m;" in NGINX and NGINX.count("{") == NGINX.count("}")


def test_examples_of_the_documentation() -> None:
    """TOML that it shows is TOML, of options that there are."""
    known = {f.name for kind in (EngineConfig, ServerConfig) for f in fields(kind)}
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/operations.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        assert tomllib.loads(block).keys() <= known
