"""What loading a model takes, with the native code that reads checkpoints and with torch's operators in its place.

    .venv/bin/python scripts/bench_load.py --model DIR [--quantization int8|int4] [--rounds N] [--threads N]

Both load in processes of their own, in turns: medians of wall seconds and of processor seconds of ``load_model``, from files that
the system has in memory. What else a start takes (imports, the cache) is not in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

KINDS = ("native", "torch")


def load(model: str, quantization: str | None, threads: int | None, kind: str) -> dict[str, float]:
    """Seconds of one load, in this process."""
    import torch

    from appliance.config import EngineConfig
    from appliance.memory.devices import cpu_threads
    from appliance.memory.planner import make_plan
    from appliance.runtime.startup import Timeline, load_decoder
    from quant import extension

    config = EngineConfig(
        model=model, quantization=quantization, threads=threads, max_model_len=512, kv_cache_memory_bytes=1 << 26
    )
    torch.set_num_threads(cpu_threads(threads))
    plan = make_plan(Path(model), config)
    if kind == "torch":
        extension.provide(lambda: None)
    begun, busy = time.perf_counter(), time.process_time()
    decoder, _ = load_decoder(config, plan, torch.device("cpu"), Timeline(0.0), None)
    return {"wall": time.perf_counter() - begun, "busy": time.process_time() - busy, "bytes": decoder.nbytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(load(args.model, args.quantization, args.threads, args.one)))
        return
    from bench import commit, machine

    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for number in range(2 * args.rounds):
        kind = KINDS[number % 2]
        command = [sys.executable, __file__, *sys.argv[1:], "--one", kind]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        if told.returncode:
            sys.exit(told.stderr)
        found[kind].append(json.loads(told.stdout.splitlines()[-1]))
    print(f"{time.strftime('%Y-%m-%d')}, commit {commit()}, {machine()}, {args.rounds} rounds")
    size, how = found["native"][0]["bytes"], args.quantization or "as published"
    print(f"{Path(args.model).name}, {how}: {size / 1e9:.2f} GB once loaded\n")
    print("| seconds | wall | of processors |\n|---|---|---|")
    for kind, runs in found.items():
        print(f"| {kind} | {' | '.join(f'{statistics.median(run[key] for run in runs):.2f}' for key in ('wall', 'busy'))} |")


if __name__ == "__main__":
    main()
