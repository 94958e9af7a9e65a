"""Real serving traces through the scheduler and the block pool, on a simulated clock at the scale of an RTX 4090: no model.

    scripts/replay                               everything, into docs/benchmarks/replay.{md,json} and replay-*.svg
    scripts/replay --only hits host              some parts; the others stay as they are in the report
    scripts/replay --requests 500 --out /tmp     a quick look: the first requests of every trace

The scheduler, the pool, the prefix cache and the swapping are those of the engine (appliance/core); the size of the pool is that
of the plan (appliance/memory); the time of a step is replay_cost's. What it is compared with is in replay_rivals.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench import commit, machine
from gpu_predict import CARD
from replay_cost import BUS
from replay_report import write
from replay_setups import Setup, setups
from replay_sim import ENDLESS, Result
from replay_trace import Job, at_once, ideal_hits, lasting

from appliance.core.request import Request

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
REQUESTS = 5000  # of each trace, at most, where every system has all at once
SLOWDOWNS = (3.0, 10.0)  # the most load may make a request take so many times what it takes alone, by token of its answer
HALVINGS = 4  # of the range in which the most load is sought
LOADS = (0.3, 0.5, 0.7, 0.85, 1.0)  # requests a second, as shares of ours when all are there at once
SHOWN_LOAD = 0.7
TIERS, TIER_REQUESTS = (16, 64), 4000  # GiB of host memory, and how many requests of the trace
GIB = 2**30


def throughput(every: list[Setup]) -> dict[str, Any]:
    """All requests are there at once: what is done in a second."""
    found: dict[str, Any] = {}
    for setup in every:
        found[setup.name] = {}
        for name, make in setup.systems().items():
            found[setup.name][name] = setup.run(at_once(setup.jobs[:REQUESTS]), make()).summary()
            say(setup.name, name, f"{found[setup.name][name]['tok_s']:.0f} tok/s")
    return found


def load(every: list[Setup]) -> dict[str, Any]:
    """Arrivals of the trace, slower or faster: latency by load, and the most load that keeps SLOWDOWNS."""
    found: dict[str, Any] = {}
    for setup in every:
        if not setup.few:
            continue
        jobs = setup.jobs[: setup.few]
        whole = setup.run(at_once(jobs), setup.paged()).span
        apart = [replace(job, arrival=1e5 * i) for i, job in enumerate(jobs)]
        alone = setup.run(apart, setup.paged(caching=False)).per_token
        found[setup.name] = {"requests": len(jobs), "at_once_s": whole, "alone": alone, "systems": {}}
        for name, make in setup.systems().items():
            one = under_load(setup, jobs, whole, alone, make)
            found[setup.name]["systems"][name] = one
            say(setup.name, name, *(f"{rate:.2f}" for rate in one["most"]), "requests/s")
    return found


def under_load(setup: Setup, jobs: list[Job], whole: float, alone: float, make: Callable[[], Any]) -> dict[str, Any]:
    """One system at LOADS of the rate at which ours needs ``whole`` seconds; ``alone``: seconds a token of lonely requests."""

    def run(share: float) -> Result:
        return setup.run(lasting(jobs, whole / share), make())

    runs = {share: run(share) for share in LOADS}
    slowdown = {share: one.per_token / alone for share, one in runs.items()}
    most = [most_load(slowdown, lambda share: run(share).per_token / alone, limit) for limit in SLOWDOWNS]
    return {
        "curve": [{"load": share, **one.summary()} for share, one in runs.items()],
        "most": [share * len(jobs) / whole for share in most],
        "cdf": {key: cdf(getattr(runs[SHOWN_LOAD], key)) for key in ("ttft", "itl", "total")},
    }


def most_load(known: dict[float, float], slowdown: Callable[[float], float], limit: float) -> float:
    """The most load at which ``slowdown`` is ``limit`` at most; ``known`` are its values at some loads, in order."""
    good = [share for share, value in known.items() if value <= limit]
    low = max(good, default=0.0)
    high = min((share for share in known if share > low), default=2 * low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slowdown(middle) <= limit else (low, middle)
    return low


def cdf(values: Sequence[float], points: int = 100) -> list[float]:
    """Values at ``points`` + 1 even shares."""
    return [round(float(v), 6) for v in np.percentile(np.asarray(values), np.linspace(0, 100, points + 1))]


def waste(every: list[Setup]) -> dict[str, Any]:
    """Room that is taken and holds nothing: blocks of two sizes, and room in one piece, under load and with all there at once."""
    found: dict[str, Any] = {}
    for setup in every:
        systems = {"blocks of 16": lambda s=setup: s.paged(size=16), "blocks of 64": lambda s=setup: s.paged(size=64)}
        systems |= {name: make for name, make in setup.systems().items() if name.startswith("contiguous")}
        jobs = setup.jobs[: setup.few or 1000]
        whole = setup.run(at_once(jobs), setup.paged()).span
        found[setup.name] = {}
        for name, make in systems.items():
            one: dict[str, Any] = {"at_once": setup.run(at_once(jobs), make()).waste}
            if setup.few:
                seconds = whole / SHOWN_LOAD
                run = setup.run(lasting(jobs, seconds), make(), bucket=seconds / 100)
                series = [(round(k * seconds / 100, 1), round(v[0] / v[1], 5)) for k, v in sorted(run.series.items()) if v[1]]
                one |= {"under_load": run.waste, "series": series}
            found[setup.name][name] = one
            say(setup.name, name, f"waste {100 * one['at_once']:.2f} %")
    return found


def hits(every: list[Setup]) -> dict[str, Any]:
    """The prefix cache on a trace that says what repeats, by the size of the pool, against an ideal that knows no pool."""
    setup = next(s for s in every if s.jobs[0].shared)
    prompts = sum(job.prompt for job in setup.jobs)
    unlimited = sum(job.total for job in setup.jobs) + 64 * len(setup.jobs)
    sizes = [*(setup.tokens * n for n in (1, 8, 64) if setup.tokens * n < unlimited), unlimited]
    rows = []
    for tokens, host in [*((t, 0.0) for t in sizes), (setup.tokens, 256.0 * GIB)]:
        run = setup.run(at_once(setup.jobs), setup.paged(tokens, host=host))
        held = tokens + host / setup.cost.token_bytes
        ideal = ideal_hits(setup.jobs, float("inf") if tokens == unlimited else held) / prompts
        rows.append({"tokens": tokens, "host_bytes": host, "unlimited": tokens == unlimited, "ideal": ideal, **run.summary()})
        say(setup.name, f"{tokens} tokens, {host / GIB:.0f} GiB", f"hits {100 * run.hit_rate:.2f} %, ideal {100 * ideal:.2f} %")
    return {"trace": setup.name, "ideal": ideal_hits(setup.jobs) / prompts, "rows": rows}


def tiers(every: list[Setup]) -> dict[str, Any]:
    """Host memory that takes every block that the pool evicts, against ours, which takes what it expects back."""
    setup, rows = next(s for s in every if s.jobs[0].shared), []
    jobs = at_once(setup.jobs[:TIER_REQUESTS])
    for size in TIERS:
        for name in ("everything", "ours"):
            scheduler = setup.paged(host=size * GIB)
            if name == "everything":
                scheduler.store.ghosts.leaves = lambda key: True
            run = setup.run(jobs, scheduler)
            rows.append({"host_bytes": size * GIB, "takes": name, **run.summary()})
            say(setup.name, f"{size} GiB of host memory, {name}:", f"hits {100 * run.hit_rate:.2f} %")
    return {"trace": setup.name, "requests": len(jobs), "rows": rows}


def preemption(every: list[Setup]) -> dict[str, Any]:
    """A pool that is too small: computing anew against swapping to 8 GiB of host memory."""
    setup, rows = every[0], []
    jobs = at_once(setup.jobs[: setup.few // 2])
    for part in (1, 2, 4, 8):
        for name, how in {
            "recompute": {},
            "recompute, no prefix cache": {"caching": False},
            "swap": {"host": 8 * GIB},
            "swap, no prefix cache": {"host": 8 * GIB, "caching": False},
            "whichever is cheaper": {"host": 8 * GIB, "auto": True},
        }.items():
            run = setup.run(jobs, setup.paged(setup.tokens / part, **how))
            again = run.computed_tokens - sum(job.total - 1 for job in jobs) + run.hit_tokens
            rows.append({"tokens": setup.tokens // part, "how": name, "again": again, **run.summary()})
            say(setup.name, f"1/{part} of the pool, {name}", f"{rows[-1]['tok_s']:.0f} tok/s")
    return {"trace": setup.name, "requests": len(jobs), "rows": rows}


def host(every: list[Setup]) -> dict[str, Any]:
    """The scheduler's own processor time a step: steady decoding, and a queue that never ends over a pool that is full."""
    rows = []
    for size in (16, 64):
        for count in (1, 16, 64, 256):
            for kind in ("decoding", "busy"):
                found = host_us(every[0], size, count, kind == "busy")
                rows.append({"block_size": size, "running": count, "kind": kind, **found})
                say(f"blocks of {size}, {count} running, {kind}:", f"{rows[-1]['p50']:.0f} us, {rows[-1]['p99']:.0f} at the 99th")
    return {"rows": rows}


