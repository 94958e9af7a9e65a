"""Activations in int8 [M, K] times a weight of 4 or 8 bits: products of integers, exact in int32, scaled in float32.

    program (i, s): BM rows by BN outputs, in the order of many.py; tiles s * per .. of the inputs, 128 at a time

    8 bits   a tile's codes, int8 [128, BN]                               -> one product
    4 bits   bytes [64, BN]: input k below, input 64 + k above            -> two planes [64, BN], two products

A nibble is kept as a signed number, q - 8, and taken out where it stands in the upper half of a byte: times 16, which the scale
makes good. A zero point z is left out of the product: sum x (q - z) = sum x (q - 8) + (8 - z) sum x, and the sum of the
activations comes from where they were rounded (quantize.py). Epilogue, splits and ``tiled.finish`` are as in tiled.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.many import _finish, _place

_PAIR = tl.constexpr("""{
    .reg .b32 up;
    shl.b32 up, $2, 4;
    and.b32 $0, up, 0xf0f0f0f0;
    and.b32 $1, $2, 0xf0f0f0f0;
}""")


@triton.jit
def _whole(codes, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """``codes`` of one byte as they are. The compiler carries operands that come straight from shared memory over to the next
    turn byte by byte, and packs them anew; what comes out of assembly (of two inputs) it takes where it is used, in words.
    """
    if ASM:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [codes, codes], dtype=codes.dtype, is_pure=True, pack=4)
    else:
        return codes


@triton.jit
def signed_nibbles(pairs, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """(lower, upper) nibbles of uint8 ``pairs`` as int8, sixteen times what they are as signed numbers of four bits."""
    if ASM:
        return tl.inline_asm_elementwise(_PAIR, "=r,=r,r", [pairs], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        wide = pairs.to(tl.int32)
        return ((wide & 15) << 4).to(tl.int8), (wide & 240).to(tl.int8)


@triton.jit
def _words(scaling, group, column, padded, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A group's words of ``scaling``, int32 [BN]; where there is one part it is given twice."""
    at = scaling + tl.cast(group, tl.int64) * (PARTS * padded) + column
    first = tl.load(at)
    return first, tl.load(at + padded) if PARTS == 2 else first


