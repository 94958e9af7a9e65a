"""Activations in FP8 [M, K] times a weight in FP8 (e4m3 both), many rows: products of FP8, sums in float32.

    x      | token's codes, in the order in which words have a tile's inputs: 0 32 1 33 .. 31 63 | 64 96 65 97 .. | next tile ..
    words  | the weight's words (weights.py), byte by byte

For few rows the weight is widened instead (tiled.py): it is memory that takes the time there, and activations stay as they are.
A tile's sum is added to the others in float32, by itself on sm_90, whose units for FP8 add with fewer bits. sm_89 and later.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.eight import _columns, _whole
from kernels.triton.many import _finish, _place
from kernels.triton.quantize import Rounded
from kernels.triton.weights import TritonWeight
from kernels.tune import Launch


def multiply(x: Rounded, weight: TritonWeight, residual: Tensor | None, to: Tensor, launch: Launch, *, finished: bool) -> None:
    """The product into ``to``: [M, N] with bias, gate and residual where it is ``finished``; else [1, M, outputs]."""
    assert weight.params is not None
    rows, gated = x.codes.shape[0], weight.gated and finished
    columns = triton.cdiv(weight.N, launch.block_n // 2) if gated else triton.cdiv(weight.outputs, launch.block_n)
    product[(columns * triton.cdiv(rows, launch.block_m),)](
        x.codes,
        x.scales,
        weight.words.view(torch.float8_e4m3fn),
        weight.params,
        weight.bias,
        residual,
        to,
        rows,
        weight.outputs,
        weight.params.shape[2],
        weight.words.shape[1],
        WHOLE=weight.params.shape[0] == 1,
        BIAS=weight.bias is not None and finished,
        RESIDUAL=residual is not None,
        BM=launch.block_m,
        BN=launch.block_n,
        GROUP=launch.group,
        GATED=gated,
        GELU=gated and weight.gelu,
        ASM=to.is_cuda,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


@triton.jit(do_not_specialize=["M"])  # rows: one compilation for all of them
def product(  # type: ignore[no-untyped-def]
    x, x_scales, words, scaling, bias, residual, out,
    M, N, padded, tiles,
    WHOLE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """x [M, tiles * 128], scales float32 [M]; padded: N in whole tiles; scaling [tiles, 1, padded], or WHOLE: [1, 1, padded]."""
    WIDTH: tl.constexpr = BN // 2 if GATED else BN  # of a program's columns of out
    row_tile, column_tile = _place(M, N // 2 if GATED else N, BM, WIDTH, GROUP)
    row, column = row_tile * BM + tl.arange(0, BM), _columns(column_tile, N, BN, GATED)
    inside, k = row < M, tl.arange(0, 128)
    x_at = x + row.to(tl.int64)[:, None] * (tiles * 128) + k[None, :]
    w_at = words + (column // 128).to(tl.int64)[None, :] * tiles * (128 * 128) + (column % 128)[None, :] * 128 + k[:, None]
    scale_at = scaling + column
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(tiles):
        rows = tl.load(x_at, mask=inside[:, None], other=0.0)
        found = tl.dot(rows, _whole(tl.load(w_at), ASM), out_dtype=tl.float32)
        if WHOLE:
            acc += found
        else:
            acc += found * tl.load(scale_at).to(tl.float32, bitcast=True)[None, :]
            scale_at += padded
        x_at += 128
        w_at += 128 * 128
    if WHOLE:
        acc *= tl.load(scale_at).to(tl.float32, bitcast=True)[None, :]
    acc *= tl.load(x_scales + row, mask=inside, other=0.0)[:, None]
    _finish(acc, row, column, bias, residual, out, M, N, column_tile * WIDTH, WIDTH, BIAS, RESIDUAL, GATED, GELU)
