"""Products on a card against what it can do (a copy's bandwidth, a large product's rate), cuBLAS and others' 4-bit kernels.

Weights and caches rotate among copies larger than the card's L2 cache, so that each launch reads them from memory; launches are
recorded into a CUDA graph, so that what is timed is the card and not Python. Figures are medians.
"""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from gpu_children import Notebook, card_answers
from gpu_rivals import gemlite, tinygemm
from torch import Tensor

from kernels.ops import Ops
from quant.tensor import QuantTensor

Row = dict[str, Any]
GROUP = 128
WARM_S = 0.025  # of the same work before it is timed: while nothing runs, and Triton compiles, a card lowers its clocks
LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
HEAD = (128256, 4096)


@dataclass(frozen=True)
class Bench:
    """Where and how much is measured. ``small``: sizes that Triton's interpreter can do, to try this out without a card.

    After ``deadline`` (of time.monotonic) no case begins. What is begun, left out or fails is noted in ``notebook``; cases that
    it has as begun are not begun again.
    """

    device: torch.device
    small: bool = False
    rotate_bytes: int = 256 << 20
    deadline: float = math.inf
    notebook: Notebook = field(default_factory=Notebook)

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
        begun = time.perf_counter()
        while time.perf_counter() < begun + WARM_S:
            graph.replay()
            torch.cuda.synchronize()
        spans = []
        for _ in range(repeat):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            spans.append(begin.elapsed_time(end) * 1e-3 / len(items))
        return statistics.median(spans)

    def has_time(self, what: str) -> bool:
        if time.monotonic() < self.deadline:
            return True
        self.notebook(left_out=what)
        return False

    def rows(self, cases: Iterable[tuple[str, Callable[[], Row]]]) -> Iterator[Row]:
        """What each of the cases, by its name, finds. One that fails is noted, and the next one goes on; not where the card is
        lost, or records nothing any more.
        """
        for case, work in cases:
            if case in self.notebook.begun or not self.has_time(case):
                continue
            self.notebook(begun=case)
            try:
                yield work()
            except Exception as error:  # the report must say what worked
                self.notebook(error=f"{case}: {words_of(error)}")
                traceback.print_exc()
                if not card_answers():
                    raise

    def copies(self, nbytes: int) -> int:
        return 1 if self.small else max(2, min(64, -(-self.rotate_bytes // nbytes)))


def limits(bench: Bench) -> Iterator[dict[str, float]]:
    """Bytes a second of a large copy (read and written both counted), and operations a second of large products by type."""

    def copy() -> dict[str, float]:
        size = 1 << (12 if bench.small else 30)
        a, b = (torch.empty(size, dtype=torch.uint8, device=bench.device).random_() for _ in range(2))
        return {"copy": 2 * size / bench.time(b.copy_, [a])}

    def product(dtype: torch.dtype) -> dict[str, float]:
        n = 64 if bench.small else 8192
        x, y = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
        return {words(dtype): 2 * n**3 / bench.time(x.matmul, [y])}

    yield from bench.rows(
        [("copy", copy), *((words(dtype), partial(product, dtype)) for dtype in (torch.float16, torch.bfloat16))]
    )


def random_weight(N: int, K: int, bits: int, device: torch.device) -> QuantTensor:
    """As a published checkpoint has it: groups of 128, random zero points; 8 bits with one scale an output."""
    group = GROUP if bits == 4 else K
    codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, device=device)
    scales = (0.5 + torch.rand(-(-K // group), N, device=device)).mul_(2 / (1 << bits) / K**0.5).half()
    zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8, device=device) if bits == 4 else None
    return QuantTensor.from_values(codes, scales=scales, zeros=zeros, bits=bits, group_size=group)


def products(bench: Bench, ops: Ops, dtype: torch.dtype, rows: Sequence[int]) -> Iterator[Row]:
    """Products of an 8B model's layers (4 bits) and of its int8 head, beside others."""
    shapes = {"o": (256, 256)} if bench.small else {**LLAMA_8B, "head": HEAD}
    for name, (N, K) in shapes.items():
        bits, title = (8 if name == "head" else 4), f"products {name} {N}x{K} {words(dtype)}"

        @cache
        def weights(N: int = N, K: int = K, bits: int = bits) -> tuple[list[Any], list[Tensor], dict[str, Any]]:
            count = bench.copies(N * K * bits // 8)
            packed = [ops.pack(random_weight(N, K, bits, bench.device), dtype=dtype) for _ in range(count)]
            dense = [torch.randn(N, K, device=bench.device).to(dtype).t() for _ in range(bench.copies(2 * N * K))]
            return packed, dense, rivals(bench, N, K, dtype, count) if bits == 4 else {}

        def product(m: int, row: Row, weights: Callable[[], Any] = weights) -> Row:
            packed, dense, others = weights()
            N, K = row["N"], row["K"]
            x = torch.randn(m, K, device=bench.device).to(dtype)
            row["ours_s"] = bench.time(partial(ops.matmul, x), packed)
            row["dense_s"] = bench.time(x.matmul, dense)
            row |= {f"{other}_s": bench.time(call(x), items) for other, (call, items, most) in others.items() if m <= most}
            return row | {"bytes": packed[0].nbytes + 2 * m * (N + K), "ops": 2 * m * N * K}

        if bench.has_time(title):
            told: Row = {"op": f"w{bits}a16", "shape": name, "N": N, "K": K, "dtype": words(dtype)}
            yield from bench.rows((f"{title}, {m} rows", partial(product, m, {**told, "rows": m})) for m in rows)


def rounded(bench: Bench, ops: Ops, dtype: torch.dtype, rows: Sequence[int]) -> Iterator[Row]:
    """4-bit products with activations rounded to int8, which is part of the time."""
    for name, (N, K) in ({"o": (256, 256)} if bench.small else LLAMA_8B).items():
        title = f"int8 activations {name} {N}x{K} {words(dtype)}"

        @cache
        def weights(N: int = N, K: int = K) -> list[Any]:
            found = (random_weight(N, K, 4, bench.device) for _ in range(bench.copies(N * K // 2)))
            return [ops.pack(weight, dtype=dtype, activation="int8") for weight in found]

        def product(m: int, row: Row, weights: Callable[[], list[Any]] = weights) -> Row:
            packed, N, K = weights(), row["N"], row["K"]
            x = torch.randn(m, K, device=bench.device).to(dtype)
            row["ours_s"] = bench.time(partial(ops.matmul, x), packed)
            return row | {"bytes": packed[0].nbytes + 2 * m * (N + K), "ops": 2 * m * N * K}

        if bench.has_time(title):
            told: Row = {"op": "w4a8", "shape": name, "N": N, "K": K, "dtype": words(dtype)}
            yield from bench.rows((f"{title}, {m} rows", partial(product, m, {**told, "rows": m})) for m in rows)


def rivals(bench: Bench, N: int, K: int, dtype: torch.dtype, count: int) -> dict[str, Any]:
    """By name: a product with x for Bench.time, weights for it, and the most rows that it is asked for."""
    if not bench.card:
        return {}
    found = {"tinygemm": (*tinygemm(N, K, GROUP, count, bench.device), 64)}
    found["gemlite"] = (*gemlite(N, K, GROUP, dtype, count, bench.device), math.inf)
    return {name: one for name, one in found.items() if one[1]}


def words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def words_of(error: BaseException) -> str:
    """One line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:400]
