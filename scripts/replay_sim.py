"""Jobs through a scheduler with a simulated clock: each step takes what the cost model says; nothing but the clock is made up.

A step is scheduled when the one before has ended. (On a card the next step is decided while the last one runs, which shifts every
answer by less than a step; the scheduler's own time is hidden behind the card's and is measured apart.)
"""

from __future__ import annotations

import time
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from replay_cost import Cost
from replay_trace import Job

from appliance.core.params import RequestError, SamplingParams
from appliance.core.request import Request

SOON = 512  # requests that are queued at a time: which come later cannot matter to a queue served from its head
IDLE = 100  # steps without a token that may follow each other before it is called a standstill
ENDLESS = SamplingParams(max_tokens=None, ignore_eos=True)  # the length of an answer is its request's max_total


@dataclass(eq=False, slots=True)
class Track:
    """What is kept of a job under way."""

    job: Job
    hit: int = -1  # prompt tokens found in the cache when it was first computed; -1: it was not yet
    first: float = 0.0
    last: float = 0.0


@dataclass
class Result:
    """Seconds are the simulated clock's, but for ``host``."""

    jobs: int = 0
    refused: int = 0
    span: float = 0.0  # from the first arrival to the last token
    steps: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    hit_tokens: int = 0  # prompt tokens found in the cache at first
    computed_tokens: int = 0  # what went through the model, anew after preemptions too
    crossed_tokens: int = 0  # to the host and back
    preemptions: int = 0
    ttft: array[float] = field(default_factory=lambda: array("d"))  # of each request, from its arrival
    total: array[float] = field(default_factory=lambda: array("d"))
    answers: array[int] = field(default_factory=lambda: array("l"))  # tokens of each request's answer
    itl: array[float] = field(default_factory=lambda: array("d"))  # between each two tokens
    host: array[int] = field(default_factory=lambda: array("q"))  # nanoseconds of this thread's processor time, of each step
    running: array[int] = field(default_factory=lambda: array("l"))  # chunks of each step
    empty: float = 0.0  # tokens of room that hold nothing x seconds
    held: float = 0.0  # tokens of room that is taken x seconds
    batch: float = 0.0  # running requests x seconds
    busy: float = 0.0  # seconds in steps
    series: dict[int, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0, 0.0]))  # empty, held, seconds

    @property
    def waste(self) -> float:
        """Internal fragmentation: 1 - tokens stored / room taken, over time."""
        return self.empty / self.held if self.held else 0.0

    @property
    def hit_rate(self) -> float:
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def percentile(self, name: str, share: float) -> float:
        values = getattr(self, name)
        return float(np.percentile(np.asarray(values), share)) if len(values) else float("nan")

    @property
    def per_token(self) -> float:
        """Seconds from arrival to end for each token of an answer, the mean over requests (vLLM's normalized latency)."""
        return float(np.mean(np.asarray(self.total) / np.asarray(self.answers))) if len(self.total) else float("nan")

    def summary(self) -> dict[str, Any]:
        names = ("jobs", "refused", "span", "steps", "prompt_tokens", "answer_tokens", "hit_tokens", "computed_tokens")
        found = {
            name: getattr(self, name) for name in (*names, "crossed_tokens", "preemptions", "waste", "hit_rate", "per_token")
        }
        for name in ("ttft", "itl", "total"):
            found |= {f"{name}_p{share}": self.percentile(name, share) for share in (50, 99)}
        found |= {f"host_us_p{share}": self.percentile("host", share) / 1e3 for share in (50, 99)}
        found["answer_tok_s"] = self.answer_tokens / self.span
        found["tok_s"] = (self.answer_tokens + self.prompt_tokens) / self.span
        found["batch"], found["busy"] = self.batch / self.busy, self.busy / self.span
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()}


def room(scheduler: Any) -> tuple[int, int]:
    """(tokens of room that hold nothing, tokens of room that is taken). A block of several owners is full, and counted once."""
    if hasattr(scheduler, "stored"):  # a rival
        return scheduler.held - scheduler.stored, scheduler.held
    size = scheduler.pool.block_size
    return sum(len(r.blocks) * size - r.computed for r in scheduler.running), scheduler.pool.used * size


