"""Rows of an embedding table: a gather, and for a table of int8 codes a multiplication by the row's scale.

A program copies BLOCK columns of one token's row::

    token t, program j:   table[ids[t], j BLOCK .. + BLOCK]  (* scales[ids[t]])  -> out[t, j BLOCK .. + BLOCK]

An id outside the table gives a row of zeros: nothing is read past the table, and nobody waits for the device to check.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4


@triton.jit
def _embedding(  # type: ignore[no-untyped-def]
    ids, table, scales, out, vocabulary, columns, row_stride, SCALED: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(ids + token)
    row = number + tl.zeros((BLOCK,), tl.int64)  # one of its own for every column
    mask = (column < columns) & (row >= 0) & (row < vocabulary)
    found = tl.load(table + row * row_stride + column, mask=mask, other=0)
    if SCALED:
        found = found.to(tl.float32) * tl.load(scales + tl.minimum(tl.maximum(number, 0), vocabulary - 1))
    elif found.dtype != out.dtype.element_ty:
        found = found.to(tl.float32)
    tl.store(out + token * columns + column, found.to(out.dtype.element_ty), mask=column < columns)


def embedding(ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of table [V, hidden] (a float dtype) for int64 ids [T] -> [T, hidden] in ``dtype``."""
    return _look_up(ids, table, None, dtype)


def embedding_int8(ids: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of codes int8 [V, hidden] times scales float32 [V], rounded once, for int64 ids [T] -> [T, hidden] in ``dtype``."""
    if codes.dtype != torch.int8 or scales.dtype != torch.float32 or scales.shape != codes.shape[:1]:
        raise ValueError(f"codes {codes.dtype} {list(codes.shape)} with scales {scales.dtype} {list(scales.shape)}")
    return _look_up(ids, codes, scales.contiguous(), dtype)


def _look_up(ids: Tensor, table: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows, columns = table.shape
    out = torch.empty(ids.shape[0], columns, dtype=dtype, device=table.device)
    if out.numel():
        if table.stride(1) != 1:
            raise ValueError("the columns of an embedding table must be consecutive")
        _embedding[(ids.shape[0], triton.cdiv(columns, BLOCK))](
            ids.contiguous(),
            table,
            scales,
            out,
            rows,
            columns,
            table.stride(0),
            SCALED=scales is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return out
