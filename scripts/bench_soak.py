"""Mixed load for a long time: memory must stay where it was after warming up, and a fixed question must keep its answer.

Sums are rounded differently in steps of different sizes, so a log-probability may move a little and, between tokens that are as
likely as each other, the choice may too. What may not happen is more than that.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections import Counter
from typing import Any

import psutil

from appliance.config import EngineConfig
from appliance.core.messages import Event, Submit, TokenLogprob
from appliance.core.params import SamplingParams
from appliance.runtime.engine import Engine

MIB = 1024**2
ALLOWED = 32 * MIB  # between the second quarter of the time and the last: what allocators move to and fro
ENDS = {"stop", "length", "abort"}
PROBE = "probe"
DRIFT = 0.5  # by which a log-probability may move
TIE = 0.2  # difference of the two best log-probabilities below which either may be chosen


class Load:
    """Random requests: lone ones and bursts, short and long, greedy and sampled, with log-probabilities, some aborted."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self.engine, self.rng = engine, rng
        self.alive: Counter[str] = Counter()  # completions of each request that have not ended
        self.count = 0

    def submit(self) -> None:
        rng, longest = self.rng, self.engine.info.max_model_len
        self.count += 1
        output = min(rng.choice((1, 8, 32, 128)), longest // 2)
        prompt = rng.randint(1, max(1, min(longest - output, rng.choice((16, 128, 512, 2048)))))
        temperature = rng.choice((0.0, 0.7, 1.0))
        params = SamplingParams(
            n=rng.choice((1, 1, 3)) if temperature else 1,
            temperature=temperature,
            top_p=rng.choice((1.0, 0.9)),
            top_k=rng.choice((0, 0, 40)),
            repetition_penalty=rng.choice((1.0, 1.0, 1.1)),
            seed=rng.choice((None, 7)),
            logprobs=rng.choice((None, None, 5)),
            prompt_logprobs=rng.choice((None, None, None, 0)),
            max_tokens=output,
            ignore_eos=rng.random() < 0.5,
        )
        name = f"load-{self.count}"
        ids = tuple(rng.randrange(self.engine.info.vocab_size) for _ in range(prompt))
        self.engine.submit(Submit(name, ids, params, time.time()))
        self.alive[name] = params.n

    def arrive(self) -> list[Event]:
        """Before a step: now and then a request, a burst, or the end of one that runs; nothing while very many wait."""
        if len(self.alive) < 64 and self.rng.random() < 0.1:
            for _ in range(self.rng.choice((1, 1, 1, 2, 16))):
                self.submit()
        if self.alive and self.rng.random() < 0.02:
            return self.engine.abort(self.rng.choice(list(self.alive)))
        return []


class Watch:
    """What has been seen: memory over time, how requests ended, the answers of the probe."""

    def __init__(self, load: Load, prompt: tuple[int, ...]) -> None:
        self.load, self.prompt = load, prompt
        self.samples: list[tuple[float, int]] = []
        self.ended: Counter[str] = Counter()
        self.failures: list[str] = []
        self.first: list[TokenLogprob] = []  # the probe's first answer
        self.answer: list[TokenLogprob] | None = None  # of the probe that runs
        self.probes = self.ties = 0

    def ask(self) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=2)
        self.load.engine.submit(Submit(PROBE, self.prompt, params, time.time()))
        self.answer = []

    def take(self, events: list[Event], now: float) -> None:
        for event in events:
            if event.request_id == PROBE:
                assert self.answer is not None
                self.answer += event.logprobs or ()
            if event.finish_reason is None:
                continue
            self.ended[event.finish_reason] += 1
            if event.finish_reason not in ENDS:
                self.failures.append(f"after {now:.0f} s {event.request_id} ended with {event.finish_reason}: {event.error}")
            if event.request_id == PROBE:
                self.compare(now)
            else:
                self.load.alive[event.request_id] -= 1
                self.load.alive += Counter()  # drops those that have ended

    def compare(self, now: float) -> None:
        """The answer that is complete with the first one."""
        answer, self.answer = self.answer or [], None
        self.first = self.first or answer
        self.probes += 1
        wrong = difference(self.first, answer)
        if wrong is not None:
            self.failures.append(f"after {now:.0f} s the probe was answered differently: {wrong}")
        self.ties += wrong is None and [t.token_id for t in answer] != [t.token_id for t in self.first]

    def growth(self, seconds: float) -> int:
        """Bytes between the medians of the second and of the last quarter."""
        second = [rss for t, rss in self.samples if 0.25 <= t / seconds < 0.5]
        last = [rss for t, rss in self.samples if t / seconds >= 0.75]
        return round(statistics.median(last) - statistics.median(second)) if second and last else 0


