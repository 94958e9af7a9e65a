"""Products of many rows in large tiles, otherwise as tiled.py and without a split: float16 or bfloat16, sums in float32.

Programs come in an order in which a tile of the weight meets GROUP tiles of rows at once, and is read from memory once for them
(those rows stay in the card's cache, where a whole weight does not)::

    GROUP = 2     row tile 0 | 0  2  4  6        numbers: the order of the programs
                           1 | 1  3  5  7
                           2 | 8 10 12 14

HALF: sums of a group are float16, see half.py. Else scales of groups of 32 and 64 multiply weights, as in tiled.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configs import Launch
from kernels.triton.dequant import BASE, UNIT, byte_pairs, nibbles, scaled, whole
from kernels.triton.gate import gate_mul
from kernels.triton.half import shrink
from kernels.triton.tiled import FLAT, _dot, _params
from kernels.triton.weights import SCALES, TILE, TritonWeight


def multiply(x: Tensor, weight: TritonWeight, residual: Tensor | None, to: Tensor, launch: Launch, *, finished: bool) -> None:
    """The product of x [M, K] (rows contiguous) into ``to`` [M, outputs].

    Where it is ``finished`` with bias, residual, and gate: [M, N].
    """
    assert weight.params is not None
    rows, back, addend = x.shape[0], None, SCALES[x.dtype]
    if launch.half and weight.words.dtype != torch.uint16:  # not of FP8: no bound
        x, back = shrink(x)
    gated = weight.gated and finished
    columns = triton.cdiv(weight.N, launch.block_n // 2) if gated else triton.cdiv(weight.outputs, launch.block_n)
    product[(columns * triton.cdiv(rows, launch.block_m),)](
        x,
        weight.words,
        weight.params,
        weight.bias,
        residual,
        back,
        to,
        rows,
        weight.outputs,
        weight.K,
        weight.params.shape[2],
        weight.words.shape[1],
        x.stride(0),
        **weight.constants,
        EVEN=weight.K % TILE == 0,
        BIAS=weight.bias is not None and finished,
        RESIDUAL=residual is not None,
        BM=launch.block_m,
        BN=launch.block_n,
        GROUP=launch.group,
        GATED=gated,
        GELU=gated and weight.gelu,
        ADDEND=addend,
        HALF=back is not None,
        ASM=x.is_cuda,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


@triton.jit
def _place(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """(tile of rows, tile of outputs) of this program."""
    at, columns, rows = tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(M, BM)
    first = at // (GROUP * columns) * GROUP
    high = tl.minimum(rows - first, GROUP)
    within = at % (GROUP * columns)
    return first + within % high, within // high


@triton.jit
def _half_dot(x, w, acc, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    if ASM:
        return tl.dot(x, w, acc, out_dtype=tl.float16)
    else:
        return tl.dot(x.to(tl.float32), w.to(tl.float32), acc.to(tl.float32), input_precision="ieee").to(tl.float16)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    acc, row, column, bias, residual, out, M, N, first, WIDTH: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    GATED: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """A tile of sums to ``WIDTH`` columns of out from ``first`` on; column: the weight's outputs that the tile has."""
    if BIAS:
        acc += tl.load(bias + column, mask=column < N, other=0.0)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(acc, (acc.shape[0], WIDTH, 2)))
        found = gate_mul(gate, up, GELU)
    else:
        found = acc
    to, width = first + tl.arange(0, WIDTH), N // 2 if GATED else N
    mask = (row < M)[:, None] & (to < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + to[None, :]
    if RESIDUAL:
        found += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, found.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])  # rows: one compilation for all of them
