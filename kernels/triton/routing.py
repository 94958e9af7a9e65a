"""Who goes where in a mixture of experts: logits of the router, each token's experts, and tokens put together expert by expert.

::

    logits   [parts, T, E]   float32, never rounded: products of few rows are cut along the inputs, and added up by who reads them
    chosen   [T, A]          the experts of the largest scores, of equal ones the first; then in their own order
    order    [T * A]         pairs (t * A + j: the j-th expert of token t), expert by expert: 5 1 9 | 0 3 | 2 7 ..
    blocks   [B, 3]          (expert, its first place in order, how many from there): at most so many as a program has rows

B depends on shapes alone and is enough for any choice; blocks beyond what a choice needs have no pairs, and a program that finds
one leaves. Nothing is counted by atomics: a program owns an expert, looks through all pairs, and so knows how many come before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layout import TRITON_ROUTE_PARTS, triton_expert_blocks
from kernels.scores import SOFTMAX, Scores
from kernels.triton.argmax import LAST, LOWEST, ordered
from kernels.triton.kv import capability
from kernels.triton.tiled import _dot
from kernels.tune import AMPERE

FEW = 16  # tokens, for which the router's product is cut
INPUTS = 128  # of a product at a time
LOOK = 8192  # comparisons of pairs with experts at a time
WIDE = 1024  # pairs that are put in order at a time


class Routes(NamedTuple):
    """Where T tokens go, to ``active`` experts each."""

    shares: Tensor  # float32 [T, A]
    order: Tensor  # int32 [T * A]
    blocks: Tensor  # int32 [B, 3]


def logits(x: Tensor, router: Tensor) -> Tensor:
    """float32 [parts, T, E], to be added up, of x [T, K] (rows contiguous) and a router [E, K] in its dtype."""
    rows, (experts, inputs) = x.shape[0], router.shape
    few = rows <= FEW
    parts = min(TRITON_ROUTE_PARTS, triton.cdiv(inputs, INPUTS)) if few else 1
    block, deep, warps, stages = (16, INPUTS, 1, 4) if few else (64, INPUTS // 2, 4, 3)
    if 0 < capability(x.device) < AMPERE:  # products in plain arithmetic, from registers
        block, deep, warps = 16, 32, 4
    out = torch.empty((parts, rows, experts), dtype=torch.float32, device=x.device)
    _logits[(triton.cdiv(rows, block), triton.cdiv(experts, block), parts)](
        x,
        router,
        out,
        rows,
        experts,
        inputs,
        x.stride(0),
        EVEN=inputs % INPUTS == 0,
        BLOCK=block,
        BK=deep,
        ASM=x.is_cuda,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def route(
    logits: Tensor,
    active: int,
    normalized: bool,
    rows: int,
    scores: Scores = SOFTMAX,
    correction: Tensor | None = None,
    gains: Tensor | None = None,
) -> Routes:
    """By float32 [parts, T, E]: the experts of T > 0 tokens, in blocks of at most ``rows`` pairs. ``gains``: as in Mixture.

    ValueError for experts in groups, which the memory plan refuses before.
    """
    if scores.groups > 1:
        raise ValueError("no kernel for cards knows experts in groups")
    parts, tokens, experts = logits.shape
    pairs, count, device = tokens * active, triton_expert_blocks(tokens, experts, active, rows), logits.device
    shares = torch.empty((tokens, active), dtype=torch.float32, device=device)
    chosen, order = (torch.empty((tokens, active), dtype=torch.int32, device=device) for _ in range(2))
    blocks = torch.empty((count, 3), dtype=torch.int32, device=device)
    block = max(32, triton.next_power_of_2(experts))
    _choose[(tokens,)](
        logits,
        correction,
        gains,
        shares,
        chosen,
        order,
        blocks,
        tokens,
        experts,
        scores.least,
        scores.scale,
        PARTS=parts,
        ACTIVE=active,
        NORMALIZED=normalized,
        SIGMOID=scores.sigmoid,
        CORRECTED=correction is not None,
        GAINED=gains is not None,
        ALONE=tokens == 1,
        BLOCK=block,
        num_warps=max(1, min(8, block // 128)),
    )
    if tokens > 1:
        _arrange[(experts,)](
            chosen,
            order,
            blocks,
            pairs,
            count,
            experts,
            ROWS=rows,
            BLOCK=block,
            CHUNK=max(16, LOOK // block),
            WIDE=WIDE,
            num_warps=8,
        )
    return Routes(shares, order.view(-1), blocks)


@triton.jit(do_not_specialize=["M"])  # tokens: one compilation for all numbers of them
def _logits(  # type: ignore[no-untyped-def]
    x, router, out, M, N, K, x_stride, EVEN: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    part, parts = tl.program_id(2), tl.num_programs(2)
    per = tl.cdiv(tl.cdiv(K, BK), parts) * BK
    begin, end = part * per, tl.minimum(part * per + per, K)
    row, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, real = (row < M)[:, None], (column < N)[None, :]
    k = tl.arange(0, BK)
    x_at = x + row.to(tl.int64)[:, None] * x_stride + begin + k[None, :]
    w_at = router + column.to(tl.int64)[None, :] * K + begin + k[:, None]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(begin, end, BK):
        if EVEN:
            a, b = tl.load(x_at, mask=inside, other=0.0), tl.load(w_at, mask=real, other=0.0)
        else:
            left = K - start
            a = tl.load(x_at, mask=inside & (k < left)[None, :], other=0.0)
            b = tl.load(w_at, mask=real & (k < left)[:, None], other=0.0)
        acc = _dot(a, b, acc, ASM)
        x_at += BK
        w_at += BK
    at = (part.to(tl.int64) * M + row)[:, None] * N + column[None, :]
    tl.store(out + at, acc, mask=inside & real)


@triton.jit(do_not_specialize=["tokens"])
def _choose(  # type: ignore[no-untyped-def]
    logits, correction, gains, shares, chosen, order, blocks, tokens, experts, least, scale,
    PARTS: tl.constexpr, ACTIVE: tl.constexpr, NORMALIZED: tl.constexpr, SIGMOID: tl.constexpr, CORRECTED: tl.constexpr,
    GAINED: tl.constexpr, ALONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's experts and shares. ALONE: it is the only one, so that its pairs are in order already, a block each."""
    token, expert = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    real = expert < experts
    logit = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(PARTS):
        logit += tl.load(logits + (i * tokens + token) * experts + expert, mask=real, other=0.0)
    whole = 1.0  # what weights are divided by to be scores, where that is needed
    if SIGMOID:
        weight = 1.0 / (1.0 + tl.exp(-logit))
    else:
        weight = tl.exp(logit - tl.max(tl.where(real, logit, float("-inf")), axis=0))
        if CORRECTED or not NORMALIZED:
            whole = tl.sum(tl.where(real, weight, 0.0), axis=0)
    key = weight if SIGMOID else logit  # a softmax is in the order of logits
    if CORRECTED:
        key = weight / whole + tl.load(correction + expert, mask=real, other=0.0)
    code = tl.where(real, (ordered(key).to(tl.int64) << 32) | (LAST - expert), LOWEST)
    left = code
    for _ in range(ACTIVE):
        left = tl.where(left == tl.max(left, axis=0), LOWEST, left)
    taken = left != code
    total = whole
    if NORMALIZED:
        total = tl.sum(tl.where(taken, weight, 0.0), axis=0)
        if SIGMOID or CORRECTED:
            total = tl.maximum(total, least * whole)
    place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    at = token * ACTIVE + place
    share = weight / total * scale
    if GAINED:
        share *= tl.load(gains + expert, mask=taken, other=0.0)
    tl.store(shares + at, share, mask=taken)
    if ALONE:
        tl.store(order + place, place, mask=taken)
        tl.store(blocks + 3 * place, expert, mask=taken)
        tl.store(blocks + 3 * place + 1, place, mask=taken)
        tl.store(blocks + 3 * place + 2, tl.full((BLOCK,), 1, tl.int32), mask=taken)
    else:
        tl.store(chosen + at, expert, mask=taken)


