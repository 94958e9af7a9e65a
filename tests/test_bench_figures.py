"""appliance bench serve: what it reads of streams, what it makes of times, and whom it asks what when."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.bench.arrivals import arrivals
from appliance.bench.http import BodyReader, Broken, EventReader
from appliance.bench.load import Run
from appliance.bench.outcome import Outcome
from appliance.bench.report import notes
from appliance.bench.results import in_flight, queued, summary, tokens_each_second
from appliance.bench.samples import Sample, Writer, load
from appliance.config import BenchConfig


def piece(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, **more}]}


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields}]}


def sse(*events: Any, done: bool = True) -> bytes:
    lines = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    return b"".join(lines) + (b"data: [DONE]\n\n" if done else b"")


END = piece("", finish_reason="stop")


# ---- what comes over the wire


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.lists(st.integers(1, 30), max_size=60), st.booleans())
def test_bodies_are_the_same_wherever_they_are_cut(parts: list[bytes], cuts: list[int], lax: bool) -> None:
    extension = b"; name=value" if lax else b""
    raw = b"".join(b"%X%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)
    raw += b"0\r\nTrailer: x\r\n\r\n" if lax else b"0\r\n\r\n"
    chunked, plain = BodyReader({"transfer-encoding": "chunked"}), b"".join(parts)
    sized = BodyReader({"content-length": str(len(plain))})
    for reader, data in ((chunked, raw), (sized, plain)):
        found, at = b"", 0
        for size in [*cuts, len(data)]:
            found += reader.feed(data[at : at + size])
            at += size
        assert found == plain
        assert reader.done


def test_a_chunk_without_a_size_is_an_error() -> None:
    with pytest.raises(Broken, match="chunk"):
        BodyReader({"transfer-encoding": "chunked"}).feed(b"hello\r\n")


@given(st.lists(st.integers(1, 20), max_size=80), st.sampled_from([b"\n", b"\r\n"]))
def test_events_are_the_same_wherever_they_are_cut(cuts: list[int], line: bytes) -> None:
    whole = [
        b": a comment",
        b"",
        b"event: message",
        b'data: {"a": 1}',
        b"",
        b"data: two",
        b"data:lines",
        b"",
        b"id: 7",
        b"",
        b"data: last",
    ]
    raw, reader, found, at = line.join(whole) + line, EventReader(), [], 0
    for size in [*cuts, len(raw)]:
        found += reader.feed(raw[at : at + size])
        at += size
    assert found == [b'{"a": 1}', b"two\nlines"]
    assert reader.finish() == [b"last"]


# ---- what is made of it, by a clock of its own


def heard(*events: tuple[float, Any], intended: float = 0.0, end: float | None = None) -> Outcome:
    outcome = Outcome(0, intended=intended, sent=intended)
    for at, event in events:
        outcome.feed(sse(event, done=False), at)
    outcome.finish(events[-1][0] if end is None else end)
    return outcome


def test_times_of_an_answer() -> None:
    one = heard((1.5, piece("a")), (1.75, piece("b")), (2.5, piece("c", finish_reason="length")), intended=1.0)
    assert one.ok
    assert (one.ttft, one.e2e, one.gaps, one.tpot, one.tokens) == (0.5, 1.5, [0.25, 0.75], 0.5, 3)
    assert "".join(one.text) == "abc"


def test_the_server_counts_tokens_where_it_does() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9}}
    one = heard((1.0, piece("abc")), (3.0, piece("def")), (5.0, END), (5.5, usage))
    assert (one.tokens, one.prompt_tokens, one.times) == (9, 7, [1.0, 3.0])
    assert one.tpot == 4.0 / 8  # over the tokens after the first one, of which the last has no text
    assert one.e2e == 5.0  # the usage behind the end is no part of the answer


def test_usage_in_every_chunk_tells_of_tokens_without_text() -> None:
    events = [(float(n), {**delta(content=""), "usage": {"completion_tokens": n}}) for n in (1, 2, 3)]
    assert heard(*events).times == [1.0, 2.0, 3.0]


def test_a_role_is_no_token_and_reasoning_and_calls_are() -> None:
    calls = [{"index": 0, "function": {"arguments": "{"}}]
    one = heard(
        (1.0, delta(role="assistant", content="")), (2.0, delta(reasoning_content="hm")), (3.0, delta(tool_calls=calls)),
        (4.0, delta(content="x")), (5.0, {"choices": [{"delta": {}, "finish_reason": "stop"}]}),
    )  # fmt: skip
    assert one.times == [2.0, 3.0, 4.0]


def test_an_answer_of_nothing_has_the_time_of_its_end() -> None:
    assert heard((2.0, END)).times == [2.0]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (sse(piece("a"), {"error": {"code": "engine_error", "message": "no"}}), "error in the stream: engine_error"),
        (sse(piece("a"), {"error": {"type": "server_error", "code": None}}), "error in the stream: server_error"),
        (sse(piece("a"), {"error": "words"}), "error in the stream: unnamed"),
        (b"data: {broken\n\n", "an event that is not JSON"),
        (b"data: [1]\n\n", "an event that is no object"),
        (sse(), "no token came"),
        (sse(piece("a"), done=False), "the stream ended early"),
    ],
)
def test_streams_that_go_wrong(body: bytes, kind: str) -> None:
    outcome = Outcome(0)
    outcome.feed(body, 1.0)
    outcome.finish(2.0)
    assert outcome.error == kind


def test_no_done_is_no_error() -> None:
    assert heard((1.0, piece("a", finish_reason="stop"))).ok


def made_run(latencies: list[tuple[float, float]], **more: Any) -> Run:
    """Requests a second apart: (first token after, end after)."""
    found = [
        heard((i + a, piece("x")), (i + b, piece("y", finish_reason="stop")), intended=float(i))
        for i, (a, b) in enumerate(latencies)
    ]
    return Run(0.0, found, end=float(len(latencies)), **more)


def test_figures_are_those_of_numpy() -> None:
    rng = random.Random(1)
    given_ = [(a := rng.uniform(0.01, 1), a + rng.uniform(0.01, 5)) for _ in range(200)]
    found = summary(made_run(given_), BenchConfig(metric_percentiles="5,90,99.9", goodput=("ttft:500", "e2el:3000")))
    ttft, e2e = (np.array([pair[k] for pair in given_]) * 1e3 for k in (0, 1))
    for name, ms in (("ttft", ttft), ("e2el", e2e), ("itl", e2e - ttft), ("tpot", e2e - ttft)):
        assert found[f"mean_{name}_ms"] == pytest.approx(ms.mean())
        assert found[f"median_{name}_ms"] == pytest.approx(np.median(ms))
        assert found[f"max_{name}_ms"] == pytest.approx(ms.max())
        for p in (5, 90, 99.9):
            assert found[f"p{p:g}_{name}_ms"] == pytest.approx(np.percentile(ms, p))
    assert found["request_goodput"] == pytest.approx(np.mean((ttft <= 500) & (e2e <= 3000)))
    assert (found["completed"], found["failed"], found["duration"], found["output_throughput"]) == (200, 0, 200.0, 2.0)


def test_failures_are_counted_by_kind_and_touch_no_latency() -> None:
    seen = made_run([(0.1, 0.2)] * 4)
    seen.outcomes[1].fail("HTTP 503 server_overloaded", "full")
    seen.outcomes[2].fail("HTTP 503 server_overloaded", "full")
    seen.outcomes[2].times = [99.0]
    found = summary(seen, BenchConfig())
    assert (found["completed"], found["failed"]) == (2, 2)
    assert found["errors_by_kind"] == {"HTTP 503 server_overloaded": 2}
    assert found["max_ttft_ms"] == pytest.approx(100)
    facts = {**found, "max_concurrency": None, "offered_rate": None}
    assert notes(facts)[0] == "failed: 2 x HTTP 503 server_overloaded (full)"


def test_depths_and_tokens_over_time() -> None:
    seen = made_run([(0.5, 2.5), (0.25, 0.5), (0.75, 0.75)])
    assert in_flight(seen) == [(0.0, 1), (1.0, 2), (1.5, 1), (2.0, 2), (2.5, 1), (2.75, 0)]
    assert queued(seen) == [(0.0, 1), (0.5, 0), (1.0, 1), (1.25, 0), (2.0, 1), (2.75, 0)]
    assert tokens_each_second(seen) == [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 0.0)]
    found = summary(seen, BenchConfig())
    assert (found["max_concurrent_requests"], found["max_queue_depth"]) == (2, 1)
    assert found["mean_concurrent_requests"] == pytest.approx((1 + 0.5 * 2 + 0.5 + 0.5 * 2 + 0.25) / 3)


def test_a_generator_that_was_late_or_busy_says_so() -> None:
    facts = {"max_concurrency": None, "offered_rate": None}
    for late, cpu, ok in ((0.001, 0.3, True), (0.02, 0.3, False), (0.001, 1.9, False)):
        found = {**summary(made_run([(0.1, 0.2)] * 2, late_s=[late] * 50, cpu_s=cpu), BenchConfig()), **facts}
        assert found["generator_kept_up"] is ok
        assert ("WARNING" in notes(found)[-1]) is not ok


# ---- who is asked when, and what


def some(count: int) -> list[Sample]:
    return [Sample("x", 1) for _ in range(count)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_that_are_asked_for(burstiness: float) -> None:
    times = arrivals(some(20_001), BenchConfig(request_rate=50, burstiness=burstiness, seed=3))
    gaps = np.diff(times)
    assert times[-1] == pytest.approx(20_000 / 50)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)  # of a gamma distribution
    assert times == arrivals(some(20_001), BenchConfig(request_rate=50, burstiness=burstiness, seed=3))


def test_rates_that_rise() -> None:
    config = BenchConfig(ramp_up_strategy="linear", ramp_up_start_rps=10, ramp_up_end_rps=100, burstiness=1e6)
    gaps = np.diff(arrivals(some(1000), config))
    assert gaps[0] == pytest.approx(0.1, rel=0.05)
    assert gaps[-1] == pytest.approx(0.01, rel=0.05)


def test_all_at_once_without_a_rate() -> None:
    assert arrivals(some(5), BenchConfig()) == [0.0] * 5


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,40,10\n2023-11-16 18:17:05.4799600,30,8\n"
MOONCAKE = "".join(
    json.dumps({"timestamp": t, "input_length": n, "output_length": 5, "hash_ids": ids}) + "\n"
    for t, n, ids in ((0, 1100, [0, 1, 2]), (3000, 1300, [0, 1, 9]), (3000, 20, [7]))
)


def test_traces_are_replayed_at_their_times_and_with_their_prefixes(tmp_path: Path) -> None:
    writer = Writer(range(1000, 9000), 0)
    config = BenchConfig(dataset_name="timed_trace", dataset_path=write(tmp_path / "a.csv", AZURE), speedup=3)
    found = load(config, writer)
    assert arrivals(found, config) == pytest.approx([0.0, 0.5])
    assert [(len(s.prompt), s.output_tokens) for s in found] == [(40, 10), (30, 8)]
    config = BenchConfig(dataset_name="timed_trace", dataset_path=write(tmp_path / "m.jsonl", MOONCAKE))
    one, two, three = load(config, writer)
    assert arrivals([one, two, three], config) == [0.0, 3.0, 3.0]
    assert [len(s.prompt) for s in (one, two, three)] == [1100, 1300, 20]
    assert one.prompt[:1024] == two.prompt[:1024]
    assert one.prompt[1024:1100] != two.prompt[1024:1100]
    half = load(BenchConfig(dataset_name="timed_trace", dataset_path=config.dataset_path, scale_lengths=0.5), writer)
    assert [len(s.prompt) for s in half] == [550, 650, 10]
    assert half[0].prompt[:512] == half[1].prompt[:512]
    rated = BenchConfig(dataset_name="timed_trace", dataset_path=config.dataset_path, self_timed=False)
    assert arrivals(load(rated, writer), rated) == [0.0, 0.0, 0.0]


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["AzureLLMInferenceTrace_conv.csv", "mooncake_conversation.jsonl"])
def test_real_traces(shared_data: Path, name: str) -> None:
    path = shared_data / "traces" / name
    config = BenchConfig(dataset_name="timed_trace", dataset_path=str(path), num_prompts=300)
    found = load(config, Writer(None, 0))
    times = arrivals(found, config)
    assert len(found) == 300
    assert times == sorted(times)
    assert times[0] == 0
    if name.endswith("csv"):
        first, last = (line.split(",") for line in (path.read_text().splitlines()[k] for k in (1, 300)))
        minutes, seconds = (float(last[0][14:][a:b]) - float(first[0][14:][a:b]) for a, b in ((0, 2), (3, 10)))
        assert times[-1] == pytest.approx(60 * minutes + seconds, abs=1e-3)
    else:
        assert times[-1] == json.loads(path.read_text().splitlines()[299])["timestamp"] / 1e3


def test_other_data_sets(tmp_path: Path) -> None:
    writer = Writer(None, 0)
    lines = write(
        tmp_path / "c.jsonl", '{"prompt": "one", "output_tokens": 3}\n{"prompt": [5, 6]}\n{"messages": [{"role": "user"}]}\n'
    )
    found = load(BenchConfig(dataset_name="custom", dataset_path=lines, num_prompts=4, disable_shuffle=True), writer)
    assert [(s.prompt, s.output_tokens) for s in found] == [("one", 3), ([5, 6], 256), ([{"role": "user"}], 256), ("one", 3)]
    talks = [{"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because" * 4}]}]
    path = write(tmp_path / "s.json", json.dumps(talks))
    assert load(BenchConfig(dataset_name="sharegpt", dataset_path=path, num_prompts=1), writer) == [Sample("why?", 7)]
    text = write(tmp_path / "t.txt", " ".join(map(str, range(500))))
    for sample in load(BenchConfig(dataset_name="text", dataset_path=text, num_prompts=5, input_len=20, output_len=6), writer):
        words = [int(word) for word in str(sample.prompt).split()]
        assert words == list(range(words[0], words[0] + 20))
        assert sample.output_tokens == 6


def test_random_prompts() -> None:
    config = BenchConfig(num_prompts=200, random_input_len=50, random_output_len=10, random_range_ratio=0.5, random_prefix_len=8)
    ids = load(config, Writer([3, 5, 7, 11], 0))
    assert {len(s.prompt) for s in ids} <= set(range(33, 84))
    assert {s.output_tokens for s in ids} == set(range(5, 16))
    assert all(s.prompt[:8] == ids[0].prompt[:8] and s.prompt_tokens == len(s.prompt) for s in ids)
    assert len({tuple(s.prompt) for s in ids}) == 200  # type: ignore[arg-type]
    assert ids == load(config, Writer([3, 5, 7, 11], 0))
    assert all(len(str(s.prompt).split()) == s.prompt_tokens for s in load(config, Writer(None, 0)))
