"""Traces of real services as jobs: when a request came, how long its prompt and its answer were, and what its prompt shares.

Azure's (AzurePublicDataset, 2023) tell lengths alone. Mooncake's conversation trace names every 512 tokens of a prompt by an id
that stands for them and for all before them, so equal ids are equal prefixes. The sample of ShareGPT has lengths and no times.
"""

from __future__ import annotations

import csv
import json
import random
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path

TRACE_BLOCK = 512  # tokens that an id of Mooncake's trace stands for
TICK_S = 3.0  # in which its times are given
FRESH, ANSWERS = 10**8, 2 * 10**8  # token ids of prompts that nobody shares, and of answers; ids of trace blocks are below them
SHAREGPT_ROUNDS = 20  # the sample is small: each of its conversations comes as often, in an order of its own each time


@dataclass(frozen=True, slots=True)
class Job:
    """A request of a trace. ``arrival`` is in seconds from the trace's begin."""

    number: int
    arrival: float
    prompt: int  # tokens
    answer: int
    shared: tuple[int, ...] = ()  # ids of the prompt's blocks of TRACE_BLOCK tokens; the last one may be shorter

    @property
    def total(self) -> int:
        return self.prompt + self.answer

    def tokens(self) -> list[int]:
        """The prompt: a block's tokens are all its id, so equal ids are equal tokens and other ids have none in common."""
        if not self.shared:
            return [FRESH + self.number] * self.prompt
        found = [block for block in self.shared for _ in range(TRACE_BLOCK)]
        del found[self.prompt :]
        return found

    @property
    def token(self) -> int:
        """What all tokens of the answer are: nobody else has them."""
        return ANSWERS + self.number


def azure(path: Path) -> list[Job]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]  # of 100 ns, as many digits as it reads
    pairs = zip(times, rows, strict=True)
    return [Job(i, t - times[0], int(r["ContextTokens"]), int(r["GeneratedTokens"])) for i, (t, r) in enumerate(pairs)]


def mooncake(path: Path) -> list[Job]:
    """Its times are whole ticks of three seconds: the requests of a tick are spread evenly over it."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    jobs = []
    for stamp, tick in groupby(enumerate(rows), lambda pair: pair[1]["timestamp"]):
        both = list(tick)
        for k, (i, r) in enumerate(both):
            time = stamp / 1e3 + TICK_S * k / len(both)
            jobs.append(Job(i, time, r["input_length"], r["output_length"], tuple(r["hash_ids"])))
    wrong = [j.number for j in jobs if len(j.shared) != -(-j.prompt // TRACE_BLOCK) or max(j.shared) >= FRESH]
    if wrong:
        raise ValueError(f"{path.name}: line {wrong[0] + 1} has not one id for each {TRACE_BLOCK} tokens")
    return jobs


def sharegpt(path: Path) -> list[Job]:
    """SHAREGPT_ROUNDS times the sample's first turns, each round in random order (seeded), all there at once."""
    rows, rng = json.loads(path.read_text()), random.Random(0)
    order = [row for _ in range(SHAREGPT_ROUNDS) for row in rng.sample(rows, len(rows))]
    return [Job(i, 0.0, row["prompt_tokens"], row["response_tokens"]) for i, row in enumerate(order)]


def at_once(jobs: Iterable[Job]) -> list[Job]:
    """The same jobs in the same order, all there from the start: what the most throughput is measured with."""
    return [replace(job, arrival=0.0) for job in jobs]


def lasting(jobs: Sequence[Job], seconds: float) -> list[Job]:
    """The same arrivals, slower or faster, so that the last one comes after ``seconds``."""
    scale = seconds / jobs[-1].arrival
    return [replace(job, arrival=job.arrival * scale) for job in jobs]


def ideal_hits(jobs: Iterable[Job], capacity: float = float("inf")) -> int:
    """Prompt tokens that a cache of the trace's own blocks would have: all of a prompt's blocks up to the first one unknown.

    One request at a time in the trace's order, of prompts alone. ``capacity`` in tokens: least recently used blocks leave, the
    tail of a prompt before its head. It knows nothing of pools, requests that run together, or answers.
    """
    cache: OrderedDict[int, int] = OrderedDict()  # id -> tokens; the end was used last
    held = hits = 0
    for job in jobs:
        sizes = [min(TRACE_BLOCK, job.prompt - at) for at in range(0, job.prompt, TRACE_BLOCK)]
        known = 0
        while known < len(job.shared) and job.shared[known] in cache:
            known += 1
        hits += sum(sizes[:known])
        for block, size in zip(reversed(job.shared), reversed(sizes)):
            if block not in cache:
                cache[block] = size
                held += size
            cache.move_to_end(block)
        while held > capacity:
            held -= cache.popitem(last=False)[1]
    return hits
