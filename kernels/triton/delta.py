"""The gated delta rule (kernels/states.py) in three launches: convolution, recurrence, and the norm with its gate.

A recurrence is as long as a sequence's rows, and short in width, so what runs at the same time are sequences, heads, and
stretches of BLOCK_V columns of a head's state, which no other stretch needs::

    state of a head   | key_dim rows, value_dim columns |   one warp holds key_dim x BLOCK_V numbers in registers
    program (s, h, j) |          [j BLOCK_V, + BLOCK_V) |   and goes from row to row of sequence s

The convolution is cut along channels, each of whose programs owns its channels of a sequence's past: it reads them, and writes
them when nobody of the program reads any more. Both kernels run over a token and over a prompt, and take nothing that changes
from step to step but pointers, so that all they need is compiled before the first request.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.delta import EPS
from kernels.ops import PagedBatch
from kernels.states import DeltaRule, StateCache

BLOCK_T, BLOCK_C = 8, 128  # tokens and channels of a tile of the convolution
BLOCK_V = 16  # columns of a state
HEADS = 8  # value heads that a program normalizes


def delta(x: Tensor, gates: Tensor, rule: DeltaRule, cache: StateCache, batch: PagedBatch) -> Tensor:
    """As kernels.states.Delta. Takes [T, channels] of x's dtype beside what it returns."""
    if batch.states is None:
        raise ValueError("the batch does not say where the states of its sequences are")
    tokens, sequences = x.shape[0], batch.seq_lens.shape[0]
    channels, heads, size = rule.conv.shape[1], rule.value_heads, rule.value_dim
    out = torch.empty(tokens, heads * size, dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    x, gates = (one if one.stride(1) == 1 else one.contiguous() for one in (x, gates))
    mixed = torch.empty(tokens, channels, dtype=x.dtype, device=x.device)
    where = (batch.states, batch.query_starts, batch.seq_lens)
    taps = rule.conv.shape[0]
    _convolve[(sequences, triton.cdiv(channels, BLOCK_C))](
        x, rule.conv, cache.conv, *where, mixed, x.stride(0), channels, cache.conv.stride(0),
        TAPS=taps, PAST=triton.next_power_of_2(max(1, taps - 1)), BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C, num_warps=4,
    )  # fmt: skip
    block = min(BLOCK_V, triton.next_power_of_2(size))
    _recur[(sequences, heads, triton.cdiv(size, block))](
        mixed, gates, rule.rate, rule.dt_bias, cache.state, *where, out, gates.stride(0), channels, cache.state.stride(0), heads,
        EPS=EPS, GROUP=heads // rule.key_heads, DK=rule.key_dim, KEY=triton.next_power_of_2(rule.key_dim), DV=size, BLOCK_V=block,
        num_warps=1,
    )  # fmt: skip
    _finish[(tokens, triton.cdiv(heads, HEADS))](
        out, x, rule.norm, x.stride(0), channels, heads, rule.eps,
        HEADS=HEADS, DV=size, VALUE=triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _convolve(  # type: ignore[no-untyped-def]
    x, taps, past, places, starts, lengths, out, x_stride, channels, place_stride,
    TAPS: tl.constexpr, PAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = silu(sum over i of taps[i] * x[t - TAPS + 1 + i]), and the last TAPS - 1 rows become the past."""
    sequence = tl.program_id(0)
    first = tl.load(starts + sequence).to(tl.int64)
    rows = (tl.load(starts + sequence + 1) - first).to(tl.int32)
    oldest = tl.where(tl.load(lengths + sequence) > rows, 1 - TAPS, 0)  # its rows count from there: without a past from 0
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = channel < channels
    x += first * x_stride + channel
    past += tl.load(places + sequence).to(tl.int64) * place_stride + channel
    for begin in range(0, rows, BLOCK_T):
        token = begin + tl.arange(0, BLOCK_T)
        total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for i in tl.static_range(TAPS):
            row = token - (TAPS - 1) + i
            total += tl.load(taps + i * channels + channel, mask=live, other=0.0)[None, :] * _rows(
                x, past, row, (row < rows)[:, None] & live[None, :], oldest, x_stride, channels, TAPS
            )
        total *= 1 / (1 + tl.exp(-total))
        where = (first + token)[:, None] * channels + channel[None, :]
        tl.store(out + where, total.to(out.dtype.element_ty), mask=(token < rows)[:, None] & live[None, :])
    if TAPS > 1:
        kept = tl.arange(0, PAST)
        mask = (kept < TAPS - 1)[:, None] & live[None, :]
        found = _rows(x, past, rows - (TAPS - 1) + kept, mask, oldest, x_stride, channels, TAPS)
        tl.debug_barrier()  # the whole program has read the past
        tl.store(past + kept[:, None] * channels, found, mask=mask)


@triton.jit
def _rows(x, past, row, mask, oldest, x_stride, channels, TAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a sequence, float32: those before its first are its past, or zeros."""
    new = tl.load(x + row.to(tl.int64)[:, None] * x_stride, mask=mask & (row >= 0)[:, None], other=0.0).to(tl.float32)
    old = tl.load(
        past + (row + TAPS - 1)[:, None] * channels, mask=mask & (row < 0)[:, None] & (row >= oldest)[:, None], other=0.0
    )
    return tl.where((row >= 0)[:, None], new, old)


@triton.jit
def _recur(  # type: ignore[no-untyped-def]
    mixed, gates, rate, dt_bias, state, places, starts, lengths, out, gate_stride, channels, place_stride, heads,
    EPS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, KEY: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The rule over the rows of a sequence, for one head and BLOCK_V columns of its state."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(starts + sequence).to(tl.int64)
    stop = tl.load(starts + sequence + 1).to(tl.int64)
    key = tl.arange(0, KEY)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    known, live = key < DK, column < DV
    mask = known[:, None] & live[None, :]
    state += tl.load(places + sequence).to(tl.int64) * place_stride + head * DK * DV + key[:, None] * DV + column[None, :]
    past = key < tl.where(tl.load(lengths + sequence) > stop - first, DK, 0)  # none, where it begins
    held = tl.load(state, mask=mask & past[:, None], other=0.0)
    own_rate, own_bias = tl.load(rate + head), tl.load(dt_bias + head)
    keys = heads // GROUP * DK
    query_at, value_at = head // GROUP * DK + key, 2 * keys + head * DV + column
    for row in range(first, stop):
        here, there = mixed + row * channels, gates + row * gate_stride + head
        q = tl.load(here + query_at, mask=known, other=0.0).to(tl.float32)
        k = tl.load(here + keys + query_at, mask=known, other=0.0).to(tl.float32)
        v = tl.load(here + value_at, mask=live, other=0.0).to(tl.float32)
        step = tl.load(there + heads).to(tl.float32) + own_bias
        step = tl.maximum(step, 0.0) + tl.log(1 + tl.exp(-tl.abs(step)))  # softplus
        beta = 1 / (1 + tl.exp(-tl.load(there).to(tl.float32)))
        q *= tl.rsqrt(tl.sum(q * q, 0) + EPS) * DK**-0.5
        k *= tl.rsqrt(tl.sum(k * k, 0) + EPS)
        held *= tl.exp(-own_rate * step)
        change = (v - tl.sum(k[:, None] * held, 0)) * beta
        held += k[:, None] * change[None, :]
        found = tl.sum(q[:, None] * held, 0)
        tl.store(out + row * heads * DV + head * DV + column, found.to(out.dtype.element_ty), mask=live)
    tl.store(state, held, mask=mask)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    out, x, weight, x_stride, channels, heads, eps, HEADS: tl.constexpr, DV: tl.constexpr, VALUE: tl.constexpr
):  # fmt: skip
    """out / sqrt(mean(out^2) + eps) * weight * silu(z), in place."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, VALUE)
    mask = (head < heads)[:, None] & (column < DV)[None, :]
    at = head[:, None] * DV + column[None, :]
    out += row * heads * DV + at
    found = tl.load(out, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(x + row * x_stride + channels + at, mask=mask, other=0.0).to(tl.float32)
    size = tl.rsqrt(tl.sum(found * found, 1) / DV + eps)
    found = found * size[:, None] * tl.load(weight + column, mask=column < DV, other=0.0)[None, :] * (z / (1 + tl.exp(-z)))
    tl.store(out, found.to(out.dtype.element_ty), mask=mask)