def host_us(setup: Setup, size: int, count: int, busy: bool, steps: int = 1000) -> dict[str, float]:
    """Microseconds of schedule() + commit() with ``count`` sequences. busy: each that ends makes room for the next one."""
    rng, scheduler, made = random.Random(1), setup.paged(size=size), 0
    scheduler.max_num_seqs = count
    steps = min(steps, setup.tokens // count - 128)  # all fit

    def add() -> None:
        nonlocal made
        prompt, answer = (rng.randint(50, 300), rng.randint(50, 250)) if busy else (50, steps)
        job = Job(made, 0.0, prompt, answer)
        scheduler.add(Request(str(made), 0, job.tokens(), prompt, ENDLESS, job.total, 0, 0.0))
        made += 1

    taken: list[int] = []
    while len(taken) < steps - 20 and (busy or made < count or scheduler.has_work):
        while (busy and len(scheduler.waiting) < 16) or made < count:
            add()
        begun = time.thread_time_ns()
        plan = scheduler.schedule()
        middle = time.thread_time_ns() - begun
        sampled = [2 * 10**8 if chunk.samples else None for chunk in plan.chunks]
        begun = time.thread_time_ns()
        scheduler.commit(plan, sampled)
        if len(scheduler.running) >= count - (count // 8 if busy else 0):
            taken.append(middle + time.thread_time_ns() - begun)
    return {"p50": float(np.percentile(taken, 50)) / 1e3, "p99": float(np.percentile(taken, 99)) / 1e3, "most": max(taken) / 1e3}


PARTS = {
    "throughput": throughput, "load": load, "waste": waste, "hits": hits, "tiers": tiers, "preemption": preemption, "host": host,
}  # fmt: skip


def facts(every: list[Setup]) -> dict[str, Any]:
    """What the runs stand on."""
    models = {
        s.model.name: {"tokens": s.tokens, "kv_token_bytes": s.cost.token_bytes, "decode_1_s": s.cost.step(1, 1, 1024, 0, 0),
                       "prompt_2048_s": s.cost.step(2048, 1, 0, 2048 * 2049 // 2, 2048), "launch_s": s.cost.launch_s, **s.limits}
        for s in every
    }  # fmt: skip
    traces = {
        s.name: {"requests": len(s.jobs), "few": s.few, "model": s.model.name, "seconds": s.jobs[-1].arrival,
                 "prompt": sum(j.prompt for j in s.jobs) / len(s.jobs), "answer": sum(j.answer for j in s.jobs) / len(s.jobs),
                 "longest": max(j.total for j in s.jobs)}
        for s in every
    }  # fmt: skip
    return {"card": CARD.name, "block_size": every[0].model.plan.kv.block_size, "bus": BUS, "models": models,
            "traces": traces, "slowdowns": SLOWDOWNS, "shown_load": SHOWN_LOAD}  # fmt: skip


def say(*words: str) -> None:
    print(*words, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED, help="the folder that holds traces/")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS), help="none: the report is only rewritten")
    parser.add_argument("--requests", type=int, help="take only so many of each trace")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    args = parser.parse_args(argv)
    if not (args.data / "traces").is_dir():
        say(f"{args.data / 'traces'} is absent; --data names the folder that holds traces/")
        return 2
    every, path = setups(args.data, args.requests), args.out / "replay.json"
    report = json.loads(path.read_text()) if path.exists() and len(args.only) < len(PARTS) else {"parts": {}}
    report["facts"] = facts(every)
    words = [f"--only {' '.join(args.only)}"] if len(args.only) < len(PARTS) else []
    words += [f"--requests {args.requests}"] if args.requests else []
    for name in args.only:
        begun = time.perf_counter()
        found = PARTS[name](every)
        report["parts"][name] = {
            "command": " ".join(["scripts/replay", *words]), "commit": commit(), "machine": machine(),
            "date": time.strftime("%Y-%m-%d"), "seconds": round(time.perf_counter() - begun), "found": found,
        }  # fmt: skip
        path.write_text(json.dumps(report, separators=(",", ":")) + "\n")
    write(report, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
