"""GET /metrics: Prometheus' text format of all models, the machine and the HTTP side, read when somebody asks.

What vLLM has comes twice: as ``appliance:*``, and under its name, for its Grafana dashboards and for tools that read them.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from appliance.core.messages import EngineInfo, Stats, plan_bytes
from appliance.server.machine_metrics import machine
from appliance.server.metrics import DURATION, LABELS, HttpMetrics, Metrics
from appliance.version import __version__

if TYPE_CHECKING:
    from appliance.server.state import ServerState

disable_created_metrics()  # when each series began: a tenth of all lines, and nobody asks

STATES = ("ok", "loading", "unloaded", "draining", "dead")
STEP_SIZES = (0, *range(3, 15))  # step_tokens' buckets are 1, 8, 16, ... 16384 tokens
CACHE_CONFIG = ("block_size", "cache_dtype", "enable_prefix_caching", "gpu_memory_utilization", "num_gpu_blocks",
                "num_cpu_blocks", "kv_cache_size_tokens", "kv_cache_max_concurrency")  # fmt: skip


class Model:
    """One model as it is now."""

    def __init__(self, metrics: Metrics, stats: Stats, info: EngineInfo | None, status: str, options: Mapping[str, Any]) -> None:
        """``options``: of the engine, those that CACHE_CONFIG names."""
        self.metrics, self.stats, self.info, self.status, self.options = metrics, stats, info, status, options
        self.labels = metrics.labels

    @classmethod
    async def of(cls, state: ServerState) -> Model:
        options = {name: getattr(state.engine_config, name, None) for name in CACHE_CONFIG}
        options["kv_cache_dtype"] = state.engine_config.kv_cache_dtype
        return cls(state.metrics, await state.stats(), state.shown, state.status, options)


Value = Callable[[Stats], float]
LORA = (*LABELS, "max_lora", "running_lora_adapters", "waiting_lora_adapters")
# Of the engine, one value a model: (kind, name, help, value, whether vLLM has or had the name and means the same)
ENGINE: tuple[tuple[str, str, str, Value, bool], ...] = (
    ("gauge", "num_requests_running", "Completions in the running batch.", lambda s: s.running, True),
    ("gauge", "num_requests_waiting", "Completions waiting for a place.", lambda s: s.waiting - s.swapped, True),
    ("gauge", "num_requests_swapped", "Completions waiting in host memory.", lambda s: s.swapped, True),
    (
        "gauge",
        "kv_cache_usage_perc",
        "Used share of the KV blocks, 0 to 1.",
        lambda s: _share(s.blocks_used, s.blocks_total),
        True,
    ),
    ("gauge", "gpu_cache_usage_perc", "kv_cache_usage_perc's old name.", lambda s: _share(s.blocks_used, s.blocks_total), True),
    ("gauge", "cpu_cache_usage_perc", "Used share of the swap space, 0 to 1.", lambda s: _share(s.swap_used, s.swap_total), True),
    ("gauge", "kv_blocks", "KV blocks in the pool.", lambda s: s.blocks_total, False),
    ("gauge", "kv_blocks_free", "KV blocks not in use.", lambda s: s.blocks_total - s.blocks_used, False),
    ("gauge", "kv_blocks_shared", "KV blocks that several sequences use.", lambda s: s.blocks_shared, False),
    ("gauge", "kv_blocks_kept", "Of those not in use, KV blocks whose content may be found.", lambda s: s.blocks_kept, False),
    ("gauge", "swap_blocks", "KV blocks of host memory.", lambda s: s.swap_total, False),
    ("gauge", "swap_blocks_used", "Of these, those of requests that are swapped out.", lambda s: s.swap_used, False),
    ("gauge", "swap_blocks_kept", "Of these, those of cached prefixes.", lambda s: s.swap_kept, False),
    ("gauge", "engine_rss_bytes", "Resident memory of the engine process.", lambda s: s.rss_bytes, False),
    ("gauge", "last_step_seconds", "Duration of the latest step.", lambda s: s.last_step_s, False),
    ("counter", "engine_steps", "Steps computed.", lambda s: s.steps, False),
    ("counter", "prompt_tokens", "Prompt tokens computed.", lambda s: s.prompt_tokens, False),
    ("counter", "generation_tokens", "Tokens generated.", lambda s: s.generation_tokens, True),
    ("counter", "num_preemptions", "Completions put back to make room.", lambda s: s.preemptions, True),
    ("counter", "num_swaps", "Of these, those that went to host memory.", lambda s: s.swaps, False),
    ("counter", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_queries, True),
    ("counter", "prefix_cache_hits", "Of these, tokens that were found.", lambda s: s.prefix_hits, True),
    ("counter", "prefix_cache_host_hits", "Of those found, tokens in host memory.", lambda s: s.prefix_host_hits, False),
    ("counter", "spec_decode_num_drafts", "Guesses of an answer's next tokens.", lambda s: s.drafts, True),
    ("counter", "spec_decode_num_draft_tokens", "Tokens of these.", lambda s: s.drafted, True),
    ("counter", "spec_decode_num_accepted_tokens", "Of these, tokens that were right.", lambda s: s.drafts_right, True),
    ("counter", "gpu_prefix_cache_queries", "prefix_cache_queries' old name.", lambda s: s.prefix_queries, True),
    ("counter", "gpu_prefix_cache_hits", "prefix_cache_hits' old name.", lambda s: s.prefix_hits, True),
)
# What vLLM's count of answers leaves out.
PROBES = frozenset({"/health", "/v1/health", "/ready", "/load", "/ping", "/version", "/metrics"})
KINDS = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}
_NAMES = re.compile(rb"^((?:# (?:HELP|TYPE) )?)appliance:", re.MULTILINE)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


class Scrape:
    """Answers of one server."""

    def __init__(self, http: HttpMetrics, *, vllm: bool = True) -> None:
        self.http, self.vllm = http, vllm
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        PlatformCollector(registry=self._process)

    def text(self, models: Sequence[Model], hardware: Mapping[str, Any], *, audit_lost: int = 0) -> bytes:
        """``hardware``: as Hardware.latest has it."""
        both = _render([*histograms(models), *engine(models, theirs=True)])
        parts = [both, _render([*engine(models, theirs=False), *by_kind(models), *machine(hardware)])]
        parts.append(
            _render([*self._http(), *counted("audit_lines_lost", "Lines that the audit log could not take.", audit_lost)])
        )
        if self.vllm:
            parts += [_NAMES.sub(rb"\1vllm:", both), _render([*vllm_only(models), *self._vllm_http(models)])]
        return b"".join([*parts, _render(self._process.collect())])

    def _http(self) -> Iterator[Metric]:
        answers = CounterMetricFamily(
            "appliance:http_requests", "Answers, by route and status.", labels=("method", "handler", "status")
        )
        for (method, route, status), number in self.http.answers.items():
            answers.add_metric((method, route, str(status)), number)
        errors = CounterMetricFamily(
            "appliance:http_errors", "Errors, by status and code; 200: a stream broke off.", labels=("status", "code")
        )
        for (status, code), number in self.http.errors.items():
            errors.add_metric((str(status), code), number)
        yield from (answers, errors)
        yield self._durations("appliance:http_request_duration_seconds", frozenset())

    def _durations(self, name: str, unwanted: frozenset[str]) -> Metric:
        family = HistogramMetricFamily(name, "From the request to the last byte of the answer.", labels=("method", "handler"))
        for (method, route), (total, *counts) in self.http.durations.items():
            if route not in unwanted:
                bounds = ["+Inf" if bound == math.inf else str(float(bound)) for bound in DURATION]
                family.add_metric((method, route), list(zip(bounds, counts)), total)
        return family

    def _vllm_http(self, models: Sequence[Model]) -> Iterator[Metric]:
        """As the instrumentation that vLLM uses counts answers, and its count of those that found the queue full."""
        answers = CounterMetricFamily("http_requests", "Answers, by route and status.", labels=("handler", "method", "status"))
        found: dict[tuple[str, str, str], int] = {}
        for (method, route, status), number in self.http.answers.items():
            if route not in PROBES:
                kind = (route, method, f"{status // 100}xx")
                found[kind] = found.get(kind, 0) + number
        for kind, number in found.items():
            answers.add_metric(kind, number)
        full = CounterMetricFamily("vllm:admission_rejections", "Requests that found the queue full.", labels=(*LABELS, "reason"))
        turned_away = sum(number for (_, code), number in self.http.errors.items() if code == "server_overloaded")
        for model in models[:1]:
            full.add_metric((*model.labels, "max_num_queued_reqs"), turned_away)
        yield from (answers, full, self._durations("http_request_duration_seconds", PROBES))


def histograms(models: Sequence[Model]) -> Iterator[Metric]:
    """Those of all models in one family each; the steps' tokens, and the inter-token latency under its old name, beside them."""
    families: dict[str, Metric] = {}
    for model in models:
        for metric in model.metrics.histograms():
            families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type)).samples += metric.samples
    yield from families.values()
    name, old = "appliance:inter_token_latency_seconds", "appliance:time_per_output_token_seconds"
    if gaps := families.get(name):
        same = Metric(old, "inter_token_latency_seconds' old name.", "histogram")
        same.samples = [sample._replace(name=sample.name.replace(name, old)) for sample in gaps.samples]
        yield same
    steps = HistogramMetricFamily("appliance:iteration_tokens_total", "Tokens of a step.", labels=LABELS)
    for model in models:
        sizes = model.stats.step_sizes
        counts = [(str(float(2**k)), sum(n for j, n in sizes.items() if j <= k)) for k in STEP_SIZES]
        steps.add_metric(model.labels, [*counts, ("+Inf", sum(sizes.values()))], model.stats.step_tokens)
    yield steps


