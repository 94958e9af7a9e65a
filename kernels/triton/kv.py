"""A tile of a paged cache, folded into attention that is under way: what the decode and the prefill kernels share.

A tile is BLOCK_N consecutive tokens of one sequence and one key/value head. Token t lies in block ``table[t // BLOCK_SIZE]`` at
offset ``t % BLOCK_SIZE``; one entry of the table is read for a tile that fits a block, else one for each token. Scores are kept
in base 2 (score * scale * log2 e); ``fold`` updates, for each row r of queries,

    top[r] = max of scores    total[r] = sum of 2^(score - top)    acc[r, d] = sum of 2^(score - top) * v[d]

Codes (CODE: "e4m3", "e5m2", "int8", "int4") are read as 16-bit words of neighbours along the head dimension, two or four in each:
the features of each place in a word are a tensor of their own, with a product for scores and an accumulator of its own, because
operands of smaller elements would be gathered byte by byte. A token's scales never touch its elements. Its key's scale multiplies
its score. Its value's scale u multiplies its weight, and top is the maximum of score + log2 u, or nearly so: then shares,
weight * u, are at most 1.1 whatever the scales are, which fp16 needs, while ``total`` has the weights. In int4 a key's least
value has the same product with a row's queries as any other constant; a value's is the same for all features: one number for
each row, low.

    key = code * step + least      q . key = step * (q . codes) + least * sum of q
    value = code * u + least       acc += weight * u * code      low += weight * least      out = (acc + low) / total
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
from kernels.triton.caches import cache_arguments, load_scales
from kernels.triton.dequant import BASE, nibbles, whole
from kernels.triton.widen import widen

LOG2_E = 1.4426950408889634
MAX_GROUP = 64  # query heads that share a key/value head
PARTS = {"": 1, "int4": 4}  # codes in a word; two of the others
LOWEST = tl.constexpr(-1e30)  # where maxima start: not -inf, since -inf - -inf is NaN in a row that has seen nothing yet
LEAST_SCALE = tl.constexpr(2.0**-64)  # what a value's scale of zero counts as; its codes are zero


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
    q: Tensor, cache: KVCache, batch: PagedBatch, *, scale: float, window: int | None, cap: float | None, capability: int
) -> dict[str, Any]:
    """What both kernels are given, by the names of their arguments. ValueError for what they do not know."""
    heads, size = q.shape[1:]
    kv_heads = cache.k.shape[2]
    if heads % kv_heads or heads // kv_heads > MAX_GROUP:
        raise ValueError(f"{heads} query heads over {kv_heads}: a multiple of at most {MAX_GROUP} is needed")
    given = cache_arguments(cache, torch.int16)
    return {
        **given,
        "q_ptr": q,
        "starts_ptr": batch.query_starts,
        "lengths_ptr": batch.seq_lens,
        "tables_ptr": batch.block_tables,
        "q_token_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "table_stride": batch.block_tables.stride(0),
        "scale": LOG2_E * (scale if cap is None else 2 * scale / cap),  # see ``capped``
        "window": window or 0,
        "cap": None if cap is None else LOG2_E * cap,
        "D": size,
        "WIDTH": max(triton.next_power_of_2(size), 16 * PARTS.get(given["CODE"], 2)),  # products need 16 features
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
    """(q, their sums): q [M, WIDTH] / parts, a tuple by place in a word of the cache; zero beyond D and where not live.

    The sums, float32 [M], are 0 but for int4.
    """
    features = tl.arange(0, WIDTH)
    q = tl.load(q_ptr + rows[:, None] + features[None, :], mask=live[:, None] & (features < D)[None, :], other=0.0)
    if CODE == "":
        return (q,), 0.0
    else:
        even, odd = _apart(q)
        if CODE == "int4":
            first, third = _apart(even)
            second, fourth = _apart(odd)
            return (first, second, third, fourth), tl.sum(q.to(tl.float32), 1)
        else:
            return (even, odd), 0.0


@triton.jit
def _apart(x):  # type: ignore[no-untyped-def]
    return tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))


@triton.jit
def start(q, COLUMNS: tl.constexpr, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(top, total, low, acc) of the rows of ``q`` that have seen nothing; acc is a tuple like q.

    COLUMNS: BLOCK_N, and sums over tokens stay apart by their place in a tile until the end, which saves the threads that share a
    row from meeting for them; or 1, which saves registers. total and low are [M, COLUMNS].
    """
    top = tl.full((q[0].shape[0],), LOWEST, tl.float32)
    total = tl.zeros((q[0].shape[0], COLUMNS), tl.float32)
    acc = ()
    for _ in tl.static_range(len(q)):
        acc = acc + (tl.zeros(q[0].shape, tl.float32),)  # type: ignore[assignment]
    return top, total, total if CODE == "int4" else 0.0, acc


