"""vLLM's metrics in the shape of our /stats; the oracle for names and form is prometheus_client's own writer."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from appliance.config import EngineConfig, ServerConfig
from appliance.text.tokenizer import Tokenizer
from appliance.tui.view import parse
from appliance.tui.vllm import ITL, NotVllm, VllmMetrics
from tests.server.conftest import serve_in_thread
from tests.server.fake import FakeClient
from tests.tiny_model import write_tokenizer
from tests.tui.stage import VLLM_METRICS

NOW = 1_800_000_000.0


def test_reads_all_that_the_canned_metrics_tell() -> None:
    view = parse(VllmMetrics("0.11.0").body(VLLM_METRICS.read_text(), NOW))
    stats = view.stats
    assert view.model == "Qwen/Qwen2.5-7B-Instruct-AWQ" and view.uptime_s == pytest.approx(12600)
    assert (stats.running, stats.waiting, stats.swapped, stats.preemptions) == (17, 3, 0, 4)
    assert view.usage == 0.3625 and stats.blocks_used == round(0.3625 * 14835) and stats.block_size == 16
    assert (stats.prompt_tokens, stats.generation_tokens) == (1203040, 402113)
    assert (stats.prefix_queries, stats.prefix_hits) == (1203040, 733856)
    assert stats.finished == {"stop": 1802, "length": 211, "abort": 9} and stats.requests == 2022 + 17 + 3
    assert view.ttft.count == 2039 and view.ttft.sum_s == 305.8 and view.rows == () and view.info is None
    assert view.ttft.p50_s == pytest.approx(0.08 + 0.02 * (1019.5 - 900) / 308), "as histogram_quantile has it"
    assert view.itl.p95_s == pytest.approx(0.025 + 0.025 * (0.95 * 400074 - 380000) / 19900)
    assert view.e2e is not None and view.e2e.p50_s == pytest.approx(1 + 4 * (1011 - 120) / 1580)
    assert view.about == "what its /metrics tell · cache auto · blocks of 16 tokens · GPU memory utilization 0.9"


def text_of(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def test_older_names_several_engines_and_swapping() -> None:
    registry = CollectorRegistry()
    labels = ("model_name", "engine")
    usage = Gauge("vllm:gpu_cache_usage_perc", "", labels, registry=registry)
    running, swapped = (Gauge(f"vllm:num_requests_{one}", "", labels, registry=registry) for one in ("running", "swapped"))
    tokens = Counter("vllm:generation_tokens", "", labels, registry=registry)
    config = Gauge("vllm:cache_config_info", "", ("num_gpu_blocks", "num_cpu_blocks", "block_size", "engine"), registry=registry)
    between = Histogram(ITL[1], "", labels, registry=registry)
    for engine in ("0", "1"):
        usage.labels("a", engine).set(0.25 if engine == "0" else 0.75)
        running.labels("a", engine).set(3)
        swapped.labels("a", engine).set(1)
        tokens.labels("a", engine).inc(50)
        config.labels("100", "10", "32", engine).set(1)
        between.labels("a", engine).observe(0.02)
    view = parse(VllmMetrics().body(text_of(registry), NOW))
    assert view.usage == 0.5 and view.stats.blocks_total == 200 and view.stats.block_size == 32
    assert (view.stats.running, view.stats.waiting, view.stats.swapped, view.stats.swap_total) == (6, 2, 2, 20)
    assert view.stats.generation_tokens == 100 and view.itl.count == 2 and view.model == "a" and view.uptime_s is None


def test_percentiles_are_of_the_last_minute() -> None:
    registry = CollectorRegistry()
    first = Histogram("vllm:time_to_first_token_seconds", "", ("model_name",), buckets=(0.1, 0.2, 0.4, 0.8), registry=registry)
    metrics, now = VllmMetrics(), NOW
    for _ in range(1000):
        first.labels("a").observe(0.05)
    assert metrics.body(text_of(registry), now)["latency"]["ttft"]["p99_s"] <= 0.1
    for _ in range(70):  # a slow minute
        now += 1
        first.labels("a").observe(0.3)
        found = metrics.body(text_of(registry), now)["latency"]["ttft"]
    assert found["window"] == 60 and 0.2 < found["p50_s"] <= 0.4 and found["count"] == 1070
    first.labels("a").observe(99.0)
    found = metrics.body(text_of(registry), now + 1)["latency"]["ttft"]
    assert found["p99_s"] == 0.8, "beyond the last bound nobody knows"
    fresh = VllmMetrics()
    fresh.body(text_of(registry), now)
    registry = CollectorRegistry()
    Histogram("vllm:time_to_first_token_seconds", "", ("model_name",), buckets=(0.1, 0.2), registry=registry).labels("a").observe(
        0.15
    )
    found = fresh.body(text_of(registry), now + 1)["latency"]["ttft"]
    assert found["window"] == 1 and 0.1 < found["p50_s"] <= 0.2, "the server was started again"


def test_percentiles_within_a_bucket_of_the_real_ones() -> None:
    rng = np.random.default_rng(3)
    bounds = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
    registry = CollectorRegistry()
    first = Histogram("vllm:time_to_first_token_seconds", "", ("model_name",), buckets=bounds, registry=registry)
    values = rng.lognormal(-1.5, 0.9, 5000)
    for value in values:
        first.labels("a").observe(value)
    found = VllmMetrics().body(text_of(registry), NOW)["latency"]["ttft"]
    for p in (50, 95, 99):
        real = float(np.percentile(values, p))
        low, high = max((b for b in bounds if b < real), default=0.0), min(b for b in bounds if b >= real)
        assert low <= found[f"p{p}_s"] <= high


@pytest.mark.parametrize("text", ["", "# TYPE a counter\na_total 1\n", "vllm:x{", "<html></html>"])
def test_refuses_what_is_none_of_vllms(text: str) -> None:
    with pytest.raises(NotVllm):
        VllmMetrics().body(text, NOW)


def test_our_own_metrics_are_understood_too(tmp_path: Path) -> None:
    """They come under vLLM's names as well."""
    write_tokenizer(tmp_path)
    engine, server = EngineConfig(model=str(tmp_path)), ServerConfig(served_model_name=("tiny",))
    with serve_in_thread(FakeClient, Tokenizer.load(tmp_path), engine, server) as served:
        served.post("/v1/completions", prompt="abc", max_tokens=5, n=2)
        with served.http as http:
            view = parse(VllmMetrics().body(http.get("/metrics").text, time.monotonic(), time.time()))
            told = http.get("/stats").json()
    assert view.model == "tiny" and view.ttft.count == 2 and view.itl.count == 8 and view.e2e and view.e2e.count == 2
    assert view.stats.generation_tokens == told["engine"]["generation_tokens"] == 10 and view.stats.finished["length"] == 2
    assert (
        view.uptime_s is not None and view.stats.rss_bytes > 0 and view.stats.prefix_hits == told["engine"]["prefix_hits"] == 40
    )
