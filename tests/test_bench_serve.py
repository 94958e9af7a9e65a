"""appliance bench serve against servers: its figures are theirs, and no failure is lost."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.bench.http import Target
from appliance.bench.load import Asker, run
from appliance.bench.outcome import Outcome
from appliance.bench.results import summary
from appliance.bench.samples import Sample
from appliance.bench.serve import serve
from appliance.cli import run as command
from appliance.config import BenchConfig, EngineConfig, ServerConfig
from appliance.text.tokenizer import Tokenizer
from quant.errors import InputError
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient
from tests.tiny_model import write_tokenizer


def piece(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, **more}]}


def sse(*events: Any, done: bool = True) -> bytes:
    lines = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    return b"".join(lines) + (b"data: [DONE]\n\n" if done else b"")


def some(count: int) -> list[Sample]:
    return [Sample("x", 1) for _ in range(count)]


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunked(*parts: bytes) -> bytes:
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n"


def status(code: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d Nope\r\nContent-Length: %d\r\n\r\n%b" % (code, len(body), body)


GOOD = sse(piece("a"), piece("b", finish_reason="stop"))
REPLIES: list[tuple[bytes, str | None]] = [
    (chunked(GOOD[:30], GOOD[30:31], GOOD[31:]), None),
    (b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Content-Length: %d\r\n\r\n" % len(GOOD) + GOOD, None),
    (HEAD + b"Connection: close\r\n\r\n" + GOOD, None),
    (chunked(sse(piece("a", finish_reason="stop"), done=False)), None),
    (status(503, b'{"error": {"message": "full", "code": "server_overloaded"}}'), "HTTP 503 server_overloaded"),
    (status(429, b'{"error": {"message": "slow", "type": "rate_limit_error", "code": null}}'), "HTTP 429 rate_limit_error"),
    (status(400, b'{"object": "error", "message": "bad", "type": "BadRequestError", "code": 400}'), "HTTP 400 BadRequestError"),
    (status(502, b"<html>"), "HTTP 502"),
    (chunked(GOOD)[:-40], "the connection was closed in the middle of an answer"),
    (b"", "the connection was closed before an answer"),
    (b"SSH-2.0-x\r\n\r\n", "an answer that is not HTTP"),
    (chunked(sse(piece("a"), {"error": {"code": "engine_error"}})), "error in the stream: engine_error"),
    (chunked(sse(piece("a"), done=False)), "the stream ended early"),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "a chunk's size is b'zz'"),
]


@asynccontextmanager
async def rude(replies: list[bytes | None]) -> Any:
    """Answers request ``i`` with these bytes in pieces of seven, or never (None), and ends the connection."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
            reply = replies[int(head.split(b"x-request-id: t")[1].split(b"\r\n")[0])]
            if reply is None:
                return await asyncio.sleep(60)
            for at in range(0, len(reply), 7):
                writer.write(reply[at : at + 7])
                await writer.drain()
                await asyncio.sleep(0)
        finally:
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def asker(url: str, **more: Any) -> Asker:
    return Asker(Target(url, {}), BenchConfig(request_id_prefix="t", **more), "m")


async def test_every_failure_is_told_by_its_kind() -> None:
    replies: list[bytes | None] = [reply for reply, _ in REPLIES]
    async with rude(replies) as url:
        count = len(replies)
        found = await run(asker(url), some(count), [0.0] * count, asyncio.Event(), lambda: None)
    async with rude([None]) as url:  # by itself: on a busy machine others would take as long
        late = await run(asker(url, request_timeout=0.5), some(1), [0.0], asyncio.Event(), lambda: None)
    assert [one.error for one in found.outcomes] == [kind for _, kind in REPLIES]
    assert [one.error for one in late.outcomes] == ["timed out"]
    told = summary(found, BenchConfig())
    assert told["failed"] == sum(told["errors_by_kind"].values()) == count - 4
    assert all(one.end for one in (*found.outcomes, *late.outcomes))


async def test_nobody_there() -> None:
    found = await run(asker("http://127.0.0.1:9"), some(2), [0.0, 0.0], asyncio.Event(), lambda: None)
    assert [one.error for one in found.outcomes] == ["no connection: connection refused"] * 2


