"""Kernels on a card against what it can do (a copy's bandwidth, a large product's rate), cuBLAS, torch's 4-bit kernel and SDPA.

Weights and caches rotate among copies larger than the card's L2 cache, so that each launch reads them from memory; launches are
recorded into a CUDA graph, so that what is timed is the card and not Python. Figures are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.ops import KVCache, Ops, PagedBatch
from quant.tensor import QuantTensor

Row = dict[str, Any]
GROUP = 128
LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
HEAD = (128256, 4096)


@dataclass(frozen=True)
class Bench:
    """Where and how much is measured. ``small``: sizes that Triton's interpreter can do, to try this out without a card."""

    device: torch.device
    small: bool = False
    rotate_bytes: int = 256 << 20

    @property
    def card(self) -> bool:
        return self.device.type == "cuda"

    def time(self, call: Callable[[Any], Any], items: Sequence[Any], repeat: int = 20) -> float:
        """Median seconds of ``call(item)``, the items (which mean the same work on other data) taken in turn."""
        if not self.card:
            begun = time.perf_counter()
            call(items[0])
            return time.perf_counter() - begun
        for item in items:
            call(item)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for item in items:
                call(item)
        graph.replay()
        spans = []
        for _ in range(repeat):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            spans.append(begin.elapsed_time(end) * 1e-3 / len(items))
        return statistics.median(spans)

    def copies(self, nbytes: int) -> int:
        return 1 if self.small else max(2, min(64, -(-self.rotate_bytes // nbytes)))


def limits(bench: Bench) -> dict[str, float]:
    """Bytes a second of a large copy (read and written both counted), and operations a second of large products by type."""
    size = 1 << (12 if bench.small else 30)
    a, b = (torch.empty(size, dtype=torch.uint8, device=bench.device) for _ in range(2))
    found = {"copy": 2 * size / bench.time(b.copy_, [a])}
    n = 64 if bench.small else 8192
    for dtype in (torch.float16, torch.bfloat16):
        x, y = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
        found[str(dtype).removeprefix("torch.")] = 2 * n**3 / bench.time(x.matmul, [y])
    return found


def random_weight(N: int, K: int, bits: int, device: torch.device) -> QuantTensor:
    """As a published checkpoint has it: groups of 128, random zero points; 8 bits with one scale an output."""
    group = GROUP if bits == 4 else K
    codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, device=device)
    scales = (0.5 + torch.rand(-(-K // group), N, device=device)).mul_(2 / (1 << bits) / K**0.5).half()
    zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8, device=device) if bits == 4 else None
    return QuantTensor.from_values(codes, scales=scales, zeros=zeros, bits=bits, group_size=group)


def products(bench: Bench, ops: Ops, dtype: torch.dtype, rows: Sequence[int]) -> Iterator[Row]:
    """Fused products of an 8B model's layers and its int8 head, beside cuBLAS on dense weights and torch's 4-bit kernel."""
    shapes = {"o": (256, 256)} if bench.small else {**LLAMA_8B, "head": HEAD}
    for name, (N, K) in shapes.items():
        bits = 8 if name == "head" else 4
        count = bench.copies(N * K * bits // 8)
        packed = [ops.pack(random_weight(N, K, bits, bench.device), dtype=dtype) for _ in range(count)]
        dense = [torch.randn(N, K, device=bench.device).to(dtype).t() for _ in range(bench.copies(2 * N * K))]
        tiny = tinygemm(bench, N, K, count) if bits == 4 and bench.card else []
        for m in rows:
            x = torch.randn(m, K, device=bench.device).to(dtype)
            row: Row = {"op": f"w{bits}a16", "shape": name, "N": N, "K": K, "rows": m, "dtype": str(dtype).removeprefix("torch.")}
            row["ours_s"] = bench.time(partial(ops.matmul, x), packed)
            row["dense_s"] = bench.time(x.matmul, dense)
            if tiny and m <= 64:
                row["tinygemm_s"] = bench.time(partial(multiply_tiny, x.to(torch.bfloat16)), tiny)
            row["bytes"] = packed[0].nbytes + 2 * m * (N + K)
            row["ops"] = 2 * m * N * K
            yield row
        del packed, dense, tiny


def tinygemm(bench: Bench, N: int, K: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Random weights for torch's ``_weight_int4pack_mm``; none where this torch has another packer."""
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=bench.device)
    scales = torch.rand(K // GROUP, N, 2, device=bench.device).to(torch.bfloat16)
    try:
        return [(torch.ops.aten._convert_weight_to_int4pack(codes, 8), scales.clone()) for _ in range(count)]
    except (RuntimeError, AttributeError):
        return []


def multiply_tiny(x: Tensor, weight: tuple[Tensor, Tensor]) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm(x, weight[0], GROUP, weight[1])


def attend_dense(q: Tensor, cache: tuple[Tensor, ...]) -> Tensor:
    """q [S, Hq, 1, D] over keys and values [S, Hkv, T, D], contiguous."""
    return torch.nn.functional.scaled_dot_product_attention(q, *cache, enable_gqa=True)


def attention(bench: Bench, ops: Ops, dtype: torch.dtype, cases: Sequence[tuple[int, int]]) -> Iterator[Row]:
    """Decode of (sequences, context) with an 8B model's heads over shuffled blocks, beside SDPA over a contiguous cache."""
    heads, kv_heads, size, block = (4, 2, 32, 16) if bench.small else (32, 8, 128, 16)
    for sequences, context in cases:
        blocks = -(-context // block)
        shape = (sequences * blocks, block, kv_heads, size)
        nbytes = 2 * sequences * context * kv_heads * size * dtype.itemsize
        caches = [
            KVCache(*(torch.randn(shape, device=bench.device).to(dtype) for _ in "kv")) for _ in range(bench.copies(nbytes))
        ]
        q = torch.randn(sequences, heads, size, device=bench.device).to(dtype)
        batch = decode_batch(sequences, context, block, bench.device)
        row: Row = {"op": "decode attention", "rows": sequences, "context": context, "dtype": str(dtype).removeprefix("torch.")}
        row["ours_s"] = bench.time(partial(ops.attention, q, batch=batch, scale=size**-0.5), caches)
        dense = [
            tuple(t.view(sequences, -1, kv_heads, size)[:, :context].transpose(1, 2).contiguous() for t in (c.k, c.v))
            for c in caches[:8]
        ]
        row["sdpa_s"] = bench.time(partial(attend_dense, q.unsqueeze(2)), dense)
        row["bytes"], row["ops"] = nbytes, 4 * sequences * heads * size * context
        yield row
        del caches, dense


def decode_batch(sequences: int, context: int, block: int, device: torch.device) -> PagedBatch:
    """Every sequence has ``context`` tokens, the last of which is this step's; blocks lie in random order."""
    blocks = -(-context // block)
    tables = torch.randperm(sequences * blocks).view(sequences, blocks)
    last = torch.full((sequences,), context - 1)
    slots = tables[:, (context - 1) // block] * block + (context - 1) % block
    return PagedBatch(
        positions=last.to(device),
        slots=slots.to(device),
        query_starts=torch.arange(sequences + 1, dtype=torch.int32, device=device),
        seq_lens=torch.full((sequences,), context, dtype=torch.int32, device=device),
        block_tables=tables.to(torch.int32).to(device),
        max_query=1,
        max_seq=context,
    )


def kernels(bench: Bench, ops: Ops) -> list[Row]:
    """Every row of the kernel benchmarks, printed as they come."""
    rows = (1, 3) if bench.small else (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
    cases: Sequence[tuple[int, int]] = (
        ((1, 40), (2, 33)) if bench.small else ((1, 4096), (1, 32768), (8, 4096), (32, 1024), (32, 4096), (128, 1024))
    )
    found = []
    for dtype in (torch.float16,) if bench.small else (torch.bfloat16, torch.float16):
        for row in (*products(bench, ops, dtype, rows), *attention(bench, ops, dtype, cases)):
            found.append(row)
            print(row, flush=True)
    return found
