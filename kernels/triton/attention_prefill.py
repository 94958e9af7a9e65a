"""Attention of chunks of any length over the paged cache: sequences of one token and of thousands in one launch.

A program has TOKENS consecutive tokens of one sequence with GROUP query heads of one key/value head (all of them, or SHARING
programs have a part each), packed into the rows of one product: row r is token r // GROUP, head r % GROUP of the group. Sequence
s gets the tile numbers from ``query_starts[s] // TOKENS + s`` on, which is room enough for its own tiles whatever the lengths of
those before it:

    query_starts  0           5   6               TOKENS 4:   tile number  0  1  2  3  4  ..
    sequence      a a a a a | b | c c c ...                                a0 a1 b0 c0 c1 ..

so a binary search finds the sequence of a tile, and T // TOKENS + S tiles are launched without knowing any length on the host;
those that are nobody's return. Sequences at the beginning that have one row each may be left out. Key tiles before the diagonal
(and, with a window, after its lower edge) need no mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import KVCache, PagedBatch
from kernels.triton.caches import code_bits
from kernels.triton.kv import FEW, WIDEST, Launch, arguments, finish, fold, in_registers, keep, load_queries, start


def choose(width: int, rows: int, bits: int, capability: int, *, dtype: torch.dtype) -> Launch:
    """For heads padded to ``width`` features, at most ``rows`` rows a sequence, a cache of ``bits`` an element, and queries
    of ``dtype``.
    """
    if in_registers(capability, dtype):
        return Launch(FEW if width > 256 else 16, max(16, min(32, 2048 // width)), 8 if width > 128 else 4, 2)
    if width > WIDEST:
        return Launch(16 if rows <= 16 or bits <= 8 else 32, 32, 8, 2)
    if rows <= 16:
        return Launch(16, max(16 if width > 256 else 32, min(64, 4096 // width)), 4, 3)
    from_memory = capability in (90, 100, 103)  # products take operands from there
    if width > 256:  # sums of 64 rows leave no registers for their shares
        return Launch(32, 16, 8, 2)
    if width > 128 and bits == 4 and not from_memory:  # more rows have too many registers, more warps widen each code more often
        return Launch(32, 16, 4, 2)
    if width > 128:
        return Launch(64, 16 if bits == 4 else 32, 8, 2)
    # As many rows as features, or more: then each warp has rows of its own, and a row's maximum stays within a warp. Where
    # products take their operands from registers (all but sm_90, 100), 64 tokens of 128 features leave too few of those, and with
    # codes, which are widened there, a third stage of the pipeline does.
    return Launch(128, 64 if width <= 64 or from_memory else 32, 8, 3 if bits > 8 or from_memory else 2)


def prefill(
    q: Tensor,
    cache: KVCache,
    batch: PagedBatch,
    out: Tensor,
    first: int = 0,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    capability: int,
) -> None:
    """Attention of q [T, Hq, D] into out, for sequences from ``first`` on, of which all before have a row each.

    Chunks may be of any lengths; see ``kernels.ops.Attention``.
    """
    given = arguments(q, cache, batch, scale=scale, window=window, cap=cap, capability=capability)
    group, sequences = given["GROUP"], len(batch.seq_lens)
    launch = choose(given["WIDTH"] + given["SIDE"], batch.max_query * group, code_bits(cache), capability, dtype=q.dtype)
    rows = max(launch.ROWS, triton.next_power_of_2(group))
    tiles = q.shape[0] // (rows // group) + sequences - (first // (rows // group) + first)
    _prefill[(tiles, q.shape[1] // group)](
        out_ptr=out,
        first_sequence=first,
        sequences=sequences,
        ROWS=rows,
        BLOCK_N=launch.BLOCK_N,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **given,
    )


@triton.jit
def _owner(starts_ptr, first, sequences, tile, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(sequence, its tile) of a tile number: the last sequence whose first tile is not beyond it."""
    low, high = tl.full((), 0, tl.int32) + first, sequences
    tile += first // TOKENS + first  # sequence ``first`` begins at row ``first``
    while high - low > 1:
        middle = (low + high) // 2
        ours = tl.load(starts_ptr + middle) // TOKENS + middle <= tile
        low = tl.where(ours, middle, low)
        high = tl.where(ours, high, middle)
    return low, tile - (tl.load(starts_ptr + low) // TOKENS + low)


@triton.jit
def _asking(row, first_row, tile, queries, GROUP: tl.constexpr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(query, token, head, live) of rows of a tile. query: of the sequence's; token int64: the row of the step."""
    query = tile * TOKENS + row // GROUP
    live = (row < TOKENS * GROUP) & (query < queries)
    return query, (first_row + query).to(tl.int64), tl.program_id(1) * GROUP + row % GROUP, live


@triton.jit(do_not_specialize=["table_stride", "window", "first_sequence", "sequences"])
def _prefill(  # type: ignore[no-untyped-def]
    q_ptr, out_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, starts_ptr, lengths_ptr, tables_ptr,
    q_token_stride, q_head_stride, block_stride, token_stride, head_stride, scale_block_stride, scale_token_stride,
    table_stride, first_sequence, sequences, scale, window, cap,
    D: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr, GROUP: tl.constexpr, SHARING: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // GROUP
    # The last tiles of a long chunk have the most keys: they start first, so that they do not end alone.
    sequence, tile = _owner(starts_ptr, first_sequence, sequences, tl.num_programs(0) - 1 - tl.program_id(0), TOKENS)
    kv_head = tl.program_id(1) // SHARING
    first_row = tl.load(starts_ptr + sequence)
    queries = tl.load(starts_ptr + sequence + 1) - first_row
    if tile * TOKENS >= queries:
        return
    row = tl.arange(0, ROWS)
    query, tokens, heads, live = _asking(row, first_row, tile, queries, GROUP, TOKENS)
    q, q_sum = load_queries(q_ptr, tokens * q_token_stride + heads * q_head_stride, live, D, WIDTH, SIDE, CODE)
    top, total, low, acc = start(q, 1, CODE)
    before = tl.load(lengths_ptr + sequence) - queries
    positions = before + query
    earliest = before + tile * TOKENS
    end = tl.minimum(earliest + TOKENS, before + queries)
    first = tl.maximum(earliest - window + 1, 0) // BLOCK_N if WINDOW else 0
    diagonal = (earliest + 1) // BLOCK_N  # tiles before it are seen by all rows
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    for block in range(first, diagonal):
        top, total, low, acc = fold(
            q, q_sum, top, total, low, acc, positions,
            k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table, kv_head, block * BLOCK_N, end,
            block_stride, token_stride, head_stride, scale_block_stride, scale_token_stride, scale, window, cap,
            D, BLOCK_SIZE, BLOCK_N, WINDOW, WINDOW, CODE, ASM,
        )  # fmt: skip
    for block in range(tl.maximum(first, diagonal), tl.cdiv(end, BLOCK_N)):
        top, total, low, acc = fold(
            q, q_sum, top, total, low, acc, positions,
            k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table, kv_head, block * BLOCK_N, end,
            block_stride, token_stride, head_stride, scale_block_stride, scale_token_stride, scale, window, cap,
            D, BLOCK_SIZE, BLOCK_N, True, WINDOW, CODE, ASM,
        )  # fmt: skip
    found, side, _ = finish(top, total, low, acc, CODE)
    # Rows once more, by a number that is 0 but comes from memory: kept, they would cost registers that the loops need.
    row += tl.load(starts_ptr + sequence, cache_modifier=".ca") - first_row
    query, tokens, heads, live = _asking(row, first_row, tile, queries, GROUP, TOKENS)
    keep(out_ptr, tokens * tl.num_programs(1) * GROUP + heads, found, side, live, D, WIDTH, SIDE)