@triton.jit
def finish(top, total, low, acc, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(attention float32 [M, WIDTH], its log2-sum-exp2 [M]); zeros for rows that have seen nothing."""
    total = tl.maximum(tl.sum(total, 1), 1e-30)
    share = (1.0 / total)[:, None]
    if CODE == "":
        found = acc[0] * share
    elif CODE == "int4":
        low = tl.sum(low, 1)[:, None] * share
        even = tl.interleave(acc[0] * share + low, acc[2] * share + low)
        found = tl.interleave(even, tl.interleave(acc[1] * share + low, acc[3] * share + low))
    else:
        found = tl.interleave(acc[0] * share, acc[1] * share)
    return found, top + tl.log2(total)


@triton.jit
def numbers(words, DTYPE: tl.constexpr, CODE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tuple of what ``words`` of the cache hold, by place in a word: one, two or four tensors of their shape in DTYPE.

    In int4 a part of it: see dequant.whole.
    """
    if CODE == "":
        return (words.to(DTYPE),)
    elif CODE == "int4":
        base = -BASE if tl.float16 == DTYPE else 0  # so much do nibbles add
        return nibbles(words, tl.full(words.shape, base, DTYPE), ASM > 0 and tl.float32 != DTYPE)
    else:
        return widen(words, DTYPE, CODE, ASM)


@triton.jit
def product(a, b, acc, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """a @ b + acc, summed in float32. Without assembly the operands are float32: the interpreter's product knows no bf16."""
    if ASM == 0:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _log2(x):  # type: ignore[no-untyped-def]
    """Of float32 > 0, at most 0.09 too small: exponent and mantissa read as one number. The exact one takes ten times as long."""
    return x.to(tl.int32, bitcast=True).to(tl.float32) * (1.0 / 8388608.0) - 127.0


@triton.jit
def capped(x, cap):  # type: ignore[no-untyped-def]
    """cap * tanh(x * ln 2 / 2): +-cap at infinities, NaN of NaN; off by 6e-7 of the cap at most, where a card's exponential and
    quotient are off by two places each.

    2^x is e^2y for the y whose tanh is wanted, since ``arguments`` scales for that: it takes one exponential.
    """
    return cap - 2.0 * cap / (1.0 + tl.exp2(x))


@triton.jit
def _load(at, live, inside, MASKED: tl.constexpr, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words of a tile, 0 beyond the head (there is nothing where WHOLE) and, where MASKED, for tokens that are not live."""
    if MASKED:
        return tl.load(at, mask=live & inside, other=0)
    elif WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside, other=0)


@triton.jit
def _columns(x, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sum(x, 1, keep_dims=True) if COLUMNS == 1 else x


@triton.jit
def fold(  # type: ignore[no-untyped-def]
    q, q_sum, top, total, low, acc, positions,
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table, kv_head, first, end,
    block_stride, token_stride, head_stride, scale_block_stride, scale_token_stride, scale, window, cap,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """(top, total, low, acc) after the tokens first .. min(first + BLOCK_N, end) - 1.

    positions int [M]: of the rows' tokens; scale includes log2 e. cap: of scores, or None. MASKED: some row does not see all of
    the tile. WINDOW: ``window`` counts.
    """
    PARTS: tl.constexpr = len(q)
    DTYPE: tl.constexpr = q[0].dtype
    tokens = first + tl.arange(0, BLOCK_N)
    live = tokens < end
    base, rows = token_rows(table, first, tokens, live, block_stride, token_stride, BLOCK_SIZE, BLOCK_N)
    base += kv_head * head_stride
    ITEMS: tl.constexpr = D // PARTS
    items = tl.arange(0, q[0].shape[1])
    k_at = k_ptr + base + (rows[None, :] + items[:, None])
    v_at = v_ptr + base + (rows[:, None] + items[None, :])
    inside = items < ITEMS
    WHOLE: tl.constexpr = items.shape[0] == ITEMS
    # In float32 keys and values of more than 256 features do not both fit the shared memory of small cards.
    LATE: tl.constexpr = tl.float32 == DTYPE and PARTS * items.shape[0] > 256
    k = _load(k_at, live[None, :], inside[:, None], MASKED, WHOLE)
    if not LATE:
        v = _load(v_at, live[:, None], inside[None, :], MASKED, WHOLE)
    k = numbers(k, DTYPE, CODE, ASM)
    scores = product(q[0], k[0], None, ASM)
    for i in tl.static_range(1, PARTS):
        scores = product(q[i], k[i], scores, ASM)
    if CODE == "":
        scores *= scale
    else:
        base, rows = token_rows(table, first, tokens, live, scale_block_stride, scale_token_stride, BLOCK_SIZE, BLOCK_N)
        step, least = load_scales(k_scale_ptr + base + kv_head + rows, live, CODE)
        units, v_least = load_scales(v_scale_ptr + base + kv_head + rows, live, CODE)
        units = tl.where(units < LEAST_SCALE, LEAST_SCALE, units)  # NaN stays
        if CODE == "int4":
            step = whole(step, DTYPE, tl.int16)
        scores *= (step * scale)[None, :]
        if CODE == "int4":
            scores += (q_sum * scale)[:, None] * least[None, :]
    if cap is not None:
        scores = capped(scores, cap)
    if MASKED:
        seen = tokens[None, :] <= positions[:, None]
        if WINDOW:
            seen = seen & (tokens[None, :] > positions[:, None] - window)
        scores = tl.where(seen, scores, -float("inf"))
    if CODE == "":
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shares = weights
    else:
        new_top = tl.maximum(top, tl.max(scores + _log2(units)[None, :], 1))
        weights = tl.exp2(scores - new_top[:, None])
        shares = weights * (whole(units, DTYPE, tl.int16) if CODE == "int4" else units)[None, :]
    shrink = tl.exp2(top - new_top)
    total = total * shrink[:, None] + _columns(weights, total.shape[1])
    if CODE == "int4":
        low = low * shrink[:, None] + _columns(weights * v_least[None, :], low.shape[1])
    if LATE:
        v = _load(v_at, live[:, None], inside[None, :], MASKED, WHOLE)
    v, shares, sums = numbers(v, DTYPE, CODE, ASM), shares.to(DTYPE), ()
    for i in tl.static_range(PARTS):
        sums = sums + (product(shares, v[i], acc[i] * shrink[:, None], ASM),)  # type: ignore[assignment]
    return new_top, total, low, sums
