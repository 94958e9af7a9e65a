"""Words of a paged cache as the products of attention want them (kv.py): loaded tile by tile, widened in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.dequant import BASE, nibbles
from kernels.triton.widen import widen


@triton.jit
def tiles(  # type: ignore[no-untyped-def]
    start, rows, live, q, ITEMS: tl.constexpr, PARTS: tl.constexpr, ACROSS: tl.constexpr, MASKED: tl.constexpr
):
    """Words of a tile for all products with q: one tensor, or another for what a head has beyond the first."""
    WIDTH: tl.constexpr = q[0].shape[1]
    found = (_tile(start, rows, live, ITEMS, WIDTH, ACROSS, MASKED),)
    if len(q) > PARTS:
        found = found + (_tile(start + WIDTH, rows, live, ITEMS - WIDTH, q[PARTS].shape[1], ACROSS, MASKED),)  # type: ignore[assignment]
    return found


@triton.jit
def every(words, DTYPE: tl.constexpr, CODE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    found = numbers(words[0], DTYPE, CODE, ASM)
    if len(words) > 1:
        found = found + numbers(words[1], DTYPE, CODE, ASM)
    return found


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    start, rows, live, ITEMS: tl.constexpr, WIDTH: tl.constexpr, ACROSS: tl.constexpr, MASKED: tl.constexpr
):
    """Words of a tile, of each token the first ITEMS from start on: [BLOCK_N, WIDTH] where ACROSS, else [WIDTH, BLOCK_N]."""
    items = tl.arange(0, WIDTH)
    inside = items < ITEMS
    if ACROSS:
        return _load(start + (rows[:, None] + items[None, :]), live[:, None], inside[None, :], MASKED, WIDTH <= ITEMS)
    else:
        return _load(start + (rows[None, :] + items[:, None]), live[None, :], inside[:, None], MASKED, WIDTH <= ITEMS)


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
