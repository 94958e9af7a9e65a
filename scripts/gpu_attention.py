"""Attention over the paged cache, of one token a sequence and of prompts, beside SDPA over contiguous tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from gpu_bench import Bench, Row, words
from gpu_children import card_answers
from torch import Tensor
from torch.nn import functional as F

from kernels.kv_cache import quantize
from kernels.layout import SCALED_CACHES, kv_nbytes
from kernels.ops import KVCache, Ops, PagedBatch

BLOCK = 64
HEADS, KV_HEADS, SIZE = 32, 8, 128  # of an 8B model
GEMMA, CAP = (16, 8, 256), 50.0  # of Gemma 2 9B, whose scores are capped
KINDS = ("16 bits", *SCALED_CACHES)


def decode(
    bench: Bench,
    ops: Ops,
    dtype: torch.dtype,
    cases: Sequence[tuple[int, int]],
    kinds: Sequence[str] = KINDS[:1],
    *,
    gemma: bool = False,
) -> Iterator[Row]:
    """One new token of each of (sequences, context), with caches of each kind."""
    (heads, kv_heads, size, block), whose = sizes(bench, gemma), " of Gemma 2" * gemma
    cap = CAP if gemma else None

    def one(kind: str, sequences: int, context: int) -> Row:
        batch = step(sequences, context, 1, block, bench.device)
        nbytes = 2 * sequences * context * kv_heads * kv_nbytes(name(kind, dtype), size)
        caches = [cache(batch, block, kv_heads, size, dtype, kind) for _ in range(bench.copies(nbytes))]
        q = torch.randn(sequences, heads, size, device=bench.device).to(dtype)
        row: Row = {"op": f"decode attention{whose}, cache {kind}", "rows": sequences, "context": context, "dtype": words(dtype)}
        row["ours_s"] = bench.time(partial(ops.attention, q, batch=batch, scale=size**-0.5, cap=cap), caches)
        if kind == "16 bits" and not gemma:  # SDPA knows no cap
            dense = [contiguous(one, sequences, context) for one in caches[:8]]
            row |= beside(bench, partial(attend, q.unsqueeze(2)), dense)
        return row | {"bytes": nbytes, "ops": 4 * sequences * heads * size * context}

    wanted = [(kind, *case) for kind in kinds for case in cases]
    yield from bench.rows(
        (f"decode attention{whose} {sequences} x {context} {words(dtype)}, cache {kind}", partial(one, kind, sequences, context))
        for kind, sequences, context in wanted
    )


def prefill(
    bench: Bench, ops: Ops, dtype: torch.dtype, cases: Sequence[tuple[int, int, int]], *, gemma: bool = False
) -> Iterator[Row]:
    """The last ``length`` tokens of each of (sequences, context, length)."""
    (heads, kv_heads, size, block), whose = sizes(bench, gemma), " of Gemma 2" * gemma
    cap = CAP if gemma else None

    def one(sequences: int, context: int, length: int) -> Row:
        batch = step(sequences, context, length, block, bench.device)
        caches = [cache(batch, block, kv_heads, size, dtype, "16 bits") for _ in range(2)]
        q = torch.randn(sequences * length, heads, size, device=bench.device).to(dtype)
        row: Row = {
            "op": f"prefill attention{whose}",
            "rows": sequences,
            "length": length,
            "context": context,
            "dtype": words(dtype),
        }
        row["ours_s"] = bench.time(partial(ops.attention, q, batch=batch, scale=size**-0.5, cap=cap), caches, repeat=5)
        if not gemma:
            dense = [contiguous(one, sequences, context) for one in caches]
            row |= beside(bench, partial(attend, q.view(sequences, length, heads, size).transpose(1, 2)), dense)
        seen = length * context - length * (length - 1) // 2  # pairs of tokens of a sequence
        nbytes = 2 * sequences * (context * kv_heads + length * heads) * size * 2
        return row | {"bytes": nbytes, "ops": 4 * sequences * heads * size * seen}

    yield from bench.rows(
        (f"prefill attention{whose} {sequences} x {length} of {context} {words(dtype)}", partial(one, sequences, context, length))
        for sequences, context, length in cases
    )


def sizes(bench: Bench, gemma: bool = False) -> tuple[int, int, int, int]:
    """(heads, of keys and values, their size, block of the cache)."""
    if bench.small:
        return 4, 2, 32, 16
    return (*GEMMA, BLOCK) if gemma else (HEADS, KV_HEADS, SIZE, BLOCK)


def beside(bench: Bench, call: Callable[[Any], Tensor], items: Sequence[Any]) -> dict[str, float]:
    """SDPA's time; nothing where this torch has no such kernel."""
    try:
        return {"sdpa_s": bench.time(call, items, repeat=5)}
    except Exception as error:  # whatever version it is: a comparison less
        if not card_answers():
            raise
        print(f"no SDPA to compare with: {type(error).__name__}: {error}", flush=True)
        return {}


def attend(q: Tensor, kept: tuple[Tensor, Tensor]) -> Tensor:
    """q [S, Hq, L, D], the last of the tokens of keys and values [S, Hkv, T, D]."""
    length, context = q.shape[2], kept[0].shape[2]
    if 1 < length < context:
        from torch.nn.attention.bias import causal_lower_right

        return F.scaled_dot_product_attention(q, *kept, attn_mask=causal_lower_right(length, context), enable_gqa=True)
    return F.scaled_dot_product_attention(q, *kept, is_causal=length == context > 1, enable_gqa=True)


def name(kind: str, dtype: torch.dtype) -> str:
    """As kernels.layout has it."""
    return str(dtype).removeprefix("torch.") if kind == "16 bits" else kind


def cache(batch: PagedBatch, block: int, kv_heads: int, size: int, dtype: torch.dtype, kind: str) -> KVCache:
    """Full of what normal numbers are stored as."""
    found = KVCache.zeros(batch.block_tables.numel(), block, kv_heads, size, dtype=name(kind, dtype), device=batch.slots.device)
    x = torch.randn(block, kv_heads, size, device=batch.slots.device)
    for codes, scales in ((found.k, found.k_scale), (found.v, found.v_scale)):
        if scales is None:
            codes.normal_()
        else:  # one block's in all: what it takes to read them does not depend on what they are
            of_block = quantize(x, kind)
            codes.view(torch.uint8)[:], scales[:] = of_block[0].view(torch.uint8), of_block[1]
    return found


def contiguous(kept: KVCache, sequences: int, context: int) -> tuple[Tensor, Tensor]:
    """As many keys and values [S, Hkv, T, D] in one piece; in another order, which takes as long."""
    heads, size = kept.k.shape[2:]
    parts = (t.view(sequences, -1, heads, size)[:, :context].transpose(1, 2).contiguous() for t in (kept.k, kept.v))
    return next(parts), next(parts)


def step(sequences: int, context: int, length: int, block: int, device: torch.device) -> PagedBatch:
    """Every sequence has ``context`` tokens, the last ``length`` of which are this step's; blocks lie in random order."""
    blocks = -(-context // block)
    tables = torch.randperm(sequences * blocks).view(sequences, blocks)
    positions = torch.arange(context - length, context).repeat(sequences, 1)
    slots = tables.gather(1, positions // block) * block + positions % block
    return PagedBatch(
        positions=positions.flatten().to(device),
        slots=slots.flatten().to(device),
        query_starts=torch.arange(0, sequences * length + 1, length, dtype=torch.int32, device=device),
        seq_lens=torch.full((sequences,), context, dtype=torch.int32, device=device),
        block_tables=tables.to(torch.int32).to(device),
        max_query=length,
        max_seq=context,
    )
