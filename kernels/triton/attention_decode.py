"""Attention of one token a sequence over the paged cache, each sequence cut into splits that are merged by log-sum-exp.

    program (s, h, i): query heads h * GROUP .. + GROUP of sequence s, the rows of one product (at least 16), over split i;
                       SHARING programs in a row have the same key/value head
    tokens of s that are seen, in tiles: | 0 .. per | per .. 2 per | ... |      per = max(ceil(tiles / splits), a minimum)

Splits beyond a sequence's end return at once, so a launch that was made for the longest sequence costs little for short ones.
With more than one split a program leaves its rows' attention and log2-sum-exp2 in float32, and ``_merge`` weighs them by
2^(its sum - the largest): one program for each sequence and query head. With one split the result is written directly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import KVCache, PagedBatch
from kernels.triton.caches import code_bits
from kernels.triton.kv import FEW, WIDEST, Launch, arguments, finish, fold, in_registers, keep, load_queries, start

MIN_SPLIT = 128  # tokens: less is not worth a program
MAX_SPLITS = 64
RESIDENT = 2  # programs that a multiprocessor holds at a time


def choose(width: int, bits: int, capability: int, *, dtype: torch.dtype) -> Launch:
    """For heads padded to ``width`` features, a cache of ``bits`` an element, and queries of ``dtype``.

    ROWS are at least those that a product needs.
    """
    if in_registers(capability, dtype):
        return Launch(FEW if width > 256 else 16, max(16, min(32, 4096 // width)), 8, 2)
    if width > WIDEST:  # of latents, which many heads share
        return Launch(16, 32, 8, 2)
    wide = capability in (80, 90, 100, 103)  # much shared memory, and memory fast enough to need more on its way
    tile = 8 * (16384 if wide else 8192) // (width * bits)
    # Heads of 512 have more on its way in each stage, and those of 16 bits twice as much as that: two programs are to fit.
    return Launch(16, max(16, min(64, tile)), 4, 5 if width <= 256 else 4 if tile >= 16 else 3)


def split_count(max_seq: int, sequences: int, kv_heads: int, multiprocessors: int) -> int:
    """Splits of each sequence: as many as fill the card once, of MIN_SPLIT tokens at least."""
    filling = RESIDENT * multiprocessors // max(1, sequences * kv_heads)
    return max(1, min(filling, triton.cdiv(max_seq, MIN_SPLIT), MAX_SPLITS))


def decode(
    q: Tensor,
    cache: KVCache,
    batch: PagedBatch,
    out: Tensor,
    sequences: int,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    splits: int,
    capability: int,
) -> None:
    """Attention of q [T, Hq, D] into out for the first ``sequences``, which have a row at most; see ``kernels.ops.Attention``."""
    heads, size = q.shape[1:]
    given = arguments(q, cache, batch, scale=scale, window=window, cap=cap, capability=capability)
    launch = choose(given["WIDTH"] + given["SIDE"], code_bits(cache), capability, dtype=q.dtype)
    tiles = {"BLOCK_N": launch.BLOCK_N, "MIN_TILES": MIN_SPLIT // launch.BLOCK_N}
    parts = sums = None
    if splits > 1:
        parts = torch.empty((sequences, heads, splits, size), dtype=torch.float32, device=q.device)
        sums = torch.empty((sequences, heads, splits), dtype=torch.float32, device=q.device)
    _decode[(sequences, heads // given["GROUP"], splits)](
        out_ptr=out if parts is None else parts,
        sums_ptr=sums,
        ROWS=max(launch.ROWS, triton.next_power_of_2(given["GROUP"])),
        SPLIT=splits > 1,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **given,
        **tiles,
    )
    if parts is not None:
        shared = {name: given[name] for name in ("starts_ptr", "lengths_ptr", "window", "D", "WIDTH", "WINDOW")}
        _merge[(sequences, heads, triton.cdiv(size, given["WIDTH"]))](
            parts_ptr=parts,
            sums_ptr=sums,
            out_ptr=out,
            splits=splits,
            SPLITS=triton.next_power_of_2(splits),
            num_warps=8 if given["WIDTH"] > 256 else 4,  # all parts are in registers at once
            **shared,
            **tiles,
        )


@triton.jit
def _stretch(  # type: ignore[no-untyped-def]
    length, window, splits, BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """(first tile, tiles of a split, tiles' end) of a sequence of ``length`` tokens, whose last one asks."""
    tiles = tl.cdiv(length, BLOCK_N)
    first = tl.maximum(length - window, 0) // BLOCK_N if WINDOW else 0
    return first, tl.maximum(tl.cdiv(tiles - first, splits), MIN_TILES), tiles


@triton.jit(do_not_specialize=["table_stride", "window"])
def _decode(  # type: ignore[no-untyped-def]
    q_ptr, out_ptr, sums_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, starts_ptr, lengths_ptr, tables_ptr,
    q_token_stride, q_head_stride, block_stride, token_stride, head_stride, scale_block_stride, scale_token_stride,
    table_stride, scale, window, cap,
    D: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr, GROUP: tl.constexpr, SHARING: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
    CODE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """out: [S, Hq, D] in the queries' dtype, or float32 [S, Hq, splits, D] where SPLIT; sums float32 [S, Hq, splits]."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1) // SHARING, tl.program_id(2)
    splits = tl.num_programs(2)
    token = tl.load(starts_ptr + sequence).to(tl.int64)
    if tl.load(starts_ptr + sequence + 1) == token:
        return
    length = tl.load(lengths_ptr + sequence)
    lowest, per, tiles = _stretch(length, window, splits, BLOCK_N, MIN_TILES, WINDOW)
    first = lowest + split * per
    last = tl.minimum(first + per, tiles)
    if SPLIT and first >= last:
        return
    in_group = tl.arange(0, ROWS)
    live = in_group < GROUP
    heads = tl.program_id(1) * GROUP + in_group
    q, q_sum = load_queries(q_ptr + token * q_token_stride, heads * q_head_stride, live, D, WIDTH, SIDE, CODE)
    top, total, low, acc = start(q, BLOCK_N, CODE)
    positions = in_group * 0 + (length - 1)
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    for tile in range(first, last):
        top, total, low, acc = fold(
            q, q_sum, top, total, low, acc, positions,
            k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table, kv_head, tile * BLOCK_N, length,
            block_stride, token_stride, head_stride, scale_block_stride, scale_token_stride, scale, window, cap,
            D, BLOCK_SIZE, BLOCK_N, True, WINDOW, CODE, ASM,
        )  # fmt: skip
    found, side, sums = finish(top, total, low, acc, CODE)
    rows = token * tl.num_programs(1) * GROUP + heads
    if SPLIT:
        rows = rows * splits + split
        tl.store(sums_ptr + rows, sums, mask=live)
    keep(out_ptr, rows, found, side, live, D, WIDTH, SIDE)


@triton.jit(do_not_specialize=["splits", "window"])
def _merge(  # type: ignore[no-untyped-def]
    parts_ptr, sums_ptr, out_ptr, starts_ptr, lengths_ptr, splits, window,
    D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """out [S, Hq, D] of parts and sums as ``_decode`` leaves them; SPLITS: a power of two, at least splits."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(starts_ptr + sequence).to(tl.int64)
    if tl.load(starts_ptr + sequence + 1) == token:
        return
    first, per, tiles = _stretch(tl.load(lengths_ptr + sequence), window, splits, BLOCK_N, MIN_TILES, WINDOW)
    row = token * tl.num_programs(1) + head
    split, features = tl.arange(0, SPLITS), tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    made = split < tl.cdiv(tiles - first, per)
    sums = tl.load(sums_ptr + row * splits + split, mask=made, other=-float("inf"))
    weights = tl.exp2(sums - tl.max(sums, 0))
    inside = features < D
    at = (row * splits + split)[:, None] * D + features[None, :]
    parts = tl.load(parts_ptr + at, mask=made[:, None] & inside[None, :], other=0.0)
    found = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out_ptr + row * D + features, found.to(out_ptr.dtype.element_ty), mask=inside)
