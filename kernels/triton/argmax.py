"""The largest of each row, of equal ones the first: a maximum of integers that hold value and place at once.

    code of logits[r, i]  =  order of the value (signed, 32 bits) | 2^31 - 1 - i

The order is that of the float's bits, with negative ones turned round, NaN above all, and the zeros equal; of equal values the
earlier place has the larger code. Each program reduces one chunk of a row to one code, then one program a row reduces those, so a
single row already keeps many multiprocessors busy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK, WARPS = 4096, 8
LOWEST = tl.constexpr(-(1 << 63))
LAST = tl.constexpr((1 << 31) - 1)


@triton.jit
def ordered(x):  # type: ignore[no-untyped-def]
    """int32 in the order of float32 x: -0 equals 0, NaN is the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, LAST, bits ^ ((bits >> 31) & LAST))


@triton.jit
def _largest_of_chunk(logits, codes, columns, row_stride, chunks, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * row_stride + place, mask=place < columns, other=0.0).to(tl.float32)
    code = (ordered(x).to(tl.int64) << 32) | (LAST - place)
    tl.store(codes + row * chunks + chunk, tl.max(tl.where(place < columns, code, LOWEST), axis=0))


@triton.jit
def _largest_of_row(logits, codes, values, ids, row_stride, chunks, CHUNK_BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, chunk = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNK_BLOCK)
    code = tl.max(tl.load(codes + row * chunks + chunk, mask=chunk < chunks, other=LOWEST), axis=0)
    place = LAST - (code & LAST)
    tl.store(ids + row, place)
    tl.store(values + row, tl.load(logits + row * row_stride + place).to(tl.float32))


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(values float32 [R], ids int64 [R]) of the largest of each row of logits [R, V], V > 0, in any float dtype.

    Of equal ones the first; a NaN counts as the largest.
    """
    rows, columns = logits.shape
    values = torch.empty(rows, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        if not columns:
            raise ValueError("there is no largest of no numbers")
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        chunks = triton.cdiv(columns, CHUNK)
        codes = torch.empty(rows, chunks, dtype=torch.int64, device=logits.device)
        _largest_of_chunk[(rows, chunks)](logits, codes, columns, logits.stride(0), chunks, CHUNK=CHUNK, num_warps=WARPS)
        block = triton.next_power_of_2(chunks)
        _largest_of_row[(rows,)](logits, codes, values, ids, logits.stride(0), chunks, CHUNK_BLOCK=block, num_warps=1)
    return values, ids
