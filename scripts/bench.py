"""Measure the engine on one checkpoint: prefill, decode at several batch sizes, start-up, memory. Random token ids.

Decode is timed by difference, (33 tokens) - (1 token), so that prefill does not enter it; figures are medians of --repeat runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from appliance.config import EngineConfig
from appliance.core.messages import Submit
from appliance.core.params import SamplingParams
from appliance.hub import resolve
from appliance.runtime.engine import Engine
from appliance.runtime.worker import Client

ROOT = Path(__file__).resolve().parent.parent
PROMPT, TOKENS = 128, 32


def main() -> int:
    args = parse()
    config = EngineConfig(
        model=str(resolve(args.model, None)),
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        max_model_len=args.max_model_len,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
    )
    report: dict[str, object] = {
        "machine": machine(),
        "commit": commit(),
        "command": " ".join(["scripts/bench", *sys.argv[1:]]),
        "torch": torch.__version__,
        "memory_read_gb_s": round(memory_read_gb_s(args.threads), 1),
        "ready_s": round(ready_s(config), 2),
    }
    engine = Engine.load(config)
    rng = random.Random(args.seed)
    run(engine, rng, 1, PROMPT, 4)  # warm up: first-call costs of the libraries are not what is asked for
    report["prefill_512_tok_s"] = round(512 / median(lambda: run(engine, rng, 1, 512, 1), args.repeat), 1)
    report["decode_tok_s"] = {str(n): round(decode_tok_s(engine, rng, n, args.repeat), 1) for n in args.sequences}
    report["weight_bytes"] = engine.runner.decoder.nbytes
    report["rss_bytes"] = psutil.Process().memory_info().rss
    report["planned_bytes"] = engine.info.plan
    print(json.dumps(report, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=2 * 1024**3)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the report here")
    return parser.parse_args()


def run(engine: Engine, rng: random.Random, sequences: int, prompt: int, tokens: int) -> float:
    """Seconds to answer ``sequences`` fresh prompts of ``prompt`` random tokens with ``tokens`` tokens each."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    vocab = engine.info.vocab_size
    begun = time.perf_counter()
    for i in range(sequences):
        ids = tuple(rng.randrange(vocab // 100, vocab) for _ in range(prompt))
        engine.submit(Submit(f"bench-{i}", ids, params, time.time()))
    while engine.has_work:
        engine.step()
    return time.perf_counter() - begun


def decode_tok_s(engine: Engine, rng: random.Random, sequences: int, repeat: int) -> float:
    first = median(lambda: run(engine, rng, sequences, PROMPT, 1), repeat)
    whole = median(lambda: run(engine, rng, sequences, PROMPT, TOKENS + 1), repeat)
    return sequences * TOKENS / (whole - first)


def median(measure: Callable[[], float], repeat: int) -> float:
    return statistics.median(measure() for _ in range(repeat))


def ready_s(config: EngineConfig) -> float:
    """From a cold process to one that answers (files may be in the page cache)."""

    async def start() -> float:
        client = Client(config)
        begun = time.perf_counter()
        await client.start()
        took = time.perf_counter() - begun
        await client.stop()
        return took

    return asyncio.run(start())


def memory_read_gb_s(threads: int | None) -> float:
    """Best of five sums over 1 GiB with as many threads as the engine uses."""
    torch.set_num_threads(threads or psutil.cpu_count(logical=False) or 1)
    data = torch.ones(2**28)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - begun)
    return data.nbytes / min(times) / 1e9


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    field = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in info.splitlines())}
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    flags = [f for f in known if f in field.get("flags", "").split()]
    name = field.get("model name", platform.processor() or platform.machine())
    memory = psutil.virtual_memory().total / 1024**3
    return f"{name}, {psutil.cpu_count(logical=False)} cores, {memory:.0f} GiB, {' '.join(flags)}"


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
