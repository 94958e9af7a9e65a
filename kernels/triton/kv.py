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
from kernels.triton.caches import cache_arguments, load_scales, token_rows
from kernels.triton.dequant import whole
from kernels.triton.tile import every, tiles

LOG2_E = 1.4426950408889634
WIDEST = 512  # features of a product; what a head has beyond them is a product of its own
MAX_GROUP = 64  # query heads of a program
PARTS = {"": 1, "int4": 4}  # codes in a word; two of the others
FEW = 8  # where they are wide, and products plain arithmetic: more do not fit the shared memory of small cards
LOWEST = tl.constexpr(-1e30)  # where maxima start: not -inf, since -inf - -inf is NaN in a row that has seen nothing yet
LEAST_SCALE = tl.constexpr(2.0**-64)  # what a value's scale of zero counts as; its codes are zero


@remember
def capability(device: torch.device) -> int:
    """89 for a card of compute capability 8.9; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def in_registers(capability: int, dtype: torch.dtype) -> bool:
    """Whether products are plain arithmetic, whose operands are in registers: in float32, and before sm_80."""
    return dtype == torch.float32 or 0 < capability < 80


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
    (heads, size), kv_heads = q.shape[1:], cache.k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads over {kv_heads}: a multiple is needed")
    given, group = cache_arguments(cache, torch.int16), heads // kv_heads
    part = 16 * PARTS.get(given["CODE"], 2)  # products need 16 features
    width, side = max(triton.next_power_of_2(size), part), 0
    if width > WIDEST:
        width, side = WIDEST, max(triton.next_power_of_2(size - WIDEST), part)
    if cache.values_are_keys and not given["CODE"]:  # codes are widened twice, else operands would have to change places
        given["v_ptr"] = None
    most = (16 if given["CODE"] else 32) if side else MAX_GROUP  # codes are widened in registers, where queries are then, too
    most = FEW if width > 256 and in_registers(capability, q.dtype) else most
    sharing = next(n for n in range(1, group + 1) if group % n == 0 and group // n <= most)
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
        "WIDTH": width,
        "SIDE": side,
        "GROUP": group // sharing,
        "SHARING": sharing,
        "WINDOW": window is not None,
        "ASM": asm_level(capability),
    }


@triton.jit
def load_queries(q_ptr, rows, live, D: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(q, their sums): q [M, WIDTH] / parts, a tuple by place in a word of the cache, and [M, SIDE] / parts of what lies beyond.

    Zero beyond D and where not live. The sums, float32 [M], are 0 but for int4.
    """
    q, total = _load_queries(q_ptr + rows, live, D, WIDTH, CODE)
    if SIDE > 0:
        side, more = _load_queries(q_ptr + rows + WIDTH, live, D - WIDTH, SIDE, CODE)
        q, total = q + side, total + more
    return q, total


@triton.jit
def _load_queries(start, live, D: tl.constexpr, WIDTH: tl.constexpr, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    features = tl.arange(0, WIDTH)
    q = tl.load(start[:, None] + features[None, :], mask=live[:, None] & (features < D)[None, :], other=0.0)
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
    for i in tl.static_range(len(q)):
        acc = acc + (tl.zeros(q[i].shape, tl.float32),)  # type: ignore[assignment]
    return top, total, total if CODE == "int4" else 0.0, acc


@triton.jit
def finish(top, total, low, acc, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(attention float32 [M, WIDTH], that of the side, its log2-sum-exp2 [M]); zeros for rows that have seen nothing."""
    total = tl.maximum(tl.sum(total, 1), 1e-30)
    share = (1.0 / total)[:, None]
    low = tl.sum(low, 1)[:, None] * share if CODE == "int4" else 0.0
    PARTS: tl.constexpr = 1 if CODE == "" else 4 if CODE == "int4" else 2
    found, side = _joined(acc, 0, share, low, CODE), 0.0
    if len(acc) > PARTS:
        side = _joined(acc, PARTS, share, low, CODE)
    return found, side, top + tl.log2(total)


@triton.jit
def _joined(acc, FIRST: tl.constexpr, share, low, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """[M, features] of sums by place in a word, from the one numbered FIRST on."""
    if CODE == "":
        return acc[FIRST] * share
    elif CODE == "int4":
        even = tl.interleave(acc[FIRST] * share + low, acc[FIRST + 2] * share + low)
        return tl.interleave(even, tl.interleave(acc[FIRST + 1] * share + low, acc[FIRST + 3] * share + low))
    else:
        return tl.interleave(acc[FIRST] * share, acc[FIRST + 1] * share)


@triton.jit
def keep(to, rows, found, side, live, D: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """found and side to ``rows`` of to [.., D]."""
    at, features = to + rows[:, None] * D, tl.arange(0, WIDTH)[None, :]
    tl.store(at + features, found.to(to.dtype.element_ty), mask=live[:, None] & (features < D))
    if SIDE > 0:
        beyond = WIDTH + tl.arange(0, SIDE)[None, :]
        tl.store(at + beyond, side.to(to.dtype.element_ty), mask=live[:, None] & (beyond < D))


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
    PARTS: tl.constexpr = 1 if CODE == "" else 4 if CODE == "int4" else 2
    DTYPE: tl.constexpr = q[0].dtype
    tokens = first + tl.arange(0, BLOCK_N)
    live = tokens < end
    base, rows = token_rows(table, first, tokens, live, block_stride, token_stride, BLOCK_SIZE, BLOCK_N)
    base += kv_head * head_stride
    ITEMS: tl.constexpr = D // PARTS
    WIDTH: tl.constexpr = q[0].shape[1]
    SAME: tl.constexpr = v_ptr is None  # values are keys
    # In float32 keys and values of more than 256 features do not both fit the shared memory of small cards.
    LATE: tl.constexpr = tl.float32 == DTYPE and PARTS * WIDTH > 256
    tile_base, tile_rows = base, rows
    k = tiles(k_ptr + base, rows, live, q, ITEMS, PARTS, SAME, MASKED)
    if not (LATE or SAME):
        v = tiles(v_ptr + base, rows, live, q, ITEMS, PARTS, True, MASKED)
    k = every(k, DTYPE, CODE, ASM)
    scores = product(q[0], tl.trans(k[0]) if SAME else k[0], None, ASM)
    for i in tl.static_range(1, len(q)):
        scores = product(q[i], tl.trans(k[i]) if SAME else k[i], scores, ASM)
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
    if LATE and not SAME:
        v = tiles(v_ptr + tile_base, tile_rows, live, q, ITEMS, PARTS, True, MASKED)
    v = k if SAME else every(v, DTYPE, CODE, ASM)
    shares, sums = shares.to(DTYPE), ()
    for i in tl.static_range(len(q)):
        sums = sums + (product(shares, v[i], acc[i] * shrink[:, None], ASM),)  # type: ignore[assignment]
    return new_top, total, low, sums