def engine(models: Sequence[Model], *, theirs: bool) -> Iterator[Metric]:
    for kind, name, text, value, shared in ENGINE:
        if shared == theirs:
            family = KINDS[kind](f"appliance:{name}", text, labels=LABELS)
            for model in models:
                family.add_metric(model.labels, value(model.stats))
            yield family
    if theirs:
        ended = CounterMetricFamily(
            "appliance:request_success", "Completions that ended, by reason.", labels=(*LABELS, "finished_reason")
        )
        for model in models:
            for reason, number in model.metrics.reasons.items():
                ended.add_metric((*model.labels, reason), number)
        yield ended


FOUND = {"KV cache": "kv_cache", "CUDA graphs": "graphs", "swap space": "swap", "rotary table": "rotary_table"}
"""Categories of MemoryPlan.found as they are called among the planned ones."""


def by_kind(models: Sequence[Model]) -> Iterator[Metric]:
    """Ours alone, with labels of their own."""
    copied = CounterMetricFamily("appliance:kv_blocks_copied", "KV blocks copied, by way.", labels=(*LABELS, "way"))
    planned = GaugeMetricFamily(
        "appliance:memory_plan_bytes", "What the plan gives to each category.", labels=(*LABELS, "category")
    )
    found = GaugeMetricFamily(
        "appliance:memory_found_bytes", "What each category took when the engine was ready.", labels=(*LABELS, "category")
    )
    states = GaugeMetricFamily("appliance:engine_state", "1 for the state that it is in.", labels=(*LABELS, "state"))
    restarts = CounterMetricFamily("appliance:engine_restarts", "Times that a dead engine was started again.", labels=LABELS)
    about = ("version", "device", "kernels", "dtype", "quantization", "architecture")
    build = GaugeMetricFamily("appliance:build_info", "What runs.", labels=(*LABELS, *about))
    for model in models:
        for way in ("out", "in", "copy"):  # to host memory, back from there, within the pool for a fork that writes
            copied.add_metric((*model.labels, way), model.stats.copied_blocks.get(way, 0))
        for category, size in plan_bytes(model.info.plan if model.info else {}).items():
            planned.add_metric((*model.labels, category), size)
        for category, size in ((model.info.plan if model.info else {}).get("found_bytes") or {}).items():  # type: ignore[attr-defined]
            found.add_metric((*model.labels, FOUND.get(category, category)), size)
        for state in STATES:
            states.add_metric((*model.labels, state), model.status == state)
        restarts.add_metric(model.labels, model.metrics.restarts)
        known = [str(getattr(model.info, name, "")) for name in about[1:]]
        build.add_metric((*model.labels, __version__, *known), 1)
    yield from (copied, planned, found, states, restarts, build)


