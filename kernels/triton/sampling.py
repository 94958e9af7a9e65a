"""Draws from softmax(logits / temperature), cut by top_k, min_p and top_p, without the host ever waiting for the device.

A token is drawn by inverting the cumulative distribution in the order of ids: the first at which the running sum of the weights
that are left exceeds ``uniform`` of their total. Sums are integers (see select.py), so they are the same in any order::

    chunks of a row     mass 0 | mass 1 | mass 2 | ..      one program each
    running sums        ------------->|                    one program a row finds the chunk ..
    inside that chunk            --->|                     .. and the token in it

top_k and top_p are thresholds by then; of weights equal to top_p's, the first few ids are in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.argmax import argmax
from kernels.triton.select import CHUNK, MAX_COLUMNS, WARPS, Draw, kth_largest, kth_logits, mass_of, nucleus, weigh

__all__ = ["argmax", "kth_largest", "sample"]


@triton.jit
def _load_chunk(  # type: ignore[no-untyped-def]
    logits, row, chunk, columns, row_stride, best, temperature, kth, min_p, thresholds, CHUNK: tl.constexpr
):
    """(weights, which are in for certain, which are equal to top_p's threshold) of one chunk."""
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * row_stride + place, mask=place < columns, other=0.0).to(tl.float32)
    weight, live = weigh(x, place < columns, row, best, temperature, kth, min_p)
    tie = live & (place < 0)
    if thresholds is not None:
        threshold = tl.load(thresholds + row)
        tie = live & (weight == threshold)
        live = live & (weight > threshold)
    return weight, live, tie


@triton.jit
def _chunk_masses(  # type: ignore[no-untyped-def]
    logits,
    best,
    temperature,
    kth,
    min_p,
    thresholds,
    masses,  # int64 [R, chunks]: of what is in for certain
    ties,  # int64 [R, chunks]: how many equal top_p's threshold
    columns,
    row_stride,
    chunks,
    CHUNK: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(temperature + row) > 0:
        weight, sure, tie = _load_chunk(logits, row, chunk, columns, row_stride, best, temperature, kth, min_p, thresholds, CHUNK)
        tl.store(masses + row * chunks + chunk, tl.sum(tl.where(sure, mass_of(weight), 0), axis=0))
        tl.store(ties + row * chunks + chunk, tl.sum(tie.to(tl.int64), axis=0))


@triton.jit
def _pick(  # type: ignore[no-untyped-def]
    logits,
    best,
    greedy,  # int64 [R]: the likeliest token
    temperature,
    kth,
    min_p,
    thresholds,
    taken,
    uniform,
    masses,
    ties,
    out,
    columns,
    row_stride,
    chunks,
    CHUNK: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
):
    row, every = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNK_BLOCK)
    top = tl.load(best + row)
    finite = (top > -float("inf")) & (top < float("inf"))
    token = tl.where(finite, tl.load(greedy + row), -1)
    if finite & (tl.load(temperature + row) > 0):
        mass = tl.load(masses + row * chunks + every, mask=every < chunks, other=0)
        count = tl.load(ties + row * chunks + every, mask=every < chunks, other=0)
        first = tl.cumsum(count, axis=0) - count  # ties in the chunks before
        take = tl.zeros((), tl.int64)
        if thresholds is not None:
            take = tl.load(taken + row)
            mass += tl.minimum(tl.maximum(take - first, 0), count) * mass_of(tl.load(thresholds + row))
        total = tl.sum(mass, axis=0)
        target = tl.minimum((tl.load(uniform + row).to(tl.float64) * total.to(tl.float64)).to(tl.int64), total - 1)
        chunk = tl.sum((tl.cumsum(mass, axis=0) <= target).to(tl.int32), axis=0)
        before = tl.sum(tl.where(every < chunk, mass, 0), axis=0)
        rank = tl.sum(tl.where(every == chunk, first, 0), axis=0)
        weight, sure, tie = _load_chunk(logits, row, chunk, columns, row_stride, best, temperature, kth, min_p, thresholds, CHUNK)
        sure = sure | (tie & (tl.cumsum(tie.to(tl.int64), axis=0) + rank <= take))
        running = before + tl.cumsum(tl.where(sure, mass_of(weight), 0), axis=0)
        token = (chunk * CHUNK + tl.sum((running <= target).to(tl.int32), axis=0)).to(tl.int64)
    tl.store(out + row, token)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    uniform: Tensor,
) -> Tensor:
    """One token a row of logits, float32 [R, V] -> ids int64 [R]. Everything else [R], on the same device.

    temperature: float; 0 takes the largest logit, of equal ones the first. top_k: integers; what is not in 1 .. V cuts nothing,
    and ties at the k-th stay in. min_p: float, at most 1, of the largest weight; top_p: float, a share of what these leave, whose
    ties enter by id; 1 cuts nothing. None: no row asks for this cut, and its launches are left out. uniform: float64 in [0, 1).
    A row whose largest logit is not finite gives -1. ValueError above MAX_COLUMNS logits in a row.
    """
    rows, columns = logits.shape
    if columns > MAX_COLUMNS:
        raise ValueError(f"{columns} logits in a row: at most {MAX_COLUMNS} are possible")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    best, greedy = argmax(logits)
    if rows == 0:
        return greedy
    draw = Draw(best, temperature, None if top_k is None else kth_logits(logits, top_k, temperature), min_p)
    thresholds, taken = (None, None) if top_p is None else nucleus(logits, top_p, draw)
    chunks = triton.cdiv(columns, CHUNK)
    # Each at an aligned address, whatever the number of rows: pointers of another alignment mean another compilation.
    masses, ties = (torch.empty(rows, chunks, dtype=torch.int64, device=logits.device) for _ in range(2))
    out = torch.empty_like(greedy)
    _chunk_masses[(rows, chunks)](
        logits, *draw, thresholds, masses, ties, columns, logits.stride(0), chunks, CHUNK=CHUNK, num_warps=WARPS
    )
    _pick[(rows,)](
        logits,
        best,
        greedy,
        *draw[1:],
        thresholds,
        taken,
        uniform,
        masses,
        ties,
        out,
        columns,
        logits.stride(0),
        chunks,
        CHUNK=CHUNK,
        CHUNK_BLOCK=triton.next_power_of_2(chunks),
        num_warps=WARPS,
    )
    return out
