"""What the cache spares: prompts that begin alike, completions of one prompt, and sequences that give way; on this machine's CPU.

    .venv/bin/python scripts/bench_cache.py --model DIR [--tokens 1024] [--json FILE]

Each figure is a time to the first token of a prompt of --tokens tokens (and a few of its own), alone here: computed whole;
with its beginning in the pool; with it in host memory; and the time that a sequence of that length is away when it is swapped out
and back, or computed again. Beside each of the last two stands what the plan's cost model says (appliance/memory/giving_way.py).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from appliance.config import EngineConfig  # noqa: E402
from appliance.core.messages import Submit  # noqa: E402
from appliance.core.params import SamplingParams  # noqa: E402
from appliance.memory.devices import this_device  # noqa: E402
from appliance.memory.giving_way import GivingWay  # noqa: E402
from appliance.runtime.engine import Engine  # noqa: E402
from models.spec import ModelSpec  # noqa: E402
from quant.headers import read_json  # noqa: E402

REPEAT, OWN = 3, 8  # runs of each case; tokens of its own that a prompt ends with


class Bench:
    def __init__(self, model: str, tokens: int) -> None:
        self.tokens, self.rng, self.count = tokens, random.Random(0), 0
        self.engine = Engine.load(EngineConfig(model=model, max_model_len=2 * tokens + 64, swap_space=2.0, max_num_seqs=16))

    def prompt(self, n: int) -> list[int]:
        return [self.rng.randrange(100, self.engine.info.vocab_size) for _ in range(n)]

    def first(self, prompt: list[int], n: int = 1) -> float:
        """Seconds to the first token of each of ``n`` completions of a prompt that is alone here."""
        self.count += 1
        params = SamplingParams(max_tokens=1, n=n, temperature=1.0 if n > 1 else 0.0, ignore_eos=True)
        self.engine.submit(Submit(f"r{self.count}", tuple(prompt), params, time.time()))
        begun = time.perf_counter()
        while self.engine.has_work:
            self.engine.step()
        return time.perf_counter() - begun

    def away(self, *, swap: bool) -> float:
        """Seconds that a sequence takes to give way, come back, and have its next token, less a step that only does the last."""
        scheduler = self.engine.scheduler
        scheduler.swaps = lambda request: swap
        scheduler.store.caching = False  # nothing is found again
        self.count += 1
        params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
        self.engine.submit(Submit(f"r{self.count}", tuple(self.prompt(self.tokens)), params, time.time()))
        times = []
        for step in range(12):
            if step == 8:
                scheduler._preempt(scheduler.running[0])
            begun = time.perf_counter()
            while not self.engine.step():
                pass
            times.append(time.perf_counter() - begun)
        self.engine.abort(f"r{self.count}")
        scheduler.store.caching = True
        return times[8] - statistics.median(times[2:8])

    def to_host(self) -> None:
        """Everything that is kept in the pool moves to host memory."""
        pool = self.engine.scheduler.pool
        blocks = pool.allocate(pool.free)
        assert blocks is not None
        pool.release(blocks)
        self.engine.runner.move(self.engine.scheduler.store.take_copies())


def run(model: str, tokens: int) -> dict[str, float]:
    bench = Bench(model, tokens)
    bench.first(bench.prompt(64))  # what the first one pays

    def median(case: str) -> float:
        times = []
        for _ in range(REPEAT):
            prefix = bench.prompt(tokens)
            if case != "whole":
                bench.first(prefix + bench.prompt(OWN))
            if case == "host":
                bench.to_host()
            times.append(bench.first(prefix + bench.prompt(OWN)))
        return statistics.median(times)

    found = {f"{case}_s": median(case) for case in ("whole", "pool", "host")}
    found["eight_completions_s"] = statistics.median(bench.first(bench.prompt(tokens), n=8) for _ in range(REPEAT))
    found["swap_s"] = statistics.median(bench.away(swap=True) for _ in range(REPEAT))
    found["recompute_s"] = statistics.median(bench.away(swap=False) for _ in range(REPEAT))
    kv = bench.engine.info.plan["kv_cache"]
    spec = ModelSpec.from_config(read_json(Path(bench.engine.info.directory) / "config.json"))
    weights = bench.engine.info.plan["weights_bytes"]["total"]  # type: ignore[index]
    cost = GivingWay.of(spec, this_device("cpu"), kv["block_bytes"], weights)  # type: ignore[index]
    found["swap_model_s"] = cost.swap_s(-(-tokens // kv["block_size"]))  # type: ignore[index]
    found["recompute_model_s"] = cost.recompute_s(tokens)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory with a checkpoint")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a prompt's beginning")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    found = run(args.model, args.tokens)
    print(f"{args.tokens} tokens")
    for name, seconds in found.items():
        print(f"  {name:<22}{1e3 * seconds:>10.1f} ms{seconds / found['whole_s']:>8.3f} of a whole prompt")
    if args.json:
        Path(args.json).write_text(json.dumps({"tokens": args.tokens, **found}, indent=1))


if __name__ == "__main__":
    main()