def vllm_only(models: Sequence[Model]) -> Iterator[Metric]:
    """What vLLM names, and what we have under other names or not at all."""
    prompts = CounterMetricFamily("vllm:prompt_tokens", "Prompt tokens, computed and found in the cache.", labels=LABELS)
    cached = CounterMetricFamily("vllm:prompt_tokens_cached", "Prompt tokens found in the cache.", labels=LABELS)
    source = CounterMetricFamily(
        "vllm:prompt_tokens_by_source", "Prompt tokens, by where they came from.", labels=(*LABELS, "source")
    )
    tier = CounterMetricFamily(
        "vllm:prompt_tokens_cached_by_source", "Prompt tokens found, by the memory they were in.", labels=(*LABELS, "source")
    )
    waiting = GaugeMetricFamily("vllm:num_requests_waiting_by_reason", "Completions that wait.", labels=(*LABELS, "reason"))
    sleep = GaugeMetricFamily("vllm:engine_sleep_state", "Whether the model is loaded.", labels=(*LABELS, "sleep_state"))
    config = GaugeMetricFamily("vllm:cache_config_info", "The cache's configuration.", labels=(*LABELS, *CACHE_CONFIG))
    adapters = GaugeMetricFamily("vllm:lora_requests_info", "Adapters of requests; the value is the time.", labels=LORA)
    for model in models:
        stats, labels = model.stats, model.labels
        prompts.add_metric(labels, stats.prompt_tokens + stats.prefix_hits)
        cached.add_metric(labels, stats.prefix_hits)
        source.add_metric((*labels, "local_compute"), stats.prompt_tokens)
        source.add_metric((*labels, "local_cache_hit"), stats.prefix_hits - stats.prefix_host_hits)
        source.add_metric((*labels, "external_kv_transfer"), stats.prefix_host_hits)
        tier.add_metric((*labels, "device"), stats.prefix_hits - stats.prefix_host_hits)
        tier.add_metric((*labels, "host"), stats.prefix_host_hits)
        waiting.add_metric((*labels, "capacity"), stats.waiting - stats.held)
        waiting.add_metric((*labels, "deferred"), stats.held)
        sleep.add_metric((*labels, "awake"), model.status != "unloaded")
        sleep.add_metric((*labels, "weights_offloaded"), 0)
        sleep.add_metric((*labels, "discard_all"), model.status == "unloaded")
        if model.info:
            config.add_metric((*labels, *_cache_config(model)), 1)
            if most := model.info.max_loras:
                names = map(",".join, (stats.adapters_running, stats.adapters_waiting))
                adapters.add_metric((*labels, str(most), *names), time.time())
    yield from (prompts, cached, source, tier, waiting, sleep, config, adapters)


def _cache_config(model: Model) -> Iterable[str]:
    stats, plan = model.stats, model.info.plan if model.info else {}
    cache = plan.get("kv_cache")
    known = {
        "block_size": stats.block_size,
        "cache_dtype": (cache.get("dtype") if isinstance(cache, dict) else None) or model.options.get("kv_cache_dtype"),
        "num_gpu_blocks": stats.blocks_total,
        "num_cpu_blocks": stats.swap_total,
        "kv_cache_size_tokens": stats.blocks_total * stats.block_size,
        "kv_cache_max_concurrency": plan.get("max_concurrency"),
    }
    return [str(known.get(name, model.options.get(name))) for name in CACHE_CONFIG]


def counted(name: str, text: str, value: float) -> Iterator[Metric]:
    family = CounterMetricFamily(f"appliance:{name}", text)
    family.add_metric((), value)
    yield family


class _Snapshot(Collector):
    """What ``generate_latest`` asks of a registry."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _render(metrics: Iterable[Metric]) -> bytes:
    return generate_latest(_Snapshot(metrics))
