"""x [M, K] times a weight of 4 or 8 bits, dequantized on its way into the product (float16 or bfloat16, sums in float32).

    program (n, m, s): BM rows by BN outputs; tiles s * per .. of the inputs, 128 at a time

    tile of the weight      | words: each is inputs 32 apart      |  -> four planes [BN, 32], each a left-hand side by itself
    rows of x, same inputs  | 0..31 | 32..63 | 64..95 | 96..127 |      the four right-hand sides, [32, BM]

The weight is on the left because the matrix instructions take 16 lines there, and 8 on the right, and rows are few.
A group's scale multiplies the group's sum, not each weight, unless a tile has 64 rows or more and groups of 32 or 64. Of these a
thread has no fewer sums than weights, and sums of a group beside those of all do not fit its registers (sm_90): there the scale
multiplies weights, which are rounded once, as those of slab.py are. Without a split the epilogue adds bias and residual and
rounds once; with one, partial sums go to float32 [splits, M, N], and ``finish`` adds them in order: no atomics, so that results
repeat.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.dequant import byte_pairs, nibbles, scaled, whole
from kernels.triton.gate import gate_mul

FLAT = tl.constexpr(64)  # from so many rows on products have two dimensions
LINES = tl.constexpr(32)  # outputs of a warp, where they have three


@triton.jit
def _params(scaling, group, column, padded, parts: tl.constexpr, SCALE: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(scale float32 [BN], addend [BN]) of a group."""
    at = scaling + tl.cast(group, tl.int64) * (parts * padded) + column
    first = tl.load(at)
    if parts == 2:
        scale = first.to(tl.float32, bitcast=True)
        bits = tl.load(at + padded)
    elif tl.float32 == SCALE:  # FP8: no addend
        scale, bits = first.to(tl.float32, bitcast=True), first
    else:
        scale = first.to(tl.int16).to(SCALE, bitcast=True).to(tl.float32)
        bits = first >> 16
    return scale, bits.to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _dot(weights, given, acc, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc plus weights [BN, inputs] times given [inputs, BM]; acc as ``_zeros`` has it."""
    if len(acc.shape) == 3:
        weights = tl.reshape(weights, (acc.shape[0], acc.shape[1], weights.shape[1]))
        given = tl.broadcast_to(given[None, :, :], (acc.shape[0], given.shape[0], given.shape[1]))
    if ASM:
        return tl.dot(weights, given, acc)
    else:  # the interpreter's product knows no bfloat16
        return tl.dot(weights.to(tl.float32), given.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def _zeros(BN: tl.constexpr, BM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of BN outputs for BM rows.

    Of three dimensions for few rows, a product for each warp: such products are never those of four warps at once (wgmma), which
    fence and wait, and every compiler spreads their first dimension over the warps.
    """
    if BM < FLAT:
        return tl.zeros((BN // LINES, LINES, BM), tl.float32)
    else:
        return tl.zeros((BN, BM), tl.float32)


@triton.jit
def _beside(scale, acc):  # type: ignore[no-untyped-def]
    """scale [BN] in the shape in which it multiplies acc."""
    if len(acc.shape) == 3:
        return tl.reshape(scale, (acc.shape[0], acc.shape[1], 1))
    else:
        return scale[:, None]


@triton.jit
def sums(  # type: ignore[no-untyped-def]
    rows, words, scaling, inside, column, begin, end, K, padded, tiles,
    BITS: tl.constexpr, SLICES: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr, SCALE: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BM]: outputs ``column`` of a weight times rows of x, over its tiles ``begin`` .. ``end`` of inputs.

    rows: pointers [1, BM] to where these begin; those that are not ``inside`` [1, BM] count as zeros.
    """
    DTYPE: tl.constexpr = rows.dtype.element_ty
    PLANE: tl.constexpr = 32  # inputs of a product
    k = tl.arange(0, PLANE)
    x_at = rows + begin * 128 + k[:, None]
    LINE: tl.constexpr = 8 * BITS  # words of a tile's output
    tile_at = (column // 128).to(tl.int64) * tiles + begin
    w_at = words + tile_at[:, None] * (128 * LINE) + (column % 128)[:, None] * LINE + k[None, :]
    acc, scale = _zeros(BN, BM), tl.zeros((BN,), tl.float32)
    SCALED: tl.constexpr = SLICES > 1 and BM >= FLAT
    for tile in range(begin, end):
        left = K - tile * 128
        if BITS == 4:
            packed = tl.load(w_at, eviction_policy="evict_first")
        group = 0 if WHOLE else tile * SLICES
        total = acc if WHOLE or SCALED else _zeros(BN, BM)
        for j in tl.static_range(4):
            if (j * SLICES) % 4 == 0:  # a group begins
                if j > 0 and not SCALED:
                    acc += total * _beside(scale, acc)
                    total = _zeros(BN, BM)
                scale, addend = _params(scaling, group + j * SLICES // 4, column, padded, PARTS, SCALE, DTYPE)
                addend = tl.broadcast_to(addend[:, None], (BN, PLANE))
                if BITS == 4:
                    w0, w1, w2, w3 = nibbles(packed, addend, ASM)
            if EVEN:
                given = tl.load(x_at + j * PLANE, mask=inside, other=0.0)
            else:
                given = tl.load(x_at + j * PLANE, mask=inside & (k + j * PLANE < left)[:, None], other=0.0)
            if BITS == 8:
                if j % 2 == 0:
                    packed = tl.load(w_at + j // 2 * PLANE, eviction_policy="evict_first")
                if j % 2 == 0 or SLICES == 4:
                    w0, w1 = byte_pairs(packed, addend, ASM)
                plane = w0 if j % 2 == 0 else w1
            else:
                plane = w0 if j == 0 else w1 if j == 1 else w2 if j == 2 else w3
            if SCALED:
                plane = scaled(plane, scale[:, None], SCALE, ASM)
            total = _dot(plane, given, total, ASM)
        acc = total if WHOLE or SCALED else acc + total * _beside(scale, acc)
        x_at += 128
        w_at += 128 * LINE
    acc = whole(tl.reshape(acc, (BN, BM)), DTYPE, words.dtype.element_ty)
    if WHOLE:
        acc *= scale[:, None]
    return acc


@triton.jit(do_not_specialize=["M"])  # rows: one compilation for all of them
def product(  # type: ignore[no-untyped-def]
    x, words, scaling, bias, residual, out,
    M, N, K, padded, tiles, x_stride,
    BITS: tl.constexpr, SLICES: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr, SCALE: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """padded: N in whole tiles. out: [M, N], or float32 [splits, M, N].

    SLICES: groups in a tile; WHOLE: one group has all inputs, so its scale comes last. EVEN: K is a multiple of 128.
    """
    part, splits = tl.program_id(2), tl.num_programs(2)
    per = tl.cdiv(tiles, splits)
    begin, end = part * per, tl.minimum(part * per + per, tiles)
    row, column = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (row < M)[None, :]
    acc = sums(
        x + row.to(tl.int64)[None, :] * x_stride, words, scaling, inside, column, begin, end, K, padded, tiles,
        BITS, SLICES, WHOLE, PARTS, SCALE, EVEN, BM, BN, ASM,
    )  # fmt: skip
    mask = inside & (column < N)[:, None]
    at = (part.to(tl.int64) * M + row)[None, :] * N + column[:, None]
    if BIAS:
        acc += tl.load(bias + column, mask=column < N, other=0.0)[:, None]
    if RESIDUAL:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def finish(  # type: ignore[no-untyped-def]
    parts, bias, residual, out, M, N, columns, SPLITS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    GATED: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [M, columns] of parts float32 [SPLITS, M, N]: summed in order, bias, gate, residual, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    start = parts + row * N + column
    found = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(SPLITS):
        found += tl.load(start + tl.cast(i, tl.int64) * M * N, mask=mask, other=0.0)
    if BIAS:
        found += tl.load(bias + column, mask=mask, other=0.0)
    if GATED:
        up = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(SPLITS):
            up += tl.load(start + columns + tl.cast(i, tl.int64) * M * N, mask=mask, other=0.0)
        if BIAS:
            up += tl.load(bias + columns + column, mask=mask, other=0.0)
        found = gate_mul(found, up, GELU)
    at = row * columns + column
    if RESIDUAL:
        found += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, found.to(out.dtype.element_ty), mask=mask)
