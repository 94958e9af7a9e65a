"""GET /metrics: the engine's counters and gauges read at scrape time, and histograms of what clients see.

Every series comes twice: as ``appliance:*``, and under vLLM's name where it has one, for its Grafana dashboards.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from appliance.core.messages import EngineInfo, Stats, plan_bytes
from appliance.core.params import SamplingParams
from appliance.server.stats import Recent

TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
LABELS = ("model_name", "engine")
REASONS = ("stop", "length", "abort", "error")

# Engine gauges and counters: (kind, name, help, value of a Stats, vLLM's name if it has one)
ENGINE: tuple[tuple[str, str, str, Callable[[Stats], float], bool], ...] = (
    ("gauge", "num_requests_running", "Completions in the running batch.", lambda s: s.running, True),
    ("gauge", "num_requests_waiting", "Completions waiting for a place.", lambda s: s.waiting - s.swapped, True),
    ("gauge", "num_requests_swapped", "Completions waiting in host memory.", lambda s: s.swapped, True),
    ("gauge", "kv_cache_usage_perc", "Used share of the KV blocks, 0 to 1.", lambda s: _usage(s), True),
    ("gauge", "gpu_cache_usage_perc", "kv_cache_usage_perc under its old name.", lambda s: _usage(s), True),
    ("gauge", "kv_blocks_total", "KV blocks in the pool.", lambda s: s.blocks_total, False),
    ("gauge", "kv_blocks_free", "KV blocks not in use.", lambda s: s.blocks_total - s.blocks_used, False),
    ("gauge", "kv_blocks_kept", "Of those not in use, KV blocks whose content may be found.", lambda s: s.blocks_kept, False),
    (
        "gauge",
        "cpu_cache_usage_perc",
        "Share of the swap space that requests use.",
        lambda s: _share(s.swap_used, s.swap_total),
        True,
    ),
    ("gauge", "swap_blocks_total", "KV blocks of host memory.", lambda s: s.swap_total, False),
    ("gauge", "swap_blocks_used", "Of these, those of requests that are swapped out.", lambda s: s.swap_used, False),
    ("gauge", "swap_blocks_kept", "Of these, those of cached prefixes.", lambda s: s.swap_kept, False),
    ("gauge", "engine_rss_bytes", "Resident memory of the engine process.", lambda s: s.rss_bytes, False),
    ("gauge", "last_step_seconds", "Duration of the latest step.", lambda s: s.last_step_s, False),
    ("counter", "engine_steps", "Steps computed.", lambda s: s.steps, False),
    ("counter", "prompt_tokens", "Prompt tokens computed.", lambda s: s.prompt_tokens, True),
    ("counter", "generation_tokens", "Tokens generated.", lambda s: s.generation_tokens, True),
    ("counter", "num_preemptions", "Completions put back to make room.", lambda s: s.preemptions, True),
    ("counter", "num_swaps", "Of these, those that went to host memory.", lambda s: s.swaps, False),
    ("counter", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_queries, True),
    ("counter", "prefix_cache_hits", "Of these, tokens that were found.", lambda s: s.prefix_hits, True),
    (
        "counter",
        "prefix_cache_host_hits",
        "Of those found, tokens that were in host memory.",
        lambda s: s.prefix_host_hits,
        False,
    ),
    ("counter", "gpu_prefix_cache_queries", "prefix_cache_queries under its old name.", lambda s: s.prefix_queries, True),
    ("counter", "gpu_prefix_cache_hits", "prefix_cache_hits under its old name.", lambda s: s.prefix_hits, True),
)


def _usage(stats: Stats) -> float:
    return _share(stats.blocks_used, stats.blocks_total)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


class Metrics:
    """One registry per server, so that several can live in a process."""

    def __init__(self, model: str) -> None:
        self._labels = (model, "0")
        self.ttft, self.itl = Recent(), Recent()
        self._kept = CollectorRegistry(auto_describe=False)
        self._ttft = self._histogram("time_to_first_token_seconds", "From the arrival to the first token.", TTFT)
        self._itl = _Gaps(self._labels)
        self._kept.register(self._itl)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From the arrival to the end.", REQUEST)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a completion.", TOKENS)
        self._output = self._histogram("request_generation_tokens", "Generated tokens of a completion.", TOKENS)
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens asked for.", TOKENS)
        self._n = self._histogram("request_params_n", "n asked for.", (1, 2, 5, 10, 20))
        self._success = Counter(
            "appliance:request_success", "Completions that ended, by reason.", (*LABELS, "finished_reason"), registry=self._kept
        )
        for reason in REASONS:
            self._success.labels(*self._labels, reason)
        self._own = CollectorRegistry(auto_describe=False)
        self._errors = Counter(
            "appliance:http_errors", "Answers with an error, by status.", (*LABELS, "status"), registry=self._own
        )
        for status in ("401", "429", "500", "503"):
            self._errors.labels(*self._labels, status)
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        PlatformCollector(registry=self._process)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        return Histogram(f"appliance:{name}", text, LABELS, buckets=buckets, registry=self._kept).labels(*self._labels)

    def token(self, first_s: float | None, gap_s: float | None) -> None:
        """A completion's first token ``first_s`` after the arrival, or a later one ``gap_s`` after the one before."""
        if first_s is not None:
            self._ttft.observe(first_s)
            self.ttft.add(first_s)
        if gap_s is not None:
            self._itl.observe(gap_s)
            self.itl.add(gap_s)

    def finished(self, reason: str, *, e2e: float, prompt_tokens: int, output_tokens: int, params: SamplingParams) -> None:
        self._success.labels(*self._labels, reason).inc()
        self._e2e.observe(e2e)
        self._prompt.observe(prompt_tokens)
        self._output.observe(output_tokens)
        self._n.observe(params.n)
        if params.max_tokens is not None:
            self._max_tokens.observe(params.max_tokens)

    def http_error(self, status: int) -> None:
        self._errors.labels(*self._labels, str(status)).inc()

    def text(self, stats: Stats, info: EngineInfo | None, *, audit_lost: int = 0) -> bytes:
        """Prometheus' text format, with the engine as it is in ``stats`` and its plan as ``info`` has it."""
        lost = CounterMetricFamily("appliance:audit_lines_lost", "Lines that the audit log could not take.", labels=LABELS)
        lost.add_metric(self._labels, audit_lost)
        own = [*self._own.collect(), lost]
        families = [*self._families(stats), *self._by_kind(stats, info), *own, *self._process.collect()]
        return generate_latest(_Snapshot(families))

    def _families(self, stats: Stats) -> Iterator[Metric]:
        kept = [(metric, True) for metric in self._kept.collect()]
        for metric, theirs in [*kept, *self._engine(stats)]:
            yield metric
            if theirs:
                yield _renamed(metric)

    def _engine(self, stats: Stats) -> Iterator[tuple[Metric, bool]]:
        for kind, name, text, value, theirs in ENGINE:
            family = (GaugeMetricFamily if kind == "gauge" else CounterMetricFamily)(f"appliance:{name}", text, labels=LABELS)
            family.add_metric(self._labels, value(stats))
            yield family, theirs

    def _by_kind(self, stats: Stats, info: EngineInfo | None) -> Iterator[Metric]:
        copied = CounterMetricFamily("appliance:kv_blocks_copied", "KV blocks copied, by way.", labels=(*LABELS, "way"))
        for way in ("out", "in", "copy"):  # to host memory, back from there, within the pool for a fork that writes
            copied.add_metric((*self._labels, way), stats.copied_blocks.get(way, 0))
        yield copied
        planned = GaugeMetricFamily(
            "appliance:memory_plan_bytes", "What the memory plan gives to each category.", labels=(*LABELS, "category")
        )
        for category, size in plan_bytes(info.plan if info else {}).items():
            planned.add_metric((*self._labels, category), size)
        yield planned


class _Gaps(Collector):
    """The histogram that hears of every token, under both of its names: prometheus_client's own takes locks, and far longer."""

    NAMES = (
        ("inter_token_latency_seconds", "Between two tokens of a completion."),
        ("time_per_output_token_seconds", "inter_token_latency_seconds under its old name."),
    )

    def __init__(self, labels: tuple[str, str]) -> None:
        self._labels, self._sum = labels, 0.0
        self._counts = [0] * (len(TOKEN) + 1)

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(TOKEN, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        bounds = [*map(floatToGoString, TOKEN), "+Inf"]
        for name, text in self.NAMES:
            family = HistogramMetricFamily(f"appliance:{name}", text, labels=LABELS)
            family.add_metric(self._labels, list(zip(bounds, accumulate(self._counts))), self._sum)
            yield family


class _Snapshot(Collector):
    """What ``generate_latest`` asks of a registry."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def _renamed(metric: Metric) -> Metric:
    """The same samples under vLLM's prefix."""
    other = Metric(metric.name.replace("appliance:", "vllm:", 1), metric.documentation, metric.type, metric.unit)
    other.samples = [s._replace(name=s.name.replace("appliance:", "vllm:", 1)) for s in metric.samples]
    return other
