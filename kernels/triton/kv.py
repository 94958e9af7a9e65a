"""A tile of a paged cache, folded into attention that is under way: what the decode and the prefill kernels share.

A tile is BLOCK_N consecutive tokens of one sequence and one key/value head. Token t lies in block ``table[t // BLOCK_SIZE]`` at
offset ``t % BLOCK_SIZE``; one entry of the table is read for a tile that fits a block, else one for each token. Scores are kept
in base 2 (score * scale * log2 e); ``fold`` updates, for each row r of queries,

    top[r] = max of scores    total[r] = sum of 2^(score - top)    acc[r, d] = sum of 2^(score - top) * v[d]

Bytes (CODE: "e4m3", "e5m2", "int8") are read as 16-bit words, two neighbours along the head dimension in each: the even and the
odd features are tensors of their own, with two products for scores and two accumulators, because operands of byte elements would
be gathered byte by byte. An int8 token's scales never touch its elements. Its key's scale multiplies its score. Its value's scale
u joins the exponent, 2^(score + log2 u - top), so that shares stay in 0..1 whatever the scales are, which fp16 needs; ``total``
gets the shares divided by u again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as remember
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import KVCache, PagedBatch
from kernels.triton.widen import widen

LOG2_E = 1.4426950408889634
MAX_GROUP = 64  # query heads that share a key/value head
CODES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8"}
LOWEST = tl.constexpr(-1e30)  # where maxima start: not -inf, since -inf - -inf is NaN in a row that has seen nothing yet
LEAST_SCALE = tl.constexpr(2.0**-64)  # what a value's scale of zero counts as; its codes are zero


def cache_arguments(cache: KVCache) -> dict[str, Any]:
    """What a kernel needs of a cache, by the names of its arguments. ValueError for a cache that is not laid out as assumed."""
    k, v, k_scale, v_scale = cache.k, cache.v, cache.k_scale, cache.v_scale
    if k.stride() != v.stride() or k.stride(3) != 1 or k.dtype != v.dtype:
        raise ValueError("keys and values must be of one type and layout, with the head dimension contiguous")
    if cache.block_size & (cache.block_size - 1):
        raise ValueError(f"a block of {cache.block_size} tokens: a power of two is needed")
    code = CODES.get(k.dtype, "")
    scale_strides: tuple[int, ...] = (0, 0)
    if code == "int8":
        if k_scale is None or v_scale is None or k_scale.stride() != v_scale.stride() or k_scale.stride(2) != 1:
            raise ValueError("an int8 cache needs the scales of keys and of values in one layout, with the heads contiguous")
        scale_strides = k_scale.stride()[:2]
    if code:
        if k.shape[3] % 2:
            raise ValueError(f"a cache of bytes needs an even head size, not {k.shape[3]}")
        k, v = k.view(torch.int16), v.view(torch.int16)
    names = ("block_stride", "token_stride", "head_stride", "scale_block_stride", "scale_token_stride")
    strides = dict(zip(names, (*k.stride()[:3], *scale_strides), strict=True))
    tensors = {"k_ptr": k, "v_ptr": v, "k_scale_ptr": k_scale, "v_scale_ptr": v_scale}
    return {**tensors, **strides, "D": cache.k.shape[3], "BLOCK_SIZE": cache.block_size, "CODE": code}


@remember
def capability(device: torch.device) -> int:
    """89 for a card of compute capability 8.9; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def asm_level(capability: int) -> int:
    """What ``widen`` may use: nothing in the interpreter, conversions of FP8 from sm_89 on."""
    return 0 if not capability else 2 if capability >= 89 else 1


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: rows and tokens of a tile, warps of a program, stages of its pipeline."""

    ROWS: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def arguments(
    q: Tensor, cache: KVCache, batch: PagedBatch, *, scale: float, window: int | None, capability: int
) -> dict[str, Any]:
    """What both kernels are given, by the names of their arguments. ValueError for what they do not know."""
    heads, size = q.shape[1:]
    kv_heads = cache.k.shape[2]
    if heads % kv_heads or heads // kv_heads > MAX_GROUP:
        raise ValueError(f"{heads} query heads over {kv_heads}: a multiple of at most {MAX_GROUP} is needed")
    given = cache_arguments(cache)
    return {
        **given,
        "q_ptr": q,
        "starts_ptr": batch.query_starts,
        "lengths_ptr": batch.seq_lens,
        "tables_ptr": batch.block_tables,
        "q_token_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "table_stride": batch.block_tables.stride(0),
        "scale": scale * LOG2_E,
        "window": window or 0,
        # Products need 16 features, halves of them 16 each.
        "WIDTH": max(triton.next_power_of_2(size), 32 if given["CODE"] else 16),
        "GROUP": heads // kv_heads,
        "WINDOW": window is not None,
        "ASM": asm_level(capability),
    }


@triton.jit
def token_rows(  # type: ignore[no-untyped-def]
    table, first, tokens, live, block_stride, token_stride, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """(base, rows [BLOCK_N]): where ``tokens`` = first + 0.. lie in a cache with these strides; first is a multiple of BLOCK_N.

    A tile inside a block has one base, int64, and rows that are the same for all tiles. Else the rows are int64, and in block 0
    where not live.
    """
    if BLOCK_N <= BLOCK_SIZE:
        block = tl.load(table + first // BLOCK_SIZE).to(tl.int64)
        return block * block_stride + first % BLOCK_SIZE * token_stride, tl.arange(0, BLOCK_N) * token_stride
    else:
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        return 0, blocks * block_stride + tokens % BLOCK_SIZE * token_stride


@triton.jit
def load_queries(q_ptr, rows, live, D: tl.constexpr, WIDTH: tl.constexpr, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(q [M, WIDTH], 0), or its even and its odd features where the cache holds bytes; zero beyond D and where not live."""
    features = tl.arange(0, WIDTH)
    q = tl.load(q_ptr + rows[:, None] + features[None, :], mask=live[:, None] & (features < D)[None, :], other=0.0)
    if CODE == "":
        return q, 0
    else:
        return tl.split(q.reshape(q.shape[0], WIDTH // 2, 2))


@triton.jit
def start(ROWS: tl.constexpr, WIDTH: tl.constexpr, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(top, total, acc, odd) of rows that have seen nothing; odd is 0 where features are not taken apart."""
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if CODE == "":
        return top, total, tl.zeros((ROWS, WIDTH), tl.float32), 0
    else:
        return top, total, tl.zeros((ROWS, WIDTH // 2), tl.float32), tl.zeros((ROWS, WIDTH // 2), tl.float32)


@triton.jit
def finish(top, total, acc, odd, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(attention float32 [M, WIDTH], its log2-sum-exp2 [M]); zeros for rows that have seen nothing."""
    total = tl.maximum(total, 1e-30)
    share = 1.0 / total
    if CODE == "":
        return acc * share[:, None], top + tl.log2(total)
    else:
        return tl.interleave(acc * share[:, None], odd * share[:, None]), top + tl.log2(total)


@triton.jit
def product(a, b, acc, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """a @ b + acc, summed in float32. Without assembly the operands are float32: the interpreter's product knows no bf16."""
    if ASM == 0:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def fold(  # type: ignore[no-untyped-def]
    q, q_odd, top, total, acc, odd, positions,
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table, kv_head, first, end,
    block_stride, token_stride, head_stride, scale_block_stride, scale_token_stride, scale, window,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """(top, total, acc, odd) after the tokens first .. min(first + BLOCK_N, end) - 1.

    positions int [M]: of the rows' tokens; scale includes log2 e. MASKED: some row does not see all of the tile. WINDOW:
    ``window`` counts.
    """
    tokens = first + tl.arange(0, BLOCK_N)
    live = tokens < end
    base, rows = token_rows(table, first, tokens, live, block_stride, token_stride, BLOCK_SIZE, BLOCK_N)
    base += kv_head * head_stride
    ITEMS: tl.constexpr = D if CODE == "" else D // 2
    items = tl.arange(0, WIDTH if CODE == "" else WIDTH // 2)
    k_at = k_ptr + base + (rows[None, :] + items[:, None])
    v_at = v_ptr + base + (rows[:, None] + items[None, :])
    inside = items < ITEMS
    if MASKED:
        k = tl.load(k_at, mask=live[None, :] & inside[:, None], other=0)
        v = tl.load(v_at, mask=live[:, None] & inside[None, :], other=0)
    elif items.shape[0] == ITEMS:
        k, v = tl.load(k_at), tl.load(v_at)
    else:
        k = tl.load(k_at, mask=inside[:, None], other=0)
        v = tl.load(v_at, mask=inside[None, :], other=0)
    if CODE == "":
        scores = product(q, k.to(q.dtype), None, ASM) * scale
    else:
        k_even, k_odd = widen(k, q.dtype, CODE, ASM)
        scores = product(q_odd, k_odd, product(q, k_even, None, ASM), ASM) * scale
    if CODE == "int8":
        base, rows = token_rows(table, first, tokens, live, scale_block_stride, scale_token_stride, BLOCK_SIZE, BLOCK_N)
        base += kv_head
        units = tl.maximum(tl.load(v_scale_ptr + base + rows, mask=live, other=1.0), LEAST_SCALE)
        scores = scores * tl.load(k_scale_ptr + base + rows, mask=live, other=1.0)[None, :] + tl.log2(units)[None, :]
    if MASKED:
        seen = tokens[None, :] <= positions[:, None]
        if WINDOW:
            seen = seen & (tokens[None, :] > positions[:, None] - window)
        scores = tl.where(seen, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    shares = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    weights = shares * (1.0 / units)[None, :] if CODE == "int8" else shares
    total = total * shrink + tl.sum(weights, 1)
    if CODE == "":
        acc = product(shares.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], ASM)
    else:
        v_even, v_odd = widen(v, q.dtype, CODE, ASM)
        acc = product(shares.to(q.dtype), v_even, acc * shrink[:, None], ASM)
        odd = product(shares.to(q.dtype), v_odd, odd * shrink[:, None], ASM)
    return new_top, total, acc, odd
