"""Models by path and by name: no network for a path; for a name a stand-in hub on loopback, asked by the real client library."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from appliance.hub import called, demo_model, resolve
from quant.errors import InputError
from tests import warm
from tests.tiny_model import Shape, config, make_checkpoint

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 49152  # 12 MiB: the client library writes 10 MiB at a time


class Hub(ThreadingHTTPServer):
    """One repository, org/tiny, as huggingface_hub sees it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {
            "config.json": json.dumps(config()).encode(),
            "tokenizer.json": b"{}",
            "model.safetensors": WEIGHTS,
            "consolidated.safetensors": b"a second copy",
            "pytorch_model.bin": b"a third copy",
            "original/model.safetensors": b"a fourth copy",
            "modeling_tiny.py": b"raise SystemExit('code from a repository is never run')",
        }
        self.calls: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.tokens: list[str | None] = []
        self.cut_after: int | None = None  # cut the next answer that is longer, once
        self.gated = False
        self.status: int | None = None  # answer everything with it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        hub.calls.append((self.command, path, self.headers.get("Range")))
        hub.tokens.append(self.headers.get("Authorization"))
        parts = path.strip("/").split("/")
        if hub.status is not None:
            self._send(hub.status, b"trouble")
        elif "org/tiny" not in path:
            self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif hub.gated and not self.headers.get("Authorization"):
            self._send(403, b'{"error": "gated"}', {"X-Error-Code": "GatedRepo"})
        elif parts[0] == "api" and "tree" in parts:
            self._json([self._entry(name, data) for name, data in hub.files.items()])
        elif parts[0] == "api":
            revision = parts[parts.index("revision") + 1] if "revision" in parts else "main"
            if revision not in ("main", COMMIT):
                self._send(404, b'{"error": "no revision"}', {"X-Error-Code": "RevisionNotFound"})
            else:
                self._json({"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files]})
        else:
            self._file("/".join(parts[parts.index("resolve") + 2 :]))

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _file(self, name: str) -> None:
        data = self.server.files[name]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, wanted = 200, self.headers.get("Range")
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            part = data[int(start) : int(end) + 1 if end else None]
            headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"
            status, data = 206, part
        cut = self.server.cut_after
        if cut is not None and self.command == "GET" and len(data) > cut:
            self.server.cut_after = None
            self._send(status, data, headers, stop_at=cut)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self._send(status, data, headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, stop_at: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:stop_at])
            self.wfile.flush()

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


RESOLVE = (
    "import sys\n"
    "from appliance.hub import resolve\n"
    "from quant.errors import InputError\n"
    "try:\n    print(resolve(sys.argv[1], sys.argv[2] or None))\n"
    "except InputError as error:\n    print('refused:', error)\n"
)
PLAN = "import sys\nfrom appliance.cli import run\nsys.exit(run(['plan', *sys.argv[1].split()]))\n"


def ask(home: Path, endpoint: str, model: str = "org/tiny", revision: str | None = None, **env: str) -> str:
    """resolve() in a process of its own, since the client library reads its settings once: the path, or the error."""
    result = python(RESOLVE, home, endpoint, model, revision or "", **env)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1, result.stdout
    return result.stdout.strip()


def python(code: str, home: Path, endpoint: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment = {**clean, **settings, "PYTHONPATH": str(ROOT), **env}
    return warm.run("-c", code, *arguments, env=environment, cwd=home, imported=warm.DOWNLOADS)


ADAPTER = (
    "org/tiny: an adapter (adapter_config.json), no model: serve its model with --lora-modules NAME=ADAPTER, "
    "or merge it into the model first"
)


def make_adapter(hub: Hub) -> None:
    """What LoRA's training publishes."""
    hub.files = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"", "tokenizer.json": b"{}"}


def test_download_only_what_is_needed(hub: Hub, tmp_path: Path) -> None:
    directory = Path(ask(tmp_path, hub.url))
    assert sorted(p.name for p in directory.rglob("*") if p.is_file()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    assert Path(ask(tmp_path, hub.url, revision=COMMIT)) == directory
    files = [path for method, path, _ in hub.calls if method == "GET" and path.endswith(".safetensors")]
    assert len(files) == 1  # the second time it was there
    assert Path(ask(tmp_path, hub.url, HF_HUB_OFFLINE="1")) == directory
    assert Path(ask(tmp_path, "http://127.0.0.1:9")) == directory  # nobody there: what is cached and complete will do


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["JambaForCausalLM"]}, "architecture JambaForCausalLM is not supported"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    ],
)
def test_weights_of_a_model_that_is_refused_are_not_fetched(
    hub: Hub, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    hub.files["config.json"] = json.dumps({**config(), **changes}).encode()
    assert words in ask(tmp_path, hub.url)
    assert not [path for _, path, _ in hub.calls if path.endswith(".safetensors")]


def test_a_tokenizer_comes_without_weights(hub: Hub, tmp_path: Path) -> None:
    hub.files["config.json"] = b'{"architectures": ["JambaForCausalLM"]}'
    code = "from appliance.hub import resolve\nprint(resolve('org/tiny', weights=False))"
    directory = Path(python(code, tmp_path, hub.url).stdout.strip())
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "tokenizer.json"]