@triton.jit(do_not_specialize=["pairs", "limit"])
def _arrange(  # type: ignore[no-untyped-def]
    chosen, order, blocks, pairs, limit, experts,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The pairs and blocks of one expert; the last one also has the ``limit`` less all blocks, which are empty."""
    mine, expert = tl.program_id(0), tl.arange(0, BLOCK)
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        found = tl.load(chosen + pair, mask=pair < pairs, other=-1)
        counts += tl.sum((found[None, :] == expert[:, None]).to(tl.int32), axis=1)
    before, needed = expert < mine, (counts + (ROWS - 1)) // ROWS
    first, block = tl.sum(tl.where(before, counts, 0), axis=0), tl.sum(tl.where(before, needed, 0), axis=0)
    own = tl.sum(tl.where(expert == mine, counts, 0), axis=0)
    done = first
    for start in range(0, pairs, WIDE):
        pair = start + tl.arange(0, WIDE)
        here = (tl.load(chosen + pair, mask=pair < pairs, other=-1) == mine).to(tl.int32)
        tl.store(order + done + tl.cumsum(here, axis=0) - 1, pair, mask=here == 1)
        done += tl.sum(here, axis=0)
    last = block + (own + (ROWS - 1)) // ROWS
    end = tl.where(mine == experts - 1, limit, last)
    for start in range(block, end, 64):
        at = start + tl.arange(0, 64)
        begun = (at - block) * ROWS
        place = blocks + 3 * at
        tl.store(place, tl.zeros((64,), tl.int32) + mine, mask=at < end)
        tl.store(place + 1, first + begun, mask=at < end)
        tl.store(place + 2, tl.maximum(tl.minimum(own - begun, ROWS), 0), mask=at < end)