class Replay:
    """One run of ``jobs`` (in order of arrival). ``bucket``: seconds of one point of the series over time."""

    def __init__(self, jobs: Sequence[Job], scheduler: Any, cost: Cost, *, bucket: float = 10.0) -> None:
        self.jobs, self.scheduler, self.cost, self.bucket = jobs, scheduler, cost, bucket
        self.result, self.now, self._next, self._idle = Result(), 0.0, 0, 0
        self._tracks: dict[Request, Track] = {}

    def run(self) -> Result:
        while self._arrive() or self.scheduler.has_work:
            if self.scheduler.has_work:
                self.step()
            else:
                self.now = self.jobs[self._next].arrival
        self.result.span = self.now - self.jobs[0].arrival
        return self.result

    def _arrive(self) -> bool:
        """Queue who is there by now, some at a time. Whether more are to come."""
        while self._next < len(self.jobs) and len(self.scheduler.waiting) < SOON:
            job = self.jobs[self._next]
            if job.arrival > self.now:
                break
            self._next += 1
            self._queue(job)
        return self._next < len(self.jobs)

    def _queue(self, job: Job) -> None:
        request = Request(str(job.number), 0, job.tokens(), job.prompt, ENDLESS, job.total, 0, job.arrival)
        try:
            self.scheduler.add(request)
        except RequestError:
            self.result.refused += 1
        else:
            self._tracks[request] = Track(job)

    def step(self) -> None:
        """One step of the scheduler, and what it takes on the clock."""
        begun = time.thread_time_ns()
        plan = self.scheduler.schedule()
        host = time.thread_time_ns() - begun
        seconds = self._work(plan)
        empty, held = room(self.scheduler)
        result = self.result
        result.empty += empty * seconds
        result.held += held * seconds
        result.batch += len(plan.chunks) * seconds
        result.busy += seconds
        point = result.series[int(self.now / self.bucket)]
        point[0] += empty * seconds
        point[1] += held * seconds
        point[2] += seconds
        self.now += seconds
        sampled = [self._tracks[c.request].job.token if c.samples else None for c in plan.chunks]
        begun = time.thread_time_ns()
        self.scheduler.commit(plan, sampled)
        result.host.append(host + time.thread_time_ns() - begun)
        result.running.append(len(plan.chunks))
        result.steps += 1
        self._tell(plan)

    def _work(self, plan: Any) -> float:
        """Seconds of the step, and what it computes."""
        rows = sampled = cached = pairs = context = 0
        for chunk in plan.chunks:
            start, length = chunk.start, chunk.length
            rows += length
            sampled += chunk.samples
            if length == 1:
                cached += start + 1
            else:
                pairs += length * start + length * (length + 1) // 2
                context += start + length
            if len(chunk.request.tokens) == chunk.request.prompt_len:
                track = self._tracks[chunk.request]
                if track.hit < 0:
                    track.hit = start
                    self.result.hit_tokens += start
        self._idle = 0 if rows else self._idle + 1
        if self._idle > IDLE:
            raise RuntimeError(
                f"{IDLE} steps without work: {len(self.scheduler.running)} run, {len(self.scheduler.waiting)} wait"
            )
        self.result.computed_tokens += rows
        return (self.cost.step(rows, sampled, cached, pairs, context) if rows else 0.0) + self._copies(plan)

    def _copies(self, plan: Any) -> float:
        """Seconds of the blocks that move before the step (a rival's never do)."""
        copies = getattr(plan, "copies", ())
        if not copies:
            return 0.0
        size, crossing = self.scheduler.pool.block_size, sum(copy.kind != "copy" for copy in copies)
        self.result.crossed_tokens += crossing * size
        return self.cost.cross(crossing * size) + self.cost.copy((len(copies) - crossing) * size)

    def _tell(self, plan: Any) -> None:
        """The tokens that came out of the step, at the time it ended."""
        result, now = self.result, self.now
        for chunk in plan.chunks:
            if not chunk.samples:
                continue
            request = chunk.request
            track = self._tracks[request]
            if len(request.tokens) == request.prompt_len + 1:
                track.first = now
                result.ttft.append(now - track.job.arrival)
            else:
                result.itl.append(now - track.last)
            track.last = now
            if request.finished:
                self._end(self._tracks.pop(request), request)

    def _end(self, track: Track, request: Request) -> None:
        result, job = self.result, track.job
        if len(request.tokens) != job.total:
            raise RuntimeError(f"job {job.number} ended with {len(request.tokens)} tokens, not {job.total}")
        result.jobs += 1
        result.prompt_tokens += job.prompt
        result.answer_tokens += job.answer
        result.total.append(self.now - job.arrival)
        result.answers.append(job.answer)
        result.preemptions += request.preemptions
