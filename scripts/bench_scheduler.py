"""What the scheduler costs: schedule() plus commit() of a step, in microseconds of processor time.

    python scripts/bench_scheduler.py

At 1, 16 and 256 running sequences of 2000 tokens in blocks of 16: alone; with prefix cache and second tier; with a queue of 1000
whose head is a prompt of 8000 tokens that finds no room; with turns besides; and in a pool that runs dry.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from appliance.core.blocks import BlockPool
from appliance.core.params import SamplingParams
from appliance.core.request import Request
from appliance.core.scheduler import Scheduler

SIZE, PROMPT, STEPS = 16, 2000, 400
PARAMS = SamplingParams(max_tokens=None, ignore_eos=True)


def request(name: str, prompt: int, answer: int, rng: random.Random) -> Request:
    tokens = [rng.randrange(100_000) for _ in range(prompt)]
    return Request(name, 0, tokens, prompt, PARAMS, prompt + answer, 0, 0.0)


def filled(running: int, *, room: int = 400, host: bool = False, **options: object) -> Scheduler:
    """A scheduler with so many sequences amid their answers, and ``room`` free blocks."""
    rng = random.Random(0)
    blocks = max(600, running * -(-(PROMPT + 1) // SIZE) + room)
    scheduler = Scheduler(
        BlockPool(blocks, SIZE),
        max_num_batched_tokens=8192,
        max_num_seqs=max(running, 2),
        host=BlockPool(blocks, SIZE) if host else None,
        **options,  # type: ignore[arg-type]
    )
    for i in range(running):
        scheduler.add(request(str(i), PROMPT, 4 * STEPS, rng))
    while any(r.pending > 1 or not r.running for r in (*scheduler.running, *scheduler.waiting)):
        step(scheduler)
    return scheduler


def step(scheduler: Scheduler) -> None:
    plan = scheduler.schedule()
    scheduler.commit(plan, [7 if chunk.samples else None for chunk in plan.chunks])


def queue(scheduler: Scheduler, head: int) -> Scheduler:
    rng = random.Random(1)
    scheduler.add(request("head", head, 100, rng))
    for i in range(999):
        scheduler.add(request(f"w{i}", 100, 100, rng))
    return scheduler


def measure(name: str, make: Callable[[], Scheduler], steps: int = STEPS) -> None:
    scheduler = make()
    times = []
    for _ in range(steps):
        begun = time.process_time_ns()
        step(scheduler)
        times.append((time.process_time_ns() - begun) / 1000)
    times.sort()
    print(f"{name:60} {times[len(times) // 2]:8.0f} {times[len(times) * 99 // 100]:8.0f} {times[-1]:8.0f}", flush=True)


def main() -> None:
    print(f"{'':60} {'median':>8} {'99 %':>8} {'most':>8}")
    for n in (1, 16, 256):
        tight = n * STEPS // SIZE  # enough blocks for all steps
        measure(f"{n} running", lambda n=n, r=tight + 400: filled(n, room=r))
        measure(f"{n}, prefix cache and second tier", lambda n=n, r=tight + 400: filled(n, room=r, host=True, caching=True))
        measure(
            f"{n}, a queue of 1000, its head of 8000 tokens has no room",
            lambda n=n: queue(filled(n, room=n * STEPS // SIZE + 40, host=True, caching=True), 8000),
        )
        measure(
            f"{n}, the same, and turns of 64 tokens",
            lambda n=n: queue(filled(n, room=n * STEPS // SIZE + 40, host=True, caching=True, fair_tokens=64), 8000),
        )
        measure(f"{n}, a pool that runs dry", lambda n=n: filled(n, room=n, host=True, caching=True))


if __name__ == "__main__":
    main()
