"""The log: its forms, a line for each request, the engine's lines, the latest ones over HTTP, and no keys anywhere."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from appliance.config import EngineConfig, ServerConfig
from appliance.runtime.logs import take_line, take_lines
from appliance.server import logs
from appliance.server.errors import about
from appliance.server.keys import Keyring
from appliance.server.redact import hide, is_key
from appliance.text.tokenizer import Tokenizer
from quant.errors import InputError
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient
from tests.server.test_lifecycle import eventually

KEY = "sesame/open+me=42"  # a key of somebody's own making, with characters that stand between words


class Log(logging.Handler):
    """Keeps what a formatter makes of every record."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def log() -> Iterator[Log]:
    """What the servers of this process log, as JSON."""
    handler, root = Log(logs.Json()), logging.getLogger("appliance")
    before = root.level
    root.setLevel("DEBUG")
    root.addHandler(handler)
    yield handler
    root.removeHandler(handler)
    root.setLevel(before)


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> Iterator[logs.Ring]:
    """An empty one, which takes the lines of this process."""
    ring, root = logs.Ring(), logging.getLogger("appliance")
    monkeypatch.setattr(logs, "RING", ring)
    root.addHandler(ring)
    yield ring
    root.removeHandler(ring)


def record(message: str, *args: Any, level: int = logging.INFO, exc_info: Any = None) -> logging.LogRecord:
    return logging.LogRecord("appliance.test", level, "file.py", 1, message, args, exc_info)


def failure() -> Any:
    try:
        raise ValueError("Bearer hidden-in-a-message")
    except ValueError:
        return sys.exc_info()


def test_text_has_time_level_logger_and_the_request() -> None:
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO appliance\.test: 7 bits", logs.Text().format(record("%d bits", 7))
    )
    token = about.set({"request_id": "abc"})
    try:
        assert logs.Text().format(record("x")).endswith("appliance.test: x [abc]")
        assert json.loads(logs.Json().format(record("x")))["request_id"] == "abc"
    finally:
        about.reset(token)
    text = logs.Text().format(record("it failed", exc_info=failure()))
    assert "Traceback" in text and "Bearer ***" in text and "hidden" not in text


def test_json_is_one_line_whatever_is_in_it() -> None:
    line = logs.Json().format(record('two\nlines, "quoted" \u2028 and \ud800', exc_info=failure(), level=logging.ERROR))
    told = json.loads(line)
    assert "\n" not in line and told["level"] == "error" and told["logger"] == "appliance.test"
    assert told["message"].startswith('two\nlines, "quoted"') and "Traceback" in told["exception"] and "hidden" not in line
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", told["time"])


@pytest.mark.parametrize("format", ["yaml", ""])
def test_unknown_formats_and_levels_are_refused(format: str) -> None:
    with pytest.raises(InputError, match="--log-format is one of text, json"):
        logs.setup(ServerConfig(log_format=format))
    with pytest.raises(InputError, match="--log-level is one of debug"):
        logs.setup(ServerConfig(log_level="loud"))


