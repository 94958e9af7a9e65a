"""/metrics of a server that speaks vLLM's names, in the shape of our /stats as far as they tell."""

from __future__ import annotations

import bisect
from collections import defaultdict, deque
from typing import Any

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

WINDOW_S = 60.0  # percentiles are of what was counted in so long
Samples = dict[str, list[tuple[dict[str, str], float]]]
# what vLLM calls, or called, the time of a first token and that between two
TTFT = ("vllm:time_to_first_token_seconds",)
ITL = ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds", "vllm:request_time_per_output_token_seconds")
E2E = ("vllm:e2e_request_latency_seconds",)


class NotVllm(ValueError):
    """These metrics have none of vLLM's names, or cannot be read."""


class Percentiles:
    """Of a Prometheus histogram, over the last minute: differences of its counts, even within a bucket."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, dict[float, float]]] = deque()

    def summary(self, counts: dict[float, float], total: float, now: float) -> dict[str, Any]:
        """``counts``: cumulative, by upper bound. The shape of a ``latency`` of /stats."""
        if self._seen and any(counts.get(bound, 0.0) < count for bound, count in self._seen[-1][1].items()):
            self._seen.clear()  # the server was started again
        self._seen.append((now, counts))
        while len(self._seen) > 1 and now - self._seen[1][0] >= WINDOW_S:
            self._seen.popleft()
        before = self._seen[0][1] if len(self._seen) > 1 else {}
        bounds = sorted(counts)
        fresh = [counts[bound] - before.get(bound, 0.0) for bound in bounds]
        found = {f"p{p}_s": _quantile(bounds, fresh, p / 100) for p in (50, 95, 99)}
        return {
            "count": counts[bounds[-1]] if bounds else 0,
            "sum_s": total,
            "window": fresh[-1] if fresh else 0,
            **found,
        }


def _quantile(bounds: list[float], counts: list[float], q: float) -> float | None:
    """As Prometheus' histogram_quantile: linear within a bucket; beyond the last finite bound, that bound."""
    if not counts or counts[-1] <= 0:
        return None
    rank = q * counts[-1]
    at = bisect.bisect_left(counts, rank)
    low, below = (bounds[at - 1], counts[at - 1]) if at else (0.0, 0.0)
    if bounds[at] == float("inf"):
        return low
    return low + (bounds[at] - low) * (rank - below) / (counts[at] - below)


class VllmMetrics:
    """One server, asked again and again."""

    def __init__(self, version: str = "") -> None:
        self._version = version
        self._percentiles = {"ttft": Percentiles(), "itl": Percentiles(), "e2e": Percentiles()}

    def body(self, text: str, now: float, wall: float | None = None) -> dict[str, Any]:
        """``now`` never goes back; ``wall``: seconds since 1970, by which servers say when they began; None: the same.

        Of several engines and models the sums; of their caches' usage the mean. Raises NotVllm."""
        samples = _read(text)
        if not any(name.startswith("vllm:") for name in samples):
            raise NotVllm("no metric has a name of vLLM's")
        config = samples.get("vllm:cache_config_info", [({}, 0.0)])[0][0]
        started = _first(samples, "process_start_time_seconds")
        return {
            "version": self._version,
            "kind": "vllm",
            "model": ", ".join(dict.fromkeys(_labels(samples, "model_name"))) or "a model",
            "state": "ok",
            "uptime_s": max((now if wall is None else wall) - started, 0.0) if started else None,
            "about": _about(config),
            "info": None,
            "engine": _engine(samples, config, now),
            "latency": {name: self._latency(name, samples, now) for name in self._percentiles},
            "hardware": {},
            "loading": None,
        }

    def _latency(self, name: str, samples: Samples, now: float) -> dict[str, Any]:
        for family in {"ttft": TTFT, "itl": ITL, "e2e": E2E}[name]:
            counts: defaultdict[float, float] = defaultdict(float)
            for labels, value in samples.get(f"{family}_bucket", []):
                counts[float(labels["le"])] += value
            if counts:
                return self._percentiles[name].summary(dict(counts), _sum(samples, f"{family}_sum"), now)
        return {"count": 0, "sum_s": 0.0, "window": 0, "p50_s": None, "p95_s": None, "p99_s": None}


def _read(text: str) -> Samples:
    found: Samples = defaultdict(list)
    try:
        families: list[Metric] = list(text_string_to_metric_families(text))
    except (ValueError, KeyError, IndexError) as error:
        raise NotVllm(f"these metrics cannot be read: {error}") from error
    for family in families:
        for sample in family.samples:
            found[sample.name].append((sample.labels, sample.value))
    return found


def _sum(samples: Samples, *names: str) -> float:
    """Under the first of these names that there is."""
    return next((sum(value for _, value in samples[name]) for name in names if name in samples), 0.0)


def _first(samples: Samples, name: str) -> float:
    return samples[name][0][1] if samples.get(name) else 0.0


def _mean(samples: Samples, *names: str) -> float:
    values = next((samples[name] for name in names if samples.get(name)), [])
    return sum(value for _, value in values) / len(values) if values else 0.0


def _labels(samples: Samples, label: str) -> list[str]:
    rows = [labels for name, all_of in samples.items() if name.startswith("vllm:") for labels, _ in all_of]
    return [labels[label] for labels in rows if labels.get(label)]


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def _about(config: dict[str, str]) -> str:
    """What cache_config_info says, in words."""
    words = {
        "cache_dtype": "cache {}",
        "block_size": "blocks of {} tokens",
        "gpu_memory_utilization": "GPU memory utilization {}",
        "kv_cache_max_concurrency": "up to {} full contexts",
    }
    known = [say.format(config[name]) for name, say in words.items() if config.get(name, "None") != "None"]
    return " · ".join(["what its /metrics tell", *known])


def _engine(samples: Samples, config: dict[str, str], now: float) -> dict[str, Any]:
    usage = _mean(samples, "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
    engines = max(len(samples.get("vllm:cache_config_info", [])), 1)
    block_size = _number(config.get("block_size")) or 16
    total = _number(config.get("num_gpu_blocks")) * engines
    swapped = round(_sum(samples, "vllm:num_requests_swapped"))
    finished: defaultdict[str, int] = defaultdict(int)
    for labels, value in samples.get("vllm:request_success_total", []):
        finished[labels.get("finished_reason", "?")] += round(value)
    swap_total = _number(config.get("num_cpu_blocks")) * engines
    arrived = _sum(samples, "vllm:request_success_total") + _sum(samples, "vllm:num_requests_running")
    return {
        "time": now,
        "running": round(_sum(samples, "vllm:num_requests_running")),
        "waiting": round(_sum(samples, "vllm:num_requests_waiting")) + swapped,
        "swapped": swapped,
        "usage": usage,
        "blocks_total": total,
        "blocks_used": round(usage * total),
        "block_size": block_size,
        "swap_total": swap_total,
        "swap_used": round(_mean(samples, "vllm:cpu_cache_usage_perc") * swap_total),
        "prompt_tokens": round(_sum(samples, "vllm:prompt_tokens_total")),
        "generation_tokens": round(_sum(samples, "vllm:generation_tokens_total")),
        "requests": round(arrived + _sum(samples, "vllm:num_requests_waiting") + swapped),
        "finished": dict(finished),
        "preemptions": round(_sum(samples, "vllm:num_preemptions_total")),
        "prefix_queries": round(_sum(samples, "vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total")),
        "prefix_hits": round(_sum(samples, "vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total")),
        "rss_bytes": round(_first(samples, "process_resident_memory_bytes")),
        "requests_now": None,  # it does not list them
    }
