"""Thresholds of rows by radix selection: where the k largest end (top_k), and where the likeliest p of the mass end (top_p).

Both ask for the largest key t such that the keys >= t weigh at least ``goal``. top_k: keys are the logits, in the order of
integers, and each weighs 1. top_p: keys are the bits of the weights w = exp((logit - best) / temperature), and each weighs w, in
fixed point: integer sums do not depend on their order. Four bits of t are found in a pass, from the highest::

    keys that begin with the prefix found so far, by their next digit:   0  1  2 .. d .. 15
    masses, from the top, added to what is above the prefix:            >= goal  <- d | < goal

A pass is one launch over (rows, chunks). Each program first adds up the digits' masses of all chunks of the last pass, which
gives the prefix, then counts its own chunk, if any of its keys still matter. Nothing is known to the host; rows that ask for no
cut return at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.argmax import ordered

CHUNK, PIECE, WARPS = 2048, 256, 4  # columns of a program, and of one step of its loop
DIGITS = tl.constexpr(16)
PASSES = 8  # of four bits
MAX_COLUMNS = (1 << 19) - 1  # the mass of so many weights of 1 fits 63 bits


class Draw(NamedTuple):
    """What makes weights of logits; each [R]."""

    best: Tensor  # float32: the largest logit
    temperature: Tensor  # 0 for rows that take the largest
    kth: Tensor | None  # float32: smaller logits are out
    min_p: Tensor | None  # smaller weights are out


@triton.jit
def mass_of(weight):  # type: ignore[no-untyped-def]
    """weight (float32, 0..1) in steps of 2^-44: exact from 2^-21 up."""
    return (weight * 17592186044416.0).to(tl.int64)


@triton.jit
def weigh(x, live, row, best, temperature, kth, min_p):  # type: ignore[no-untyped-def]
    """(weights of logits x, which of them are neither padding (not live) nor cut by kth or min_p)."""
    weight = tl.exp((x - tl.load(best + row)) / tl.load(temperature + row).to(tl.float32))
    if kth is not None:
        live = live & (x >= tl.load(kth + row))
    if min_p is not None:
        live = live & (weight >= tl.load(min_p + row).to(tl.float32))
    return weight, live


@triton.jit
def _is_cut(wanted, temperature, row, columns, WEIGHTED: tl.constexpr):  # type: ignore[no-untyped-def]
    share = tl.load(wanted + row)
    if WEIGHTED:
        cut = share < 1
    else:
        cut = (share > 0) & (share <= columns)
    if temperature is not None:
        cut = cut & (tl.load(temperature + row) > 0)
    return cut


@triton.jit
def _fold(wanted, masses, state, row, chunks, WEIGHTED: tl.constexpr, STEP: tl.constexpr, CHUNK_BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(prefix, mass of larger keys, goal) after the passes before this one. STEP: 0 in the first, 1 in the second, 2 later."""
    prefix, above, goal = tl.zeros((), tl.int64), tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    if STEP > 0:
        chunk, digit = tl.arange(0, CHUNK_BLOCK)[:, None], tl.arange(0, DIGITS)
        place = (row * chunks + chunk) * DIGITS + digit[None, :]
        mine = tl.sum(tl.load(masses + place, mask=chunk < chunks, other=0), axis=0)
        total = tl.sum(mine, axis=0)
        if STEP == 1 and WEIGHTED:
            whole = total.to(
                tl.float64
            )  # and the goal rounded as such, so that a share of equal weights is a whole number of them
            goal = tl.maximum((whole - (1.0 - tl.load(wanted + row).to(tl.float64)) * whole).to(tl.int64), 1)
        elif STEP == 1:
            goal = tl.load(wanted + row).to(tl.int64)
        else:
            prefix, above, goal = tl.load(state + row * 3), tl.load(state + row * 3 + 1), tl.load(state + row * 3 + 2)
        from_top = above + total - tl.cumsum(mine, axis=0) + mine  # of a digit and of those above it
        found = tl.max(tl.where(from_top >= goal, digit, 0), axis=0)
        above += tl.sum(tl.where(digit > found, mine, 0), axis=0)
        prefix = prefix * DIGITS + found
    return prefix, above, goal


@triton.jit
def _keys(  # type: ignore[no-untyped-def]
    start, place, columns, row, best, temperature, kth, min_p, known, shift, WEIGHTED: tl.constexpr
):
    """(keys without the digits below the one looked for, masses, which keys begin with the known prefix)."""
    x = tl.load(start + place, mask=place < columns, other=0.0).to(tl.float32)
    if WEIGHTED:
        weight, live = weigh(x, place < columns, row, best, temperature, kth, min_p)
        key, mass = weight.to(tl.uint32, bitcast=True), mass_of(weight)
    else:
        live = place < columns
        key, mass = ordered(x).to(tl.uint32, bitcast=True) ^ 0x80000000, tl.full(x.shape, 1, tl.int32)
    key = key >> shift.to(tl.uint32)
    return key, mass, live & ((key >> 4) == known)


