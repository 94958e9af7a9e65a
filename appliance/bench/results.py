"""Figures of a run. Names in the results are those of vllm bench serve, with what it has not beside them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from appliance.bench.load import EMBEDDINGS, Run, pairs
from appliance.bench.outcome import Outcome
from appliance.config import BenchConfig
from quant.errors import InputError

METRICS = {
    "ttft": "first token (TTFT)",
    "tpot": "later tokens (TPOT)",
    "itl": "between chunks (ITL)",
    "e2el": "end to end (E2EL)",
}
LATE_S, BUSY = 0.005, 0.8  # a generator whose loop wakes up so late (99th percentile), or uses so much of a core, is told of


def percentiles(config: BenchConfig) -> list[float]:
    """Raises InputError."""
    try:
        found = [float(text) for text in config.metric_percentiles.split(",") if text.strip()]
    except ValueError:
        found = [-1.0]
    if not all(0 <= p <= 100 for p in found):
        raise InputError(f"--metric-percentiles are numbers from 0 to 100 with commas between, got {config.metric_percentiles}")
    return found


def shown(config: BenchConfig) -> list[str]:
    """Raises InputError."""
    if config.backend == EMBEDDINGS and config.percentile_metrics == BenchConfig.percentile_metrics:
        return ["e2el"]  # there are no tokens
    names = [name.strip() for name in config.percentile_metrics.split(",") if name.strip()]
    if wrong := [name for name in names if name not in METRICS]:
        raise InputError(f"--percentile-metrics {wrong[0]}: there are {', '.join(METRICS)}")
    return names


def limits(config: BenchConfig) -> dict[str, float]:
    """Of --goodput, in seconds. Raises InputError."""
    found = {}
    for name, value in pairs("--goodput", config.goodput, ":").items():
        if name not in ("ttft", "tpot", "e2el"):
            raise InputError(f"--goodput {name}: there are ttft, tpot, e2el")
        try:
            found[name] = float(value) / 1e3
        except ValueError:
            raise InputError(f"--goodput {name}:{value}: {value!r} is no number of milliseconds") from None
    return found


def values(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Seconds, by metric, of requests that ended well."""
    good = [one for one in outcomes if one.ok]
    return {
        "ttft": [one.ttft for one in good if one.ttft is not None],
        "tpot": [one.tpot for one in good if one.tpot is not None],
        "itl": [gap for one in good for gap in one.gaps],
        "e2el": [one.e2e for one in good],
    }


def summary(run: Run, config: BenchConfig) -> dict[str, Any]:
    """What is told of a run, ready for JSON; latencies in milliseconds, null where there is none."""
    good = [one for one in run.outcomes if one.ok]
    prompt, output = sum(one.prompt_tokens or 0 for one in good), sum(one.tokens for one in good)
    pieces = sum(len(one.times) for one in good)
    asked = limits(config)
    found: dict[str, Any] = {
        "duration": run.seconds,
        "completed": len(good),
        "failed": len(run.outcomes) - len(good),
        "errors_by_kind": dict(Counter(one.error for one in run.outcomes if one.error is not None).most_common()),
        "error_examples": {one.error: one.detail for one in reversed(run.outcomes) if one.error is not None},
        "cut_off_by_user": run.cut,
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "tokens_counted_by_server": all(one.completion_tokens is not None for one in good),
        "tokens_per_chunk": output / pieces if pieces else None,
        "short_answers": sum(one.tokens < one.asked_tokens for one in good),
        "request_throughput": len(good) / run.seconds,
        "request_goodput": sum(_is_good(one, asked) for one in good) / run.seconds if asked else None,
        "output_throughput": output / run.seconds,
        "total_token_throughput": (prompt + output) / run.seconds,
        **_depths(run),
        **_generator(run),
    }
    for name, seconds in values(run.outcomes).items():
        found |= _latency(name, seconds, percentiles(config))
    return found


def _is_good(one: Outcome, most: dict[str, float]) -> bool:
    seen = {"ttft": one.ttft, "tpot": one.tpot or 0.0, "e2el": one.e2e}
    return all((value := seen[name]) is not None and value <= limit for name, limit in most.items())


