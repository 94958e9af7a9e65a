"""The files of docs/deploy, given to the programs that read them, where those are installed: systemd, Prometheus' tool, nginx."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from appliance.config import EngineConfig, ServerConfig
from appliance.server.respond import MAX_BODY
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import serve_in_thread
from tests.server.fake import FakeClient
from tests.server.test_deploy import DEPLOY, NGINX, ROOT, UNIT
from tests.server.test_lifecycle import eventually


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not there")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "appliance.service"
    unit.write_text(UNIT.replace("/opt/appliance/bin/appliance", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False)
    words = done.stdout + done.stderr
    if "Failed to" in words and "appliance.service" not in words:
        pytest.skip(words)  # no system to be verified against, as in some containers
    assert done.returncode == 0 and "appliance.service" not in words, words
    (tmp_path / "appliance.service").write_text(UNIT.replace("Restart=on-failure", "Restart=of-failure"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False)
    assert "of-failure" in done.stdout + done.stderr, "what is wrong would be seen"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not there")
def test_alerts_ring_when_they_should(tmp_path: Path) -> None:
    """Prometheus' own tool, over an hour of made-up scrapes. Without it, the same rules have rung for a real Prometheus."""
    cases = tmp_path / "alerts.yml"
    cases.write_text((ROOT / "tests/server/alerts.yml").read_text().replace("{{RULES}}", str(DEPLOY / "alerts.yml")))
    for command in (["check", "rules", str(DEPLOY / "alerts.yml")], ["test", "rules", str(cases)]):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def proxied(tmp_path: Path, tokenizer: Tokenizer, model_dir: Path) -> Iterator[httpx.Client]:
    """A client that reaches a server through a real nginx, with the file as it is but for paths and ports."""
    config = ServerConfig(forwarded_allow_ips=("127.0.0.1",), audit_log=str(tmp_path / "audit.jsonl"))
    with (
        serve_in_thread(lambda: FakeClient(delay_s=0.05), tokenizer, EngineConfig(model=str(model_dir)), config) as served,
        socket.socket() as spare,
    ):
        spare.bind(("127.0.0.1", 0))
        port = spare.getsockname()[1]
        make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
        files = ["-keyout", str(tmp_path / "llm.example.key"), "-out", str(tmp_path / "llm.example.pem")]
        subprocess.run([*make, *files], check=True, capture_output=True, timeout=60)
        site = NGINX.replace("127.0.0.1:8000", f"127.0.0.1:{served.http.base_url.port}").replace("/etc/ssl", str(tmp_path))
        temporary = "".join(f"{kind}_temp_path {tmp_path};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}\n"
            f"http {{ access_log off; {temporary} {site.replace('listen 443 ssl', f'listen 127.0.0.1:{port} ssl')} }}"
        )
        spare.close()
        process = subprocess.Popen(["nginx", "-c", str(tmp_path / "nginx.conf")], stderr=subprocess.PIPE, text=True)
        try:
            source = httpx.HTTPTransport(local_address="127.0.0.77", verify=False)
            with httpx.Client(base_url=f"https://127.0.0.1:{port}", transport=source, headers={"Host": "localhost"}) as client:
                eventually(lambda: process.poll() is not None or can_connect(port))
                assert process.poll() is None, process.stderr and process.stderr.read()
                yield client
        finally:
            process.terminate()
            process.wait(20)


def can_connect(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.skipif(shutil.which("nginx") is None or shutil.which("openssl") is None, reason="nginx is not there")
def test_a_real_nginx(proxied: httpx.Client, tmp_path: Path) -> None:
    for path in ("/metrics", "/metrics/", "//metrics", "/stats/", "/logs//", "/logs?after=1", "/v1/../logs", "/%6detrics"):
        answer = proxied.get(str(proxied.base_url).rstrip("/") + path)
        assert answer.status_code == 404 and "nginx" in answer.text, f"{path} stays inside"
    body = {"prompt": "a", "max_tokens": 9, "stream": True}
    with proxied.stream(
        "POST", "/v1/completions", json=body, headers={"X-Request-Id": "mine", "X-Forwarded-For": "6.6.6.6"}
    ) as stream:
        assert stream.headers["x-request-id"] == "mine", "by which it can be aborted"
        assert len(list(stream.iter_raw())) > 2, "tokens as they come"
    eventually(lambda: '"mine"' in (tmp_path / "audit.jsonl").read_text())
    assert '"client":"127.0.0.77"' in (tmp_path / "audit.jsonl").read_text(), "who asked, not who says so"
    assert proxied.post("/v1/completions", content=b" " * (MAX_BODY + 1)).status_code == 413
