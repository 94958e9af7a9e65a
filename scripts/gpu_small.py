"""Kernels that only read and write: norms, rotation with the cache's writes, SiLU, sampling, against the bandwidth of a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_attention import KINDS, cache, name, sizes, step
from gpu_bench import Bench, Row, words
from torch import Tensor

from kernels.layout import kv_nbytes
from kernels.ops import Ops


def kernels(bench: Bench, ops: Ops, dtype: torch.dtype) -> Iterator[Row]:
    """Each for few and for many tokens, with an 8B model's sizes. Memory counts once for each time that it must move."""
    hidden, inner, vocabulary = (256, 256, 1000) if bench.small else (4096, 14336, 128256)
    for tokens in (1, 3) if bench.small else (1, 32, 256, 4096):
        if not bench.has_time(f"small kernels, {tokens} tokens, {words(dtype)}"):
            continue

        def row(op: str, call: Callable[[Any], Any], make: Callable[[], Any], nbytes: int, tokens: int = tokens) -> Row:
            items = [make() for _ in range(bench.copies(nbytes))]
            told = {"op": op, "rows": tokens, "dtype": words(dtype), "small": True}
            return told | {"ours_s": bench.time(call, items), "bytes": nbytes, "ops": 0}

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=bench.device).to(dtype)

        assert ops.gelu_mul is not None
        norm = partial(ops.rms_norm, weight=normal(hidden), eps=1e-6)
        works: dict[str, Callable[[], Row]] = {
            "norm": partial(row, "norm", norm, partial(normal, tokens, hidden), 4 * tokens * hidden),
            "silu": partial(row, "silu(gate) * up", ops.silu_mul, partial(normal, tokens, 2 * inner), 6 * tokens * inner),
            "gelu": partial(row, "gelu(gate) * up", ops.gelu_mul, partial(normal, tokens, 2 * inner), 6 * tokens * inner),
            **{f"rotation, {kind}": partial(rotation, bench, ops, dtype, tokens, row, kind) for kind in KINDS},
        }
        if tokens <= 256:
            works["sampling"] = partial(sampling, bench, ops, vocabulary, tokens, row)
        yield from bench.rows((f"{op}, {tokens} tokens, {words(dtype)}", work) for op, work in works.items())


def rotation(bench: Bench, ops: Ops, dtype: torch.dtype, tokens: int, row: Callable[..., Row], kind: str) -> Row:
    heads, kv_heads, size, block = sizes(bench)
    batch = step(1, tokens, tokens, block, bench.device)
    kept, angles = cache(batch, block, kv_heads, size, dtype, kind), torch.rand(tokens, size, device=bench.device)
    width = (heads + 2 * kv_heads) * size

    def make() -> Tensor:
        return torch.randn(tokens, width, device=bench.device).to(dtype)

    def call(qkv: Tensor) -> Tensor:
        return ops.rope_store(qkv, heads, kept, batch, angles)

    written = 2 * kv_heads * kv_nbytes(name(kind, dtype), size)
    return row(f"rotate, write to {kind}", call, make, tokens * (2 * width + 2 * heads * size + written))


def sampling(bench: Bench, ops: Ops, vocabulary: int, tokens: int, row: Callable[..., Row]) -> Row:
    """With top-k and top-p."""
    device = bench.device
    k, p = torch.full((tokens,), 50, device=device), torch.full((tokens,), 0.95, device=device)
    warm, draws = torch.ones(tokens, device=device), torch.rand(tokens, dtype=torch.float64, device=device)

    def make() -> Tensor:
        return 3 * torch.randn(tokens, vocabulary, device=device)

    assert ops.sample is not None
    return row("sample, top-k and top-p", partial(draw, ops, warm, k, p, draws), make, 4 * tokens * vocabulary)


def draw(ops: Ops, warm: Tensor, k: Tensor, p: Tensor, draws: Tensor, logits: Tensor) -> Tensor:
    assert ops.sample is not None
    return ops.sample(logits, warm, k, p, None, draws)