def difference(first: list[TokenLogprob], again: list[TokenLogprob]) -> str | None:
    """How the second answer differs by more than rounding explains; nothing is compared after a tie that was chosen otherwise."""
    if len(first) != len(again):
        return f"{len(again)} tokens instead of {len(first)}"
    for i, (old, new) in enumerate(zip(first, again)):
        if abs(old.logprob - new.logprob) > DRIFT:
            return f"log-probability {new.logprob:.3f} instead of {old.logprob:.3f} at token {i}"
        if old.token_id != new.token_id:
            margin = old.top[0][1] - old.top[1][1]
            return None if margin < TIE else f"token {i} is {new.token_id} instead of {old.token_id}, which led by {margin:.3f}"
    return None


def soak(config: EngineConfig, *, seconds: float, probe_every: float, seed: int) -> dict[str, Any]:
    """Load the engine for ``seconds``, then let it finish. The report; ``failures`` is empty when all was well."""
    engine, rng, process = Engine.load(config), random.Random(seed), psutil.Process()
    load = Load(engine, rng)
    watch = Watch(load, tuple(rng.randrange(engine.info.vocab_size) for _ in range(24)))
    sample_every = min(5.0, seconds / 40)
    begun, asked, sampled = time.perf_counter(), -probe_every, -sample_every
    while (now := time.perf_counter() - begun) < seconds or engine.has_work:
        if now < seconds:
            watch.take(load.arrive(), now)
            if now - asked >= probe_every and watch.answer is None:
                asked = now
                watch.ask()
        if now - sampled >= sample_every:
            sampled = now
            watch.samples.append((round(now, 1), process.memory_info().rss))
            engine.check()
        if engine.has_work:
            watch.take(engine.step(), now)
        if len(watch.samples) % 60 == 0 and sampled == now:
            print(f"{now:.0f} s, {watch.samples[-1][1] / MIB:.0f} MiB, {dict(watch.ended)}", file=sys.stderr, flush=True)
    engine.check()
    return verdict(engine, watch, seconds)


def verdict(engine: Engine, watch: Watch, seconds: float) -> dict[str, Any]:
    stats, growth = engine.stats(), watch.growth(seconds)
    failures = list(watch.failures)
    if growth > ALLOWED:
        failures.append(f"memory grew by {growth / MIB:.0f} MiB after warming up; allowed are {ALLOWED // MIB}")
    if stats.blocks_used or +watch.load.alive:
        failures.append(f"{stats.blocks_used} blocks and {len(+watch.load.alive)} requests are left over")
    if watch.probes < 2:
        failures.append(f"the probe was answered {watch.probes} times: too few to compare; run longer")
    return {
        "minutes": round(seconds / 60, 2),
        "kernels": engine.info.kernels,
        "failures": failures,
        "requests": watch.load.count,
        "ended": dict(watch.ended),
        "steps": stats.steps,
        "prompt_tokens": stats.prompt_tokens,
        "generation_tokens": stats.generation_tokens,
        "preemptions": stats.preemptions,
        "probes": watch.probes,
        "probes_with_a_tie_chosen_otherwise": watch.ties,
        "rss_growth_bytes": growth,
        "rss_last_bytes": watch.samples[-1][1],
        "planned_bytes": engine.info.plan["total_bytes"],
        "samples": watch.samples,
    }