def product(  # type: ignore[no-untyped-def]
    x, words, scaling, bias, residual, back, out,
    M, N, K, padded, tiles, x_stride,
    BITS: tl.constexpr, SLICES: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr, SCALE: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, GELU: tl.constexpr, ADDEND: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """out [M, N] of x [M, K]; constants as in tiled.product. ADDEND: the type of the addends in scaling.

    GATED: out [M, N / 2] is what gate.py makes of both; a program has the same outputs of each, side by side, as a product leaves
    neighbours in one thread. HALF: x is float16 in any case; the product's rows are multiplied by back [M].
    """
    WIDTH: tl.constexpr = BN // 2 if GATED else BN  # of a program's columns of out
    SUM: tl.constexpr = tl.float16 if HALF else tl.float32
    PLANE: tl.constexpr = 32  # inputs of a product
    width = N // 2 if GATED else N
    row_tile, column_tile = _place(M, width, BM, WIDTH, GROUP)
    row, lane = row_tile * BM + tl.arange(0, BM), tl.arange(0, BN)
    if GATED:
        column = tl.minimum(column_tile * WIDTH + lane // 2, width - 1) + lane % 2 * width
    else:
        column = column_tile * BN + lane
    inside = (row < M)[:, None]
    k = tl.arange(0, PLANE)
    x_at = x + row.to(tl.int64)[:, None] * x_stride + k[None, :]
    LINE: tl.constexpr = 8 * BITS  # words of a tile's output
    tile_at = (column // 128).to(tl.int64) * tiles
    w_at = words + tile_at[None, :] * (128 * LINE) + (column % 128)[None, :] * LINE + k[:, None]
    acc, scale = tl.zeros((BM, BN), tl.float32), tl.zeros((BN,), tl.float32)
    SCALED: tl.constexpr = SLICES > 1 and BM >= FLAT and not HALF  # half.py's bound is that of codes
    for tile in range(tiles):
        left = K - tile * 128
        if BITS == 4:
            packed = tl.load(w_at)
        group = 0 if WHOLE else tile * SLICES
        total = acc if (WHOLE and not HALF) or SCALED else tl.zeros((BM, BN), SUM)
        for j in tl.static_range(4):
            if (j * SLICES) % 4 == 0:  # a group begins
                if j > 0 and not SCALED:
                    acc += total.to(tl.float32) * scale[None, :]
                    total = tl.zeros((BM, BN), SUM)
                scale, addend = _params(scaling, group + j * SLICES // 4, column, padded, PARTS, SCALE, ADDEND)
                if HALF and tl.bfloat16 == ADDEND:
                    addend = (addend.to(tl.float32) * UNIT - BASE).to(tl.float16)
                addend = tl.broadcast_to(addend[None, :], (PLANE, BN))
                if BITS == 4:
                    w0, w1, w2, w3 = nibbles(packed, addend, ASM)
            if EVEN:
                rows = tl.load(x_at + j * PLANE, mask=inside, other=0.0)
            else:
                rows = tl.load(x_at + j * PLANE, mask=inside & (k + j * PLANE < left)[None, :], other=0.0)
            if BITS == 8:
                if j % 2 == 0:
                    packed = tl.load(w_at + j // 2 * PLANE)
                if j % 2 == 0 or SLICES == 4:
                    w0, w1 = byte_pairs(packed, addend, ASM)
                plane = w0 if j % 2 == 0 else w1
            else:
                plane = w0 if j == 0 else w1 if j == 1 else w2 if j == 2 else w3
            if SCALED:
                plane = scaled(plane, scale[None, :], SCALE, ASM)
            total = _half_dot(rows, plane, total, ASM) if HALF else _dot(rows, plane, total, ASM)
        if WHOLE:
            acc = acc + total.to(tl.float32) if HALF else total
        elif SCALED:
            acc = total
        else:
            acc += total.to(tl.float32) * scale[None, :]
        x_at += 128
        w_at += 128 * LINE
    if WHOLE:
        acc *= scale[None, :]
    acc = whole(acc, x.dtype.element_ty, words.dtype.element_ty)
    if HALF:
        acc *= tl.load(back + row, mask=row < M, other=0.0)[:, None]
    _finish(acc, row, column, bias, residual, out, M, N, column_tile * WIDTH, WIDTH, BIAS, RESIDUAL, GATED, GELU)