async def test_times_count_from_when_a_request_should_have_begun() -> None:
    async with rude([chunked(GOOD)] * 20) as url:
        times = [0.001 * i for i in range(20)]
        found = await run(asker(url, max_concurrency=1), some(20), times, asyncio.Event(), lambda: None)
    assert [one.intended - found.begun for one in found.outcomes] == pytest.approx(times)
    for one, after in zip(found.outcomes, found.outcomes[1:]):
        assert one.ok
        assert after.sent >= one.end  # it had to wait for its place,
        assert after.e2e >= one.end - after.intended  # and its latency says so
    assert summary(found, BenchConfig())["max_concurrent_requests"] == 1


async def test_what_is_cut_off_is_told() -> None:
    stop, done = asyncio.Event(), []

    def first_is_done() -> None:
        done.append(1)
        asyncio.get_running_loop().call_later(0.3, stop.set)  # the second one has begun by then

    async with rude([chunked(GOOD), None, None]) as url:
        found = await run(asker(url), some(3), [0.0, 0.01, 60.0], stop, first_is_done)
    assert found.cut
    assert [one.error for one in found.outcomes] == [None, "cut off", "never sent"]
    assert summary(found, BenchConfig())["completed"] == len(done) == 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("tiny")
    write_tokenizer(directory)
    engine, server = EngineConfig(model=str(directory)), ServerConfig(served_model_name=("tiny",), api_key=("secret",))
    with serve_in_thread(lambda: FakeClient(delay_s=0.001), Tokenizer.load(directory), engine, server) as one:
        yield one