def test_a_cut_download_is_resumed(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after = 11 << 20
    directory = Path(ask(tmp_path, hub.url))
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [found for method, path, found in hub.calls if method == "GET" and path.endswith("model.safetensors") and found]
    assert ranges == [f"bytes={10 << 20}-"]


def test_token_opens_a_gated_model(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    refused = ask(tmp_path, hub.url)
    assert (
        refused
        == f"refused: org/tiny is gated: accept its terms at {hub.url}/org/tiny and set HF_TOKEN to a token of that account"
    )
    assert Path(ask(tmp_path, hub.url, HF_TOKEN="hf_x")).is_dir() and hub.tokens[-1] == "Bearer hf_x"


def test_refusals(hub: Hub, tmp_path: Path) -> None:
    other = ask(tmp_path, hub.url, "org/other")
    assert other.startswith(
        f"refused: there is no directory org/other here, and no model of that name on {hub.url}: check the name"
    )
    assert ask(tmp_path, hub.url, revision="v9") == "refused: org/tiny has no revision 'v9': check --revision"
    offline = ask(tmp_path, hub.url, HF_HUB_OFFLINE="1")
    assert (
        offline.startswith("refused: there is no directory org/tiny here, and it is not complete in ")
        and "HF_HUB_OFFLINE is set" in offline
    )
    nobody = ask(tmp_path, "http://127.0.0.1:9")
    assert nobody.startswith(
        "refused: there is no directory org/tiny here, and it could not be downloaded from http://127.0.0.1:9: "
    )
    assert "refused" in nobody[9:]
    del hub.files["model.safetensors"], hub.files["consolidated.safetensors"]
    hub.files.pop("original/model.safetensors")
    assert "org/tiny has no .safetensors file" in ask(tmp_path, hub.url)
    make_adapter(hub)
    (tmp_path / "new").mkdir()
    assert ask(tmp_path / "new", hub.url) == f"refused: {ADAPTER}"


def test_of_an_adapter_comes_what_peft_has_written(hub: Hub, tmp_path: Path) -> None:
    make_adapter(hub)
    hub.files["adapter_model.safetensors"] = WEIGHTS
    code = (
        "import sys\n"
        "from appliance.config import EngineConfig\n"
        "from appliance.hub import with_adapters\n"
        "config = EngineConfig(lora_modules=('a=org/tiny', 'b=here'))\n"
        "for weights in (False, True):\n    print(*with_adapters(config, weights=weights).lora_modules)\n"
    )
    (tmp_path / "here").mkdir()
    found = python(code, tmp_path, hub.url)
    lines = found.stdout.splitlines()
    assert found.returncode == 0 and len(lines) == 2 and lines[0] == lines[1], found.stderr
    hubs, local = (one.partition("=")[2] for one in lines[0].split())
    assert sorted(path.name for path in Path(hubs).iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert local == str(tmp_path / "here"), "a whole path"
    fetched = [path.rpartition("/")[2] for method, path, _ in hub.calls if method == "GET" and "/resolve/" in path]
    assert fetched == ["adapter_config.json", "adapter_model.safetensors"], "a plan reads the first alone"


def test_server_trouble(hub: Hub, tmp_path: Path) -> None:
    hub.status = 401
    assert "org/tiny" in ask(tmp_path, hub.url)
    hub.status = 418
    assert f"org/tiny: {hub.url} answered with HTTP status 418" in ask(tmp_path, hub.url)


def test_disk_full(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*args: Any, **kwargs: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(InputError, match=r"^org/tiny: the disk is full; make room in .*, or set HF_HOME"):
        resolve("org/tiny")


def test_a_path_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve("org/model") == Path("org/model")
    for name in ("./nothing", "/nothing/here", "org/other", "a/b/c", "~/no-such-model", "..\\x"):
        with pytest.raises(InputError, match=r"^no such directory: "):
            resolve(name)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for name in ("model.gguf", "./elsewhere/model.GGUF"):
        with pytest.raises(
            InputError, match=r"(?i)model\.gguf: GGUF is not supported: take the AWQ, GPTQ or original safetensors"
        ):
            resolve(name)
    (tmp_path / "model.pt").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"model\.pt is a file: name the directory"):
        resolve("model.pt")
    for name in ("", "a b", "org/mo?del", "ü", "a b " * 100):
        with pytest.raises(InputError, match=r"neither a directory nor a name|no such"):
            resolve(name)


def test_the_embedded_model_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a directory may have as well, and then means that."""
    monkeypatch.chdir(tmp_path)
    assert resolve("demo") == demo_model()
    (tmp_path / "demo").mkdir()
    assert resolve("demo") == Path("demo")


def test_the_address_of_a_models_page_is_its_name(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for begin in ("https://huggingface.co/", "http://huggingface.co/", "huggingface.co/", "hf.co/", "https://hf.co/"):
        assert {called(f"{begin}org/tiny-1.5B{end}") for end in ("", "/", "/tree/main")} == {"org/tiny-1.5B"}
    for other in ("org/tiny", "https://example.org/org/tiny", "hf.co/tiny", "https://huggingface.co/org/tiny/tree/v2"):
        assert called(other) == other
    assert ask(tmp_path, hub.url, "https://huggingface.co/org/tiny") == ask(tmp_path, hub.url)
    (tmp_path / "hf.co" / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("hf.co/org/tiny") == Path("hf.co/org/tiny")


@pytest.mark.parametrize("name", ["model.safetensors", "gptq_model-4bit-32g.safetensors"])
def test_a_plan_reads_headers_alone(hub: Hub, tmp_path: Path, name: str) -> None:
    """33 MiB of weights stay on the hub, and the plan is that of the files."""
    here = make_checkpoint(tmp_path / "here", shape=Shape(hidden=512, vocab=16384, layers=1), tokenizer=False)
    (here / "model.safetensors").rename(here / name)
    del hub.files["model.safetensors"]
    hub.files |= {path.name: path.read_bytes() for path in here.iterdir()}
    line = "{} --gpu 4090 --json"
    planned = python(PLAN, tmp_path, hub.url, line.format("org/tiny"))
    assert planned.returncode == 0, planned.stderr
    local = python(PLAN, tmp_path, "http://127.0.0.1:9", line.format(here))
    assert {**json.loads(planned.stdout), "model": ""} == {**json.loads(local.stdout), "model": ""}
    assert json.loads(planned.stdout)["model"] == "org/tiny"
    weights = [found for method, path, found in hub.calls if method == "GET" and path.endswith(".safetensors")]
    assert weights == ["bytes=0-100000"]
    assert not any(path.endswith(("tokenizer.json", ".py", ".bin")) for _, path, _ in hub.calls)


def test_a_plan_of_what_was_downloaded_asks_nobody(hub: Hub, tmp_path: Path) -> None:
    here = make_checkpoint(tmp_path / "here", tokenizer=False)
    hub.files |= {path.name: path.read_bytes() for path in here.iterdir()}
    ask(tmp_path, hub.url)
    hub.calls.clear()
    assert python(PLAN, tmp_path, hub.url, "org/tiny").returncode == 0 and not hub.calls


def test_plans_that_the_hub_refuses(hub: Hub, tmp_path: Path) -> None:
    def refusal(model: str = "org/tiny", **env: str) -> str:
        result = python(PLAN, tmp_path, hub.url, model, **env)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and not result.stdout, result.stderr
        return result.stderr

    assert "there is no directory org/other here, and no model of that name on" in refusal("org/other")
    assert "has no revision 'v9'" in refusal("org/tiny --revision v9")
    assert "HF_HUB_OFFLINE is set" in refusal(HF_HUB_OFFLINE="1")
    hub.gated = True
    assert "org/tiny is gated" in refusal()
    hub.gated = False
    assert "org/tiny is damaged on" in refusal()  # its weights are none
    for name in [name for name in hub.files if name.endswith(".safetensors")]:
        del hub.files[name]
    assert "org/tiny has no .safetensors file" in refusal()
    make_adapter(hub)
    assert refusal() == f"appliance: error: {ADAPTER}\n"
