"""Decode attention over each kind of cache on this CPU: what a step of long contexts waits for. The table in docs/kv-cache.md.

python scripts/bench_kv.py [--context 16384] [--sequences 1] [--heads 32] [--kv-heads 8] [--size 128] [--queries 1]
    [--caches int8 ...] [--threads N]

With one thread its own time counts, and not what other processes take away.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from kernels.kv_cache import KVCache, quantize
from kernels.layout import SCALED_CACHES, kv_nbytes
from kernels.ops import Ops, PagedBatch, get_ops

BLOCK = 16


def filled(dtype: str, blocks: int, kv_heads: int, size: int) -> KVCache:
    """Every block holds normal values."""
    cache = KVCache.zeros(blocks, BLOCK, kv_heads, size, dtype=dtype, device=torch.device("cpu"))
    x = torch.randn(BLOCK, kv_heads, size)
    if dtype in SCALED_CACHES:
        codes, scales = quantize(x, dtype)
        for held in (cache.k_scale, cache.v_scale):
            held.copy_(scales)  # type: ignore[union-attr]
    else:
        codes = x.to(cache.k.dtype)
    for held in (cache.k, cache.v):
        held.copy_(codes)
    return cache


def step(sequences: int, context: int, queries: int) -> PagedBatch:
    """The last ``queries`` tokens of each sequence."""
    blocks = -(-context // BLOCK)
    positions = torch.arange(context - queries, context).repeat(sequences)
    tables = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    starts = torch.arange(0, (sequences + 1) * queries, queries, dtype=torch.int32)
    lengths = torch.full((sequences,), context, dtype=torch.int32)
    return PagedBatch(
        positions, torch.zeros_like(positions), starts, lengths, tables, queries, context, sequences if queries == 1 else 0
    )


def best(ops: Ops, q: torch.Tensor, cache: KVCache, batch: PagedBatch, repeats: int, clock: Callable[[], float]) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats + 1):
        begun = clock()
        ops.attention(q, cache, batch, scale=q.shape[-1] ** -0.5)
        times.append(clock() - begun)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {
        "context": 16384,
        "sequences": 1,
        "heads": 32,
        "kv-heads": 8,
        "size": 128,
        "queries": 1,
        "repeats": 15,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--caches", nargs="+", default=list(SCALED_CACHES), help="beside one in --dtype")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    ops = get_ops("cpu", threads=args.threads)
    batch = step(args.sequences, args.context, args.queries)
    q = torch.randn(args.sequences * args.queries, args.heads, args.size).to(getattr(torch, args.dtype))
    shape = f"{args.heads}/{args.kv_heads} heads of {args.size}"
    print(f"{ops.name}: {args.sequences} x {args.queries} queries over {args.context} tokens, {shape}, {args.dtype}")
    print("| cache | bytes a token | ms | GB/s | time of the first |\n|---|---|---|---|---|")
    first, clock = None, time.thread_time if args.threads == 1 else time.perf_counter
    for dtype in (args.dtype, *args.caches):
        cache = filled(dtype, batch.block_tables.numel(), args.kv_heads, args.size)
        seconds = best(ops, q, cache, batch, args.repeats, clock)
        first = first or seconds
        token = 2 * args.kv_heads * kv_nbytes(dtype, args.size)
        rate = token * args.sequences * args.context / seconds / 1e9
        print(f"| {dtype} | {token} | {1e3 * seconds:.2f} | {rate:.1f} | {seconds / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