def test_a_line_for_each_request(served: Served, log: Log) -> None:
    with served.http as http:
        http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 4, "n": 2}, headers={"X-Request-Id": "mine"})
        http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "stream": True})
        http.post("/v1/completions", json={"prompt": "abc", "top_p": 7}, headers={"X-Request-Id": "bad"})
        http.get("/health")
        http.get("/nowhere%0aforged%20line?api_key=abcdefgh")
    eventually(lambda: sum('"appliance.requests"' in line for line in log.lines) == 5)  # a line comes after its answer
    told = {record["endpoint"] + str(record["status"]): record for record in map(json.loads, log.lines) if "endpoint" in record}
    first, bad = told["POST /v1/completions200"], told["POST /v1/completions400"]
    chat, health = told["POST /v1/chat/completions200"], told["GET /health200"]
    nowhere = told["GET /nowhere?forged line404"]
    assert first["level"] == "info" and first["request_id"] == "mine" and first["status"] == 200
    assert first["message"].startswith("POST /v1/completions 200, ") and first["message"].endswith("tiny, 4+8 tokens, length")
    assert (first["prompt_tokens"], first["generated_tokens"], first["finish_reasons"]) == (4, 8, ["length", "length"])
    assert first["model"] == "tiny" and first["key"] is None and 0 < first["latency_s"] < 5
    assert chat["endpoint"] == "POST /v1/chat/completions" and chat["generated_tokens"] == 2 and len(chat["request_id"]) == 32
    assert 0 < first["first_token_s"] <= first["latency_s"] and bad["first_token_s"] is None
    assert bad["status"] == 400 and bad["request_id"] == "bad" and bad["level"] == "info" and bad["generated_tokens"] == 0
    assert bad["message"].startswith("POST /v1/completions 400 invalid_request_error (top_p), ")
    assert (bad["error_code"], bad["error_param"]) == ("invalid_request_error", "top_p") and "error_code" not in first
    assert health["level"] == "debug", "what load balancers ask all the time is not worth a line"
    assert "abcdefgh" not in str(nowhere)


def test_the_line_can_be_left_out(tokenizer: Tokenizer, model_dir: Path, log: Log) -> None:
    server = ServerConfig(enable_log_requests=False)
    with serve_in_thread(FakeClient, tokenizer, EngineConfig(model=str(model_dir)), server) as served:
        assert served.post("/v1/completions", prompt="abc").status_code == 200
    assert not [line for line in log.lines if '"appliance.requests"' in line]


def test_the_latest_lines(served: Served, ring: logs.Ring) -> None:
    logger = logging.getLogger("appliance.test")
    for k in range(logs.KEPT + 5):
        logger.warning("line %d", k)
    logger.error("the last one", exc_info=failure())
    with served.http as http:
        told = http.get("/logs").json()
        assert len(told["lines"]) == logs.KEPT and told["next"] == told["lines"][-1]["seq"] == logs.KEPT + 6
        last = told["lines"][-1]
        assert set(last) == {"seq", "time", "level", "logger", "message"} and last["level"] == "error"
        assert last["message"].startswith("the last one\nTraceback") and "hidden" not in last["message"]
        assert [line["seq"] for line in told["lines"]] == list(range(7, logs.KEPT + 7))
        assert http.get("/logs", params={"after": told["next"]}).json() == {"lines": [], "next": told["next"]}
        logger.warning("news")
        news = http.get("/logs", params={"after": told["next"]}).json()
        assert [line["message"] for line in news["lines"]] == ["news"] and news["next"] == told["next"] + 1
        assert len(http.get("/logs", params={"after": 10**6}).json()["lines"]) == logs.KEPT, "the server was started again"
        assert http.get("/logs", params={"after": "x"}).status_code == 400


def test_a_long_line_is_cut_in_the_ring(ring: logs.Ring) -> None:
    logging.getLogger("appliance.test").warning("x" * 100_000)
    assert len(ring.after(0)[0]["message"]) == logs.LONGEST


CHILD = """
import logging, os, sys, threading
from appliance.runtime.logs import send_lines
send_lines(logging.INFO)
log = logging.getLogger("appliance.engine")
log.info("loaded %s", "a model")
log.debug("not asked for")
os.write(2, b"what a library prints\\n")
def work(name):
    for k in range(200):
        log.warning("%s %d", name, k)
threads = [threading.Thread(target=work, args=(f"thread {k}",)) for k in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
try:
    raise RuntimeError("deep down")
except RuntimeError:
    log.exception("step failed")
raise SystemExit("dying words")
"""


