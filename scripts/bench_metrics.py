"""What metrics cost: a scrape, and what is done for each token. Numbers of one core: run it on a quiet machine.

python scripts/bench_metrics.py
"""

from __future__ import annotations

import asyncio
import random
import time

from appliance.core.messages import Event, Stats
from appliance.core.params import SamplingParams
from appliance.server.hardware import Hardware
from appliance.server.metrics import Course, HttpMetrics, Metrics
from appliance.server.scrape import Model, Scrape

TOKENS, REQUESTS, SCRAPES = 200_000, 5_000, 100


def main() -> None:
    metrics, draw = Metrics("model"), random.Random(0)
    course, event = Course(0.0), Event("r", 0, (1,))
    gaps = [draw.expovariate(20) for _ in range(TOKENS)]
    begun, now = time.perf_counter(), 0.0
    for gap in gaps:
        metrics.tokens(course, event, now := now + gap)
    print(f"a token: {(time.perf_counter() - begun) / TOKENS * 1e6:.2f} us")
    begun = time.perf_counter()
    for _ in range(REQUESTS):
        metrics.finished("stop", Course(0.0, 0.1, 0.2, 1.0), 1.1, prompt_tokens=100, output_tokens=20)
        metrics.answered(SamplingParams(max_tokens=20), 20)
    print(f"a request: {(time.perf_counter() - begun) / REQUESTS * 1e6:.1f} us")
    http = HttpMetrics()
    for k in range(40):
        http.answered("GET", f"/route/{k}", 200, 0.1)
    look = asyncio.run(Hardware().latest())
    stats = Stats(step_sizes=dict.fromkeys(range(12), 9))
    for models in (1, 4):
        for vllm in (True, False):
            scrape, now_s = Scrape(http, vllm=vllm), []
            served = [Model(metrics if k == 0 else Metrics(f"model{k}"), stats, None, "ok", {}) for k in range(models)]
            for _ in range(SCRAPES):
                begun = time.perf_counter()
                text = scrape.text(served, look)
                now_s.append(time.perf_counter() - begun)
            names = "with vLLM's names" if vllm else "ours alone"
            print(f"a scrape of {models} models, {names}: median {sorted(now_s)[SCRAPES // 2] * 1e3:.2f} ms, {len(text)} bytes")


if __name__ == "__main__":
    main()
