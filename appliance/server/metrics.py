"""What a model's requests were like: histograms of what clients see. ``scrape.py`` makes GET /metrics of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import Metric

from appliance.core.messages import Event
from appliance.core.params import SamplingParams
from appliance.server.stats import Recent

TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
DURATION = (0.1, 0.5, 1, 10, math.inf)
LABELS = ("model_name", "engine")
REASONS = ("stop", "length", "abort", "error", "repetition")

# Histograms of what has ended, by vLLM's names: (name, help, buckets)
ENDED: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("e2e_request_latency_seconds", "From the arrival to the end.", REQUEST),
    ("request_queue_time_seconds", "From the arrival to the first step that it had a part in.", REQUEST),
    ("request_prefill_time_seconds", "From there to the first token.", REQUEST),
    ("request_decode_time_seconds", "From the first token to the last one.", REQUEST),
    ("request_inference_time_seconds", "From the first step to the last token.", REQUEST),
    ("request_time_per_output_token_seconds", "Mean time between the tokens of a completion.", TOKEN),
    ("request_prompt_tokens", "Prompt tokens of a completion.", TOKENS),
    ("request_prefill_kv_computed_tokens", "Of these, tokens that were not in the cache.", TOKENS),
    ("request_generation_tokens", "Generated tokens of a completion.", TOKENS),
    ("request_num_preemptions", "How often a completion was put back to make room.", (1, 2, 3, 4, 5, 10, 20)),
    ("request_max_num_generation_tokens", "Generated tokens of a prompt's longest completion.", TOKENS),
    ("request_params_max_tokens", "max_tokens asked for.", TOKENS),
    ("request_params_n", "n asked for.", (1, 2, 5, 10, 20)),
)


@dataclass(slots=True)
class Course:
    """How a completion went so far. Times are time.monotonic(), of which one machine's processes have one."""

    begun: float  # it arrived
    scheduled: float | None = None  # a step had a part of it for the first time
    first: float | None = None  # its first token came
    latest: float | None = None
    cached: int = 0
    preemptions: int = 0

    @property
    def first_s(self) -> float | None:
        return None if self.first is None else self.first - self.begun


class Metrics:
    """Of one model."""

    def __init__(self, model: str) -> None:
        self.labels = (model, "0")
        self.ttft, self.itl = Recent(), Recent()
        self.arrived = 0  # completions
        self.reasons: Counter[str] = Counter(dict.fromkeys(REASONS, 0))  # completions that ended
        self.restarts = 0  # of the engine, after it had died
        self._kept = CollectorRegistry(auto_describe=False)
        self._first = self._histogram("time_to_first_token_seconds", "From the arrival to the first token.", TTFT)
        self._gap = self._histogram("inter_token_latency_seconds", "Between two tokens of a completion.", TOKEN)
        self._ended = {name: self._histogram(name, text, buckets) for name, text, buckets in ENDED}

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        return Histogram(f"appliance:{name}", text, LABELS, buckets=buckets, registry=self._kept).labels(*self.labels)

    def histograms(self) -> Iterable[Metric]:
        return self._kept.collect()

    def tokens(self, course: Course, event: Event, now: float) -> None:
        """A completion has new tokens. This is done for every token: about a microsecond."""
        if course.latest is None:
            course.first, course.scheduled, course.cached = now, event.scheduled, event.cached_tokens
            self._first.observe(took := max(0.0, now - course.begun))
            self.ttft.add(took)
        else:
            self._gap.observe(took := max(0.0, now - course.latest))
            self.itl.add(took)
        course.latest, course.preemptions = now, event.preemptions

    def finished(self, reason: str, course: Course, now: float, *, prompt_tokens: int, output_tokens: int) -> None:
        """A completion has ended."""
        self.reasons[reason] += 1
        seen = {
            "e2e_request_latency_seconds": now - course.begun,
            "request_prompt_tokens": prompt_tokens,
            "request_generation_tokens": output_tokens,
            "request_num_preemptions": course.preemptions,
        }
        if course.first is not None and course.latest is not None:
            seen["request_prefill_kv_computed_tokens"] = prompt_tokens - course.cached
            seen["request_decode_time_seconds"] = course.latest - course.first
            if output_tokens > 1:
                seen["request_time_per_output_token_seconds"] = (course.latest - course.first) / (output_tokens - 1)
            if course.scheduled is not None:
                seen["request_queue_time_seconds"] = course.scheduled - course.begun
                seen["request_prefill_time_seconds"] = course.first - course.scheduled
                seen["request_inference_time_seconds"] = course.latest - course.scheduled
        for name, value in seen.items():
            self._ended[name].observe(max(0, value))

    def answered(self, params: SamplingParams, longest: int) -> None:
        """All completions of a prompt have ended, the longest with so many tokens."""
        self._ended["request_params_n"].observe(params.n)
        self._ended["request_max_num_generation_tokens"].observe(longest)
        if params.max_tokens is not None:
            self._ended["request_params_max_tokens"].observe(params.max_tokens)


# Shown as 0 from the start, so that alerts on their rates see the first one.
EXPECTED = (
    (401, "invalid_api_key"),
    (429, "rate_limit_exceeded"),
    (500, "engine_error"),
    (500, "internal_error"),
    (503, "engine_dead"),
    (503, "model_loading"),
    (503, "server_overloaded"),
    (503, "shutting_down"),
)


class HttpMetrics:
    """Of the whole server: answers by route and status, errors by code."""

    def __init__(self) -> None:
        self.answers: Counter[tuple[str, str, int]] = Counter()  # (method, route, status)
        self.durations: dict[
            tuple[str, str], list[float]
        ] = {}  # (method, route): the sum, and how many took up to each of DURATION
        self.errors: Counter[tuple[int, str]] = Counter(dict.fromkeys(EXPECTED, 0))

    def failed(self, status: int, code: str | None) -> None:
        """With a status below 400 it broke a stream off."""
        self.errors[status, code or "none"] += 1

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """``seconds``: until the last byte was sent."""
        self.answers[method, route, status] += 1
        taken = self.durations.setdefault((method, route), [0.0] * (len(DURATION) + 1))
        taken[0] += seconds
        for k, bound in enumerate(DURATION):
            taken[k + 1] += seconds <= bound