def test_lines_of_the_engine_process_are_lines_of_the_server(log: Log) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD], stderr=subprocess.PIPE)
    assert child.stderr is not None
    reader = threading.Thread(target=take_lines, args=(child.stderr,))
    reader.start()
    child.wait(20)
    reader.join(20)
    told = [line for line in map(json.loads, log.lines) if line["logger"].startswith("appliance.engine")]
    assert told[0] | {"time": ""} == {"time": "", "level": "info", "logger": "appliance.engine", "message": "loaded a model"}
    assert told[1]["logger"] == "appliance.engine.stderr" and told[1]["message"] == "what a library prints"
    threads = [line["message"] for line in told if line["message"].startswith("thread")]
    assert sorted(threads) == sorted(f"thread {k} {i}" for k in range(4) for i in range(200))
    assert told[-2]["message"] == "step failed" and "RuntimeError: deep down" in told[-2]["exception"]
    assert told[-1]["message"] == "dying words"


def test_torn_and_foreign_lines_are_kept(log: Log) -> None:
    for raw in (b'\x1e{"name": "appliance.x", "le', b"\x1e{}\n", b"\xff\xfe binary\n", b"\n", b"  \n"):
        take_line(raw)
    messages = [json.loads(line)["message"] for line in log.lines]
    assert messages[0] == '\x1e{"name": "appliance.x", "le' and messages[-1].endswith("binary") and len(messages) <= 3


