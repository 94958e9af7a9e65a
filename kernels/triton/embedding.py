"""Rows of an embedding table: a gather, and for a table of codes their dequantization.

A program copies BLOCK columns of one token's row::

    token t, program j:   table[ids[t], j BLOCK .. + BLOCK]  -> out[t, j BLOCK .. + BLOCK]

A head that was packed for products (kernels/triton/weights.py) serves as the table it is tied to: a row of it is one of the 128
outputs of a tile, for each 128 columns in another tile, and its numbers are (code - zero) * scale.

An id outside the table gives a row of zeros: nothing is read past the table, and nobody waits for the device to check.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.dequant import BASE, UNIT
from kernels.triton.weights import SCALES, TritonWeight

BLOCK, WARPS = 1024, 4


@triton.jit
def _embedding(ids, table, out, vocabulary, columns, row_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + token) + tl.zeros((BLOCK,), tl.int64)  # one of its own for every column
    mask = (column < columns) & (row >= 0) & (row < vocabulary)
    found = tl.load(table + row * row_stride + column, mask=mask, other=0)
    if found.dtype != out.dtype.element_ty:
        found = found.to(tl.float32)
    tl.store(out + token * columns + column, found.to(out.dtype.element_ty), mask=column < columns)


@triton.jit
def _packed_rows(  # type: ignore[no-untyped-def]
    ids, words, scaling, out, vocabulary, columns, padded, tiles,
    BITS: tl.constexpr, SLICES: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr, SCALE: tl.constexpr,
    SIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weight's arguments are those of the products. SIGNED: codes are, and addends are integers; else addends are those of
    dequant.py, in out's type.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    token, none = tl.program_id(0).to(tl.int64), tl.zeros((BLOCK,), tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + token) + none
    mask = (column < columns) & (row >= 0) & (row < vocabulary)
    place, k = row // 128 * (tiles * 128) + column // 128 * 128 + row % 128, column % 128  # of the output among the tiles' own
    if BITS == 8 and SIGNED:
        code = tl.load(words + place * 128 + k, mask=mask, other=0).to(tl.int32)
    elif BITS == 8:
        word = tl.load(words + place * 64 + k // 64 * 32 + k % 32, mask=mask, other=0).to(tl.int32)
        code = word >> (k // 32 % 2 * 8) & 255
    elif SIGNED:
        code = (tl.load(words + place * 64 + k % 64, mask=mask, other=0).to(tl.int32) >> (k // 64 * 4) & 15 ^ 8) - 8
    else:
        code = tl.load(words + place * 32 + k % 32, mask=mask, other=0).to(tl.int32) >> (k // 32 * 4) & 15
    group = none if WHOLE else none + (column // 128 * SLICES + k * SLICES // 128)
    at = scaling + group * (PARTS * padded) + row
    first = tl.load(at, mask=mask, other=0)
    if PARTS == 2:
        scale, bits = first.to(tl.float32, bitcast=True), tl.load(at + padded, mask=mask, other=0)
    else:
        scale, bits = first.to(tl.int16).to(SCALE, bitcast=True).to(tl.float32), first >> 16
    if SIGNED:
        addend = bits.to(tl.int16).to(tl.float32)
    else:
        addend = bits.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        addend = addend * UNIT if tl.bfloat16 == DTYPE else addend + BASE
    found = (code.to(tl.float32) + addend) * scale
    tl.store(out + token * columns + column, found.to(DTYPE), mask=column < columns)


def embedding(ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of table [V, hidden] (a float dtype) for int64 ids [T] -> [T, hidden] in ``dtype``."""
    rows, columns = table.shape
    if table.stride(1) != 1:
        raise ValueError("the columns of an embedding table must be consecutive")
    out = torch.empty(ids.shape[0], columns, dtype=dtype, device=table.device)
    if out.numel():
        grid = (ids.shape[0], triton.cdiv(columns, BLOCK))
        _embedding[grid](ids.contiguous(), table, out, rows, columns, table.stride(0), BLOCK=BLOCK, num_warps=WARPS)
    return out


def packed_rows(ids: Tensor, table: TritonWeight, dtype: torch.dtype) -> Tensor:
    """Rows of a packed weight [V, hidden], (code - zero) * scale, rounded once, for int64 ids [T] -> [T, hidden].

    ``dtype`` is the one that the weight was packed for. TypeError for a weight in FP8, or with a permutation, a bias or a gate.
    """
    if table.perm is not None or table.bias is not None or table.gated or table.words.dtype == torch.uint16:
        raise TypeError("a weight in FP8, or with a permutation, a bias or a gate, is no table of rows")
    if table.bits == 16:
        return embedding(ids, table.words, dtype)
    assert table.params is not None and table.scale_dtype is not None
    out = torch.empty(ids.shape[0], table.K, dtype=dtype, device=table.words.device)
    if out.numel():
        _packed_rows[(ids.shape[0], triton.cdiv(table.K, BLOCK))](
            ids.contiguous(),
            table.words,
            table.params,
            out,
            table.outputs,
            table.K,
            table.params.shape[2],
            table.words.shape[1],
            BITS=table.bits,
            SLICES=table.slices,
            WHOLE=table.params.shape[0] == 1,
            PARTS=table.params.shape[1],
            SCALE=SCALES[table.scale_dtype],
            SIGNED=table.rounds is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return out