def metric(served: Served, name: str) -> float:
    with served.http as http:
        text = http.get("/metrics", headers={"Authorization": "Bearer secret"}).text
    return float(next(line for line in text.splitlines() if line.startswith(f"appliance:{name}{{")).split()[-1])


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_figures_agree_with_the_servers_own(
    tiny: Served, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latencies = ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds")
    names = [f"{latency}_{what}" for latency in latencies for what in ("count", "sum")]
    config = BenchConfig(
        base_url=tiny.url, backend=backend, api_key="secret", num_prompts=30, max_concurrency=8, random_input_len=12,
        random_output_len=9, ignore_eos=True, json=str(tmp_path / "r.json"), svg=str(tmp_path / "r.svg"), save_detailed=True,
        num_warmups=0, disable_tqdm=True, metadata=("run=7",),
    )  # fmt: skip
    for _ in range(3):  # in one of three times: what a busy machine takes away may lie between the two, too
        before = {name: metric(tiny, name) for name in [*names, "request_generation_tokens_sum"]}
        assert serve(config) == 0
        found = json.loads((tmp_path / "r.json").read_text())
        ours = {name: metric(tiny, name) - before[name] for name in before}
        kinds = (("ttft", "time_to_first_token"), ("e2el", "e2e_request_latency"))
        both = [(1e3 * ours[f"{theirs}_seconds_sum"] / 30, found[f"mean_{name}_ms"]) for name, theirs in kinds]
        if near := all(mean <= seen <= 3 * mean + 100 for mean, seen in both):  # the client sees it later
            break
    assert near, both
    assert found["completed"] == ours["time_to_first_token_seconds_count"] == ours["e2e_request_latency_seconds_count"] == 30
    assert found["total_output_tokens"] == ours["request_generation_tokens_sum"] == 270
    assert ours["inter_token_latency_seconds_count"] == 240
    if backend == "openai":  # in chat, tokens without text are in no chunk
        assert sum(map(len, found["itls"])) == 240
    assert found["model_id"] == "tiny"
    assert found["run"] == "7"
    assert "secret" not in (tmp_path / "r.json").read_text()
    drawn = ElementTree.parse(tmp_path / "r.svg").getroot()
    assert len(drawn.findall("{http://www.w3.org/2000/svg}polyline")) >= 7
    shown = capsys.readouterr().out
    assert "first token (TTFT)" in shown
    assert "30" in shown


def test_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They have no tokens to wait for, only an end."""
    write_tokenizer(tmp_path)
    engine, file = EngineConfig(model=str(tmp_path), runner="pooling"), tmp_path / "r.json"
    server, tokenizer = ServerConfig(served_model_name=("tiny",)), Tokenizer.load(tmp_path)
    with serve_in_thread(lambda: FakeClient(delay_s=0.01), tokenizer, engine, server) as one:
        config = BenchConfig(
            base_url=one.url, backend="openai-embeddings", num_prompts=12, max_concurrency=3, random_input_len=9,
            disable_tqdm=True, num_warmups=1, json=str(file), svg=str(tmp_path / "r.svg"), goodput=("e2el:60000",),
        )  # fmt: skip
        assert serve(config) == 0
        assert all(len(submit.prompt_token_ids) == 9 and submit.pooling for submit in one.client.submitted)
        with pytest.raises(InputError, match="a prompt of the data set is a conversation"):
            Asker(Target(one.url, {}), config, "tiny").body(Sample([{"role": "user", "content": "x"}], None, None))
        one.client.fail_at = 0
        assert serve(replace(config, num_warmups=0, json=None, svg=None)) == 1
    found = json.loads(file.read_text())
    assert (found["completed"], found["total_input_tokens"], found["total_output_tokens"], found["short_answers"]) == (
        12,
        108,
        0,
        0,
    )
    assert found["median_ttft_ms"] is None and found["median_e2el_ms"] >= 10 and found["tokens_counted_by_server"]
    assert found["request_goodput"] == found["request_throughput"]
    shown = capsys.readouterr().out
    assert "end to end (E2EL)" in shown and "TTFT" not in shown and "failed: 12 x HTTP 500 engine_error" in shown


@pytest.mark.parametrize("body", [b"", b"[]", b'{"data": [{}]}', b'{"data": [{"embedding": []}]}'])
def test_answers_that_are_no_embeddings(body: bytes) -> None:
    one = Outcome(0)
    one.embedded(body, 1.0)
    assert one.error in ("an answer without embeddings", "an empty embedding")


def test_a_wrong_key_is_told_at_once(tiny: Served) -> None:
    with pytest.raises(InputError, match="--api-key"):
        serve(BenchConfig(base_url=tiny.url, api_key="wrong", disable_tqdm=True))


def test_results_of_several_runs_go_into_one_file(tiny: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    more = ["--num-prompts", "2", "--random-input-len", "5", "--random-output-len", "3", "--ignore-eos", "--disable-tqdm"]
    more += ["--append-result", "--result-dir", str(tmp_path / "new"), "--result-filename", "all.jsonl"]
    for rate in ("50", "inf"):
        argv = ["bench", "serve", "--base-url", tiny.url, "--request-rate", rate, "--goodput", "ttft:1e6", "e2el:1e6", *more]
        assert command(argv) == 0
    first, second = map(json.loads, (tmp_path / "new" / "all.jsonl").read_text().splitlines())
    assert (first["request_rate"], second["request_rate"]) == (50.0, "inf")
    assert first["request_goodput"] == first["request_throughput"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--port", "9", "--num-prompts", "1"], "no server answers"),
        (["--base-url", "ftp://x"], "--base-url 'ftp://x'"),
        (["--dataset-name", "poems"], "--dataset-name poems"),
        (["--dataset-name", "custom"], "--dataset-path"),
        (["--dataset-name", "custom", "--dataset-path", "/nowhere"], "/nowhere"),
        (["--request-rate", "0"], "--request-rate"),
        (["--burstiness", "0", "--request-rate", "1"], "--burstiness"),
        (["--metric-percentiles", "101"], "--metric-percentiles"),
        (["--percentile-metrics", "speed"], "--percentile-metrics"),
        (["--goodput", "speed:7"], "--goodput speed"),
        (["--max-concurrency", "0"], "--max-concurrency"),
        (["--backend", "tgi"], "--backend tgi"),
        (["--extra-body", "[1]"], "--extra-body"),
        (["--header", "x"], "--header x"),
        (["--random-range-ratio", "1"], "--random-range-ratio"),
        (["--ramp-up-strategy", "linear"], "--ramp-up-strategy"),
    ],
)
def test_bad_input_is_told_in_one_line(tiny: Served, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = [] if "--port" in argv or "--base-url" in argv else ["--base-url", tiny.url, "--api-key", "secret"]
    assert command(["bench", "serve", *where, *argv, "--disable-tqdm"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_ctrl_c_prints_what_there_is(tiny: Served) -> None:
    argv = [
        "bench",
        "serve",
        "--base-url",
        tiny.url,
        "--api-key",
        "secret",
        "--random-input-len",
        "5",
        "--random-output-len",
        "3",
    ]
    argv += ["--request-rate", "20", "--max-concurrency", "1", "--num-prompts", "5000", "--ignore-eos"]
    done = tiny.client.tokens
    child = subprocess.Popen([sys.executable, "-m", "appliance", *argv], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while tiny.client.tokens < done + 7 and time.monotonic() < deadline:  # one at a time: the second of them has its answer
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "ended by ctrl-C" in out
    assert "first token (TTFT)" in out