def test_keys_are_hidden_wherever_they_stand() -> None:
    ring = Keyring((KEY, "plain-key-of-mine"))
    assert is_key(KEY) and not is_key("plain-key-of")
    for text in (
        f"GET /{KEY}",
        f"/v1/{KEY}/models",
        f"?api_key={KEY}&x=1",
        f"'{KEY}'",
        f"key={KEY}",
        "user:plain-key-of-mine@host",
        f"foo_{KEY}",
        f"{KEY}s",
        f"the field x{KEY}-{KEY}.plain-key-of-mineplain-key-of-mine",
    ):
        assert KEY not in hide(text) and "plain-key-of-mine" not in hide(text), text
    assert hide("Authorization: Bearer abc.def") == "Authorization: Bearer ***"
    assert hide("with sk-proj-0123456789abcdefghij and hf_ABCDEFGHIJKLMNOPQRST!") == "with *** and ***!"
    assert hide("the task is done; a risk-free sk-short word") == "the task is done; a risk-free sk-short word"
    within = Keyring(("of-mine", "secret-of-mine-1"))
    assert hide("a secret-of-mine-1b of-mine2") == "a ***b ***2"
    odd = Keyring(('"[quo\\ted]"{key}', "a=b/c?d&e:f@g,h;key"))
    for key in ('"[quo\\ted]"{key}', "a=b/c?d&e:f@g,h;key"):
        assert key not in hide(f"GET /{key}/x?y=({key})") and json.dumps(key)[1:-1] not in logs.Json().format(
            record("%s", f"<{key}>")
        )
    assert len(hide("/".join("abcdefgh" for _ in range(5000)))) == 9 * 5000 - 1, "long lines take their time, but not for ever"
    del ring, odd, within


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The command itself with the demo model, a key, JSON lines at debug, and an audit log; asked in every way, then stopped."""
    folder = tmp_path_factory.mktemp("real")
    command = [sys.executable, "-m", "appliance", "serve", "--port", "0", "--log-format", "json", "--log-level", "debug"]
    command += ["--api-key", KEY, "--audit-log", str(folder / "audit")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = io.BytesIO(), io.BytesIO()
    pairs = ((process.stdout, out), (process.stderr, err))
    readers = [threading.Thread(target=lambda pipe=pipe, to=to: to.writelines(pipe), daemon=True) for pipe, to in pairs]
    for reader in readers:
        reader.start()
    try:
        eventually(lambda: b"ready at" in err.getvalue() or process.poll() is not None, 60)
        found = re.search(rb"ready at (http://[\d.:]+)/v1", err.getvalue())
        assert found, err.getvalue()
        with httpx.Client(base_url=found[1].decode(), timeout=30, trust_env=False) as http:
            answers = ask_in_every_way(http)
            good = {"Authorization": f"Bearer {KEY}"}
            shown = {path: http.get(path, headers=good).text for path in ("/stats", "/logs", "/metrics")}
    finally:
        process.terminate()
        process.wait(20)
        for reader in readers:
            reader.join(5)
    yield {
        "answers": answers,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "shown": shown,
        "audit": (folder / "audit").read_text(),
    }


def ask_in_every_way(http: httpx.Client) -> list[httpx.Response]:
    good, body = {"Authorization": f"Bearer {KEY}"}, {"prompt": "hi", "max_tokens": 3}
    basic = base64.b64encode(f"user:{KEY}".encode()).decode()
    headers: list[dict[str, str]] = [good, {"x-api-key": KEY}, {"api-key": KEY}, {"Authorization": f"Basic {basic}"}]
    headers += [{"Authorization": KEY}, {"Cookie": f"key={KEY}"}, {"Authorization": f"bearer  {KEY}"}]
    headers += [{**good, "X-Request-Id": KEY}, {**good, "User-Agent": KEY}]
    answers = [http.post("/v1/completions", json=body, headers=more) for more in headers]
    more_bodies: list[dict[str, Any]] = [
        {"user": KEY},
        {"api_key": KEY},
        {KEY: 1},
        {"request_id": KEY},
        {"model": KEY},
        {"top_p": KEY},
    ]
    answers += [http.post("/v1/completions", json={**body, **more}, headers=good) for more in more_bodies]
    answers += [http.get(f"/v1/models?api_key={KEY}&key={KEY}"), http.get(f"/{KEY}"), http.get(f"/v1/{KEY}/models", headers=good)]
    answers += [http.delete(f"/v1/requests/{KEY}", headers=good), http.request("BREW", f"/{KEY}", headers=good)]
    answers.append(http.post("/v1/completions", content=b"{" + KEY.encode(), headers=good))
    return answers


def test_keys_are_in_no_log_and_no_answer_about_the_server(real: dict[str, Any]) -> None:
    statuses = {answer.status_code for answer in real["answers"]}
    assert statuses >= {200, 400, 401, 404}
    places = {"stderr": real["err"].decode(), "stdout": real["out"].decode(), "audit": real["audit"], **real["shown"]}
    encoded = base64.b64encode(f"user:{KEY}".encode()).decode()
    for where, text in places.items():
        assert KEY not in text and encoded not in text, where
        assert "sesame" not in text, f"{where} has a part of it"
    assert places["stderr"].count("***") > 3 and "***" in places["audit"], "they were there to be hidden"


def test_every_line_is_json_those_of_uvicorn_and_of_the_engine_too(real: dict[str, Any]) -> None:
    assert real["out"] == b""
    told = [json.loads(line) for line in real["err"].splitlines()]
    assert told[-1]["message"] and [line for line in told if "again to stop at once" in line["message"]]
    assert {"time", "level", "logger", "message"} <= set.intersection(*(set(line) for line in told))
    assert {"appliance.server", "appliance.engine", "appliance.requests", "uvicorn.error"} <= {line["logger"] for line in told}
    assert not [line for line in told if line["logger"] == "appliance.engine.stderr"], "what the engine logs comes as it is"


def test_an_id_goes_from_end_to_end(real: dict[str, Any]) -> None:
    first = real["answers"][0]
    name = first.headers["x-request-id"]
    assert name in first.json()["id"]
    (line,) = [line for line in map(json.loads, real["audit"].splitlines()) if line["request_id"] == name]
    assert line["generated_tokens"] == first.json()["usage"]["completion_tokens"]
    assert [
        line
        for line in real["err"].decode().splitlines()
        if f'"request_id": "{name}"' in line and "POST /v1/completions 200" in line
    ]
    assert f"[{name}]" in real["shown"]["/logs"]