@triton.jit
def _select_digit(  # type: ignore[no-untyped-def]
    logits,
    wanted,  # top_k, integers, or top_p, floats [R]
    best,
    temperature,
    kth,
    min_p,
    masses,  # of the last pass, int64 [R, chunks, 16]
    next_masses,
    state,  # int64 [R, 3]
    next_state,
    columns,
    row_stride,
    chunks,
    shift,
    WEIGHTED: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if _is_cut(wanted, temperature, row, columns, WEIGHTED):
        prefix, above, goal = _fold(wanted, masses, state, row, chunks, WEIGHTED, STEP, CHUNK_BLOCK)
        if chunk == 0:
            tl.store(next_state + row * 3, prefix)
            tl.store(next_state + row * 3 + 1, above)
            tl.store(next_state + row * 3 + 2, goal)
        start, known, digit = logits + row * row_stride, prefix.to(tl.uint32), tl.arange(0, DIGITS)
        every = chunk * CHUNK + tl.arange(0, CHUNK)
        _, _, matter = _keys(start, every, columns, row, best, temperature, kth, min_p, known, shift, WEIGHTED)
        out = next_masses + (row * chunks + chunk) * DIGITS + digit
        if tl.max(matter.to(tl.int32), axis=0) > 0:  # later passes have to do with few chunks
            sums = tl.zeros((PIECE, DIGITS), tl.int64 if WEIGHTED else tl.int32)
            for piece in tl.static_range(0, CHUNK, PIECE):
                place = chunk * CHUNK + piece + tl.arange(0, PIECE)[:, None]
                key, mass, live = _keys(start, place, columns, row, best, temperature, kth, min_p, known, shift, WEIGHTED)
                sums += tl.where(live & ((key & 15).to(tl.int32) == digit[None, :]), mass, 0)
            tl.store(out, tl.sum(sums, axis=0).to(tl.int64))
        else:
            tl.store(out, tl.zeros((DIGITS,), tl.int64))


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    wanted,
    temperature,
    masses,
    state,
    thresholds,  # float32 [R]
    taken,  # int64 [R]: how many of the weights equal to the threshold are in
    columns,
    chunks,
    WEIGHTED: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if _is_cut(wanted, temperature, row, columns, WEIGHTED):
        prefix, above, goal = _fold(wanted, masses, state, row, chunks, WEIGHTED, 2, CHUNK_BLOCK)
        if WEIGHTED:
            weight = prefix.to(tl.int32).to(tl.float32, bitcast=True)
            mass = tl.maximum(mass_of(weight), 1)  # 0 only where logits are not finite
            tl.store(thresholds + row, weight)
            tl.store(taken + row, (goal - above + mass - 1) // mass)
        else:
            order = (prefix - 0x80000000).to(tl.int32)
            tl.store(thresholds + row, (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True))
    elif WEIGHTED:
        tl.store(thresholds + row, -1.0)
        tl.store(taken + row, tl.zeros((), tl.int64))
    else:
        tl.store(thresholds + row, -float("inf"))


def kth_logits(logits: Tensor, top_k: Tensor, temperature: Tensor | None = None) -> Tensor:
    """The top_k[r]-th largest of each row of logits [R, V] without NaN, float32 [R]; equal ones count one by one.

    -inf where top_k is not in 1 .. V, or the temperature is 0.
    """
    return _select(logits, top_k, None, temperature)[0]


def nucleus(logits: Tensor, top_p: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """(thresholds float32 [R], taken int64 [R]): the weights above the threshold and the first ``taken`` of those equal to it.

    They are the fewest that reach the share top_p of the weights which kth and min_p leave. The threshold is -1 where top_p is 1
    or more, or the temperature is 0. What a row gives whose best logit is not finite means nothing.
    """
    return _select(logits, top_p, draw, draw.temperature)


def kth_largest(row: Tensor, k: int) -> float:
    """The k-th largest of row, float32 [n] without NaN; equal ones count one by one. ValueError unless 1 <= k <= n."""
    if not 1 <= k <= row.numel():
        raise ValueError(f"there is no largest number {k} among {row.numel()}")
    found = kth_logits(row.reshape(1, -1), torch.full((1,), k, dtype=torch.int64, device=row.device))
    return float(found.item())


def _select(logits: Tensor, wanted: Tensor, draw: Draw | None, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, columns = logits.shape
    if columns > MAX_COLUMNS:
        raise ValueError(f"{columns} logits in a row: at most {MAX_COLUMNS} are possible")
    device, chunks = logits.device, triton.cdiv(columns, CHUNK)
    thresholds = torch.empty(rows, dtype=torch.float32, device=device)
    taken = torch.empty(rows, dtype=torch.int64, device=device)
    if rows == 0 or columns == 0:
        return thresholds, taken
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    masses = torch.empty(2, rows, chunks, DIGITS.value, dtype=torch.int64, device=device)
    state = [torch.empty(rows, 3, dtype=torch.int64, device=device) for _ in range(2)]  # each at an aligned address
    constants: dict[str, Any] = {"WEIGHTED": draw is not None, "CHUNK_BLOCK": triton.next_power_of_2(chunks), "num_warps": WARPS}
    best, _, kth, min_p = draw or (None, None, None, None)
    for i in range(PASSES):
        _select_digit[(rows, chunks)](
            logits,
            wanted,
            best,
            temperature,
            kth,
            min_p,
            masses[1 - i % 2],
            masses[i % 2],
            state[1 - i % 2],
            state[i % 2],
            columns,
            logits.stride(0),
            chunks,
            4 * (PASSES - 1 - i),
            STEP=min(i, 2),
            CHUNK=CHUNK,
            PIECE=PIECE,
            **constants,
        )
    last = (PASSES - 1) % 2
    _finish[(rows,)](wanted, temperature, masses[last], state[last], thresholds, taken, columns, chunks, **constants)
    return thresholds, taken