def _latency(name: str, seconds: Sequence[float], wanted: Sequence[float]) -> dict[str, float | None]:
    ms = 1e3 * np.asarray(seconds, dtype=float)
    whole = {"mean": ms.mean(), "median": np.median(ms), "std": ms.std(), "max": ms.max()} if len(ms) else {}
    found = {f"{kind}_{name}_ms": float(whole[kind]) if whole else None for kind in ("mean", "median", "std", "max")}
    return found | {f"p{p:g}_{name}_ms": float(np.percentile(ms, p)) if len(ms) else None for p in wanted}


def steps(edges: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Ups and downs to how many there are from each moment on."""
    level, found = 0, list[tuple[float, int]]()
    for at, change in sorted(edges):
        level += change
        if found and found[-1][0] == at:
            found.pop()
        found.append((at, level))
    return found


def in_flight(run: Run) -> list[tuple[float, int]]:
    """(seconds from the begin, requests under way)."""
    spans = [(one.sent, one.end or run.end) for one in run.outcomes if one.sent is not None]
    return steps([e for begin, end in spans for e in ((begin - run.begun, 1), (end - run.begun, -1))])


def queued(run: Run) -> list[tuple[float, int]]:
    """(seconds from the begin, requests that wait for their first token, here or at the server)."""
    found = []
    for one in run.outcomes:
        if one.sent is not None:
            first = one.times[0] if one.times else one.end or run.end
            found += [(one.intended - run.begun, 1), (first - run.begun, -1)]
    return steps(found)


def _depths(run: Run) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, levels in (("concurrent_requests", in_flight(run)), ("queue_depth", queued(run))):
        area = sum(n * (b - a) for (a, n), (b, _) in pairwise(levels))
        found[f"max_{name}"] = max((n for _, n in levels), default=0)
        found[f"mean_{name}"] = area / run.seconds
    return found


def _generator(run: Run) -> dict[str, Any]:
    """Whether this process kept up: how late its event loop and its requests were, and how busy its core."""
    starts = np.asarray([one.sent - one.intended for one in run.outcomes if one.sent is not None] or [0.0])
    late = np.asarray(run.late_s or [0.0])
    found = {
        "generator_cpu": run.cpu_s / run.seconds,
        "generator_late_p99_ms": 1e3 * float(np.percentile(late, 99)),
        "generator_late_max_ms": 1e3 * float(late.max()),
        "client_queue_median_ms": 1e3 * float(np.median(starts)),
        "client_queue_max_ms": 1e3 * float(starts.max()),
    }
    return found | {"generator_kept_up": found["generator_late_p99_ms"] <= 1e3 * LATE_S and found["generator_cpu"] <= BUSY}


def tokens_each_second(run: Run) -> list[tuple[float, float]]:
    """(second, tokens that came in it), of all requests; a request's tokens are spread evenly over its pieces."""
    counts = [0.0] * (math.floor(run.seconds) + 1)
    for one in run.outcomes:
        for at in one.times:
            counts[min(len(counts) - 1, max(0, int(at - run.begun)))] += one.tokens / len(one.times)
    return [(float(second), count) for second, count in enumerate(counts)]


def details(run: Run) -> dict[str, list[Any]]:
    """What --save-detailed adds: a list entry for each request, failed ones too, in the order in which they were to begin."""
    return {
        "input_lens": [one.prompt_tokens for one in run.outcomes],
        "output_lens": [one.tokens for one in run.outcomes],
        "ttfts": [one.ttft for one in run.outcomes],
        "itls": [one.gaps for one in run.outcomes],
        "latencies": [one.e2e for one in run.outcomes],
        "start_times": [one.intended - run.begun for one in run.outcomes],
        "queue_times": [None if one.sent is None else one.sent - one.intended for one in run.outcomes],
        "generated_texts": ["".join(one.text) for one in run.outcomes],
        "errors": [f"{one.error}: {one.detail}" if one.error else "" for one in run.outcomes],
    }