@triton.jit
def _params(first, second, PARTS: tl.constexpr, SCALE: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [BN] of such words: what a product of codes is multiplied by, and what a sum of activations is."""
    if PARTS == 2:
        scale, less = first.to(tl.float32, bitcast=True), second
    else:
        scale, less = first.to(tl.int16).to(SCALE, bitcast=True).to(tl.float32), second >> 16
    return scale * 0.0625 if BITS == 4 else scale, scale * less.to(tl.float32)


@triton.jit
def _columns(column_tile, N, BN: tl.constexpr, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Outputs of a program; GATED: the same of gate and up, side by side, as in many.py."""
    lane = tl.arange(0, BN)
    if GATED:
        return tl.minimum(column_tile * (BN // 2) + lane // 2, N // 2 - 1) + lane % 2 * (N // 2)
    else:
        return column_tile * BN + lane


@triton.jit
def _store(acc, part, row, column, bias, residual, out, M, N, BIAS: tl.constexpr, RESIDUAL: tl.constexpr):  # type: ignore[no-untyped-def]
    mask = (row < M)[:, None] & (column < N)[None, :]
    at = (part.to(tl.int64) * M + row)[:, None] * N + column[None, :]
    if BIAS:
        acc += tl.load(bias + column, mask=column < N, other=0.0)[None, :]
    if RESIDUAL:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])  # rows: one compilation for all of them
def product(  # type: ignore[no-untyped-def]
    x, x_scales, x_sums, words, scaling, bias, residual, out,
    M, N, x_rows, padded, tiles,
    BITS: tl.constexpr, TOKEN: tl.constexpr, ZEROS: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr, SCALE: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr,
    GELU: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """x int8 [M, tiles * 128]. padded: N in whole tiles. out: [M, N], float32 [splits, M, N], or GATED [M, N / 2].

    TOKEN: x_scales is [M], else [tiles, x_rows]. ZEROS: there are zero points, and x_sums [tiles, x_rows].
    WHOLE: one group has all inputs.
    """
    HALF: tl.constexpr = 64 if BITS == 4 else 128  # bytes of a tile's output
    part, splits = tl.program_id(1), tl.num_programs(1)
    per = tl.cdiv(tiles, splits)
    begin, end = part * per, tl.minimum(part * per + per, tiles)
    WIDTH: tl.constexpr = BN // 2 if GATED else BN  # of a program's columns of out
    row_tile, column_tile = _place(M, N // 2 if GATED else N, BM, WIDTH, GROUP)
    row, column = row_tile * BM + tl.arange(0, BM), _columns(column_tile, N, BN, GATED)
    inside, k = row < M, tl.arange(0, HALF)
    x_at = x + row.to(tl.int64)[:, None] * (tiles * 128) + begin * 128 + k[None, :]
    tile_at = (column // 128).to(tl.int64) * tiles + begin
    w_at = words + tile_at[None, :] * (128 * HALF) + (column % 128)[None, :] * HALF + k[:, None]
    acc, sums, total = tl.zeros((BM, BN), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM, BN), tl.int32)
    # What is no operand of a product waits for nothing in the loop: it is loaded a turn ahead.
    place = tl.cast(tl.minimum(begin, tiles - 1), tl.int64)
    first, second = _words(scaling, 0 if WHOLE else place, column, padded, PARTS)
    row_scale = tl.load(x_scales + row, mask=inside, other=0.0) if TOKEN else tl.load(x_scales + place * x_rows + row)
    row_sum = tl.load(x_sums + place * x_rows + row) if ZEROS else row_scale
    for tile in range(begin, end):
        place = tl.cast(tl.minimum(tile + 1, tiles - 1), tl.int64)
        now_first, now_second, now_scale, now_sum = first, second, row_scale, row_sum
        if not WHOLE:
            first, second = _words(scaling, place, column, padded, PARTS)
        if not TOKEN:
            row_scale = tl.load(x_scales + place * x_rows + row)
        if ZEROS:
            row_sum = tl.load(x_sums + place * x_rows + row)
        codes = tl.load(w_at, eviction_policy="evict_first")
        rows = tl.load(x_at, mask=inside[:, None], other=0)
        if not (WHOLE and TOKEN):
            total = tl.zeros((BM, BN), tl.int32)
        if BITS == 4:
            low, high = signed_nibbles(codes, ASM)
            total = tl.dot(rows, low, total, out_dtype=tl.int32)
            total = tl.dot(tl.load(x_at + 64, mask=inside[:, None], other=0), high, total, out_dtype=tl.int32)
        else:
            total = tl.dot(rows, _whole(codes, ASM), total, out_dtype=tl.int32)
        if ZEROS and WHOLE:
            sums += now_sum
        if not (WHOLE and TOKEN):
            found = total.to(tl.float32) if TOKEN else total.to(tl.float32) * now_scale[:, None]
            if WHOLE:
                acc += found
            else:
                scale, less = _params(now_first, now_second, PARTS, SCALE, BITS)
                acc += found * scale[None, :]
                if ZEROS:
                    acc += now_sum[:, None] * less[None, :]
        x_at += 128
        w_at += 128 * HALF
    if WHOLE:
        scale, less = _params(first, second, PARTS, SCALE, BITS)
        acc = (total.to(tl.float32) if TOKEN else acc) * scale[None, :]
        if ZEROS:
            acc += sums[:, None] * less[None, :]
    if TOKEN:
        acc *= row_scale[:, None]
    if GATED:
        _finish(acc, row, column, bias, residual, out, M, N, column_tile * WIDTH, WIDTH, BIAS, RESIDUAL, GATED, GELU)
    else:
        _store(acc, part, row, column, bias, residual, out, M, N, BIAS, RESIDUAL)
