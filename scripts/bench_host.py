"""Host work of a step: scheduling, the step's inputs, events. The model does nothing, and whatever it is told is done at once.

    .venv/bin/python scripts/bench_host.py [--json FILE]

"ahead": as on a card, where tokens are drawn on the device and the next step is launched before the last one lands; with fewer
milliseconds than a step takes there, none of this is seen. "host": tokens are drawn by the host, as on a CPU: greedy, from logits
of a small vocabulary. Median and 99th percentile of steps of one token for each sequence.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from appliance.config import EngineConfig  # noqa: E402
from appliance.core.messages import Submit  # noqa: E402
from appliance.core.params import SamplingParams  # noqa: E402
from appliance.hub import demo_model  # noqa: E402
from appliance.memory.devices import _cpu_name  # noqa: E402
from appliance.memory.planner import make_plan  # noqa: E402
from appliance.runtime.engine import Engine  # noqa: E402
from appliance.runtime.runner import Runner  # noqa: E402

STEPS, PROMPT = 300, 120  # timed steps; tokens of a prompt, so that block tables have some length


class AtOnce:
    """A lane of a device that has always done what it was told."""

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def mark(self) -> Callable[[], None]:
        return lambda: None


def hollow(sequences: int, *, ahead: bool, caching: bool) -> Engine:
    """An engine whose model computes nothing."""
    config = EngineConfig(
        model=str(demo_model()), dtype="float32", reference_ops=True, max_model_len=PROMPT + STEPS + 40, threads=1,
        max_num_seqs=sequences, max_num_batched_tokens=4096, enable_prefix_caching=caching,
    )  # fmt: skip
    engine = Engine.load(config)
    decoder, five = engine.runner.decoder, torch.full((max(sequences, 64),), 5)
    ops = replace(
        decoder.ops, argmax=lambda logits: (logits[:, 5], five[: len(logits)]), sample=lambda *given: five[: len(given[0])]
    )
    if not ahead:
        ops = replace(ops, sample=None)
    plan = make_plan(demo_model(), config)
    runner = Runner(replace(decoder, ops=ops), plan, device=torch.device("cpu"), lane=AtOnce() if ahead else None)
    hidden, logits = torch.zeros(4096, decoder.spec.hidden), torch.zeros(64, decoder.spec.vocab)
    runner._forward = lambda ids, batch: hidden[: len(ids)]
    runner._logits = lambda rows: logits[: len(rows)]  # type: ignore[method-assign]
    engine.runner = runner
    return engine


def measure(sequences: int, *, ahead: bool, caching: bool = True, temperature: float = 0.0) -> dict[str, object]:
    engine = hollow(sequences, ahead=ahead, caching=caching)
    for i in range(sequences):
        params = SamplingParams(max_tokens=STEPS + 30, ignore_eos=True, temperature=temperature, seed=i)
        prompt = tuple((7 * i + 3 * j) % 250 + 3 for j in range(PROMPT))
        engine.submit(Submit(f"r{i}", prompt, params, time.time()))
    while len(engine.scheduler.running) < sequences or any(r.pending > 1 for r in engine.scheduler.running):
        engine.step()
    engine.step()
    times = []
    for _ in range(STEPS - 20):
        begun = time.perf_counter()
        engine.step()
        times.append(1e3 * (time.perf_counter() - begun))
    return {
        "sequences": sequences, "ahead": ahead, "caching": caching, "temperature": temperature,
        "median_ms": statistics.median(times), "p99_ms": statistics.quantiles(times, n=100)[98],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    print(f"{_cpu_name()}, Python {platform.python_version()}, torch {torch.__version__}, commit {commit}\n")
    print("| sequences | device | prefix cache | draws | median, ms | 99th percentile, ms |\n|---|---|---|---|---|---|")
    rows = []
    for ahead in (True, False):
        for caching, temperature in ((True, 0.0), (False, 0.0), (True, 0.8)) if ahead else ((True, 0.0), (False, 0.0)):
            for sequences in (1, 32, 256):
                row = measure(sequences, ahead=ahead, caching=caching, temperature=temperature)
                rows.append(row)
                print(
                    f"| {sequences} | {'ahead' if ahead else 'host'} | {'on' if caching else 'off'} | "
                    f"{'greedy' if not temperature else 'random'} | {row['median_ms']:.3f} | {row['p99_ms']:.3f} |"
                )
    if args.json:
        Path(args.json).write_text(json.dumps({"commit": commit, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
