"""Attention over the paged cache without copying it.

The blocks of a sequence are mostly consecutive ids (the pool sees to that), so a sequence is a few segments, and a segment of
consecutive blocks is a strided view of the cache. Torch's flash kernel runs on each and returns the logarithms of the softmax
sums, by which the partial results are merged. Only where a sequence is scattered are short runs gathered, at most GATHER blocks
at a time.

Queries are taken in tiles that do not cross a segment's start, so that a tile meets its own tokens in one segment under the
plain causal mask and everything before without a mask:

    keys    0 ........... | masked by the window | seen by all rows | tile (causal) |
    window: first row sees from i0 - w + 1; the last row of the tile from i1 - w

Quantized keys and values are widened WIDEN at a time, to the queries' dtype. Scores with a cap, which that kernel does not know,
are computed in float32, for as many keys at a time. Sinks, which it does not know either, only take a share of
the whole at last: 1 - 1 / (1 + e^(sum - sink)).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from kernels.kv_cache import dequantize
from kernels.layout import GATHER, TILE_QUERIES, TOGETHER, WIDEN
from kernels.ops import KVCache, PagedBatch

VIEW_BLOCKS = 8  # shorter runs of consecutive blocks are gathered with their neighbours
HIDDEN = -30000.0  # added to scores that a window hides: finite in every dtype, so that rows that see nothing stay numbers


@dataclass(frozen=True)
class Segment:
    """Positions start .. stop - 1 of one sequence: slots from ``slot`` on, or the blocks ``gather`` where those are scattered."""

    start: int
    stop: int
    slot: int
    gather: Tensor | None


@dataclass(frozen=True)
class Part:
    """Keys first .. last - 1 of a segment, for one tile."""

    segment: Segment
    first: int
    last: int
    causal: bool
    mask: Tensor | None  # float32 [rows, keys]


@dataclass(frozen=True)
class Tile:
    """Rows of q and all the keys they see."""

    row: int
    rows: int
    parts: tuple[Part, ...]


def segments(table: Sequence[int], length: int, block_size: int) -> list[Segment]:
    """Cut the first ``length`` positions of a block table into long views and gathered stretches."""
    count = -(-length // block_size)
    runs = [0] + [i for i in range(1, count) if table[i] != table[i - 1] + 1] + [count]
    found: list[Segment] = []

    def add(first: int, last: int) -> None:
        if first < last:
            ids = table[first:last]
            scattered = ids[-1] - ids[0] != last - first - 1 or any(b != a + 1 for a, b in pairwise(ids))
            gather = torch.tensor(ids, dtype=torch.int64) if scattered else None
            found.append(Segment(first * block_size, min(last * block_size, length), ids[0] * block_size, gather))

    waiting = 0  # first block that is in no segment yet
    for first, last in pairwise(runs):
        if last - first >= VIEW_BLOCKS or last - waiting > GATHER:
            add(waiting, first)
            waiting = first
        if last - first >= VIEW_BLOCKS:
            add(first, last)
            waiting = last
    add(waiting, count)
    return found


def plan(batch: PagedBatch, block_size: int, window: int | None) -> list[Tile]:
    """All tiles of a step: the same for every layer with this window."""
    tiles: list[Tile] = []
    for (row, stop), end, table in zip(
        pairwise(batch.query_starts_list), batch.seq_lens_list, batch.block_tables_list, strict=True
    ):
        begin = end - (stop - row)
        pieces = segments(table, end, block_size)
        size = TILE_QUERIES if window is None else min(TILE_QUERIES, window)
        for segment in pieces:
            for i0 in range(max(begin, segment.start), segment.stop, size):
                i1 = min(i0 + size, segment.stop)
                tiles.append(Tile(row + i0 - begin, i1 - i0, tuple(_parts(pieces, segment, i0, i1, window))))
    return tiles


def _parts(pieces: Sequence[Segment], own: Segment, i0: int, i1: int, window: int | None) -> list[Part]:
    """What the queries i0 .. i1 - 1 see."""
    low, clear = (0, 0) if window is None else (max(0, i0 - window + 1), max(0, i1 - window))
    single = i1 == i0 + 1  # one row needs no causal mask: its own key goes with those before
    found = []
    for segment in pieces:
        last = min(segment.stop, i1 if single else i0)
        hidden = max(low, segment.start), min(last, clear)
        if hidden[0] < hidden[1] and window is not None:
            keys, queries = torch.arange(*hidden), torch.arange(i0, i1).unsqueeze(1)
            found.append(Part(segment, *hidden, False, torch.where(keys > queries - window, 0.0, HIDDEN)))
        first = max(clear, segment.start)
        if first < last:
            found.append(Part(segment, first, last, False, None))
    if not single:
        found.append(Part(own, i0, i1, True, None))
    return found


class PagedAttention:
    """The ``attention`` of Ops. Holds the tiles of the current step, which all layers share."""

    def __init__(self) -> None:
        self._batch: PagedBatch | None = None
        self._tiles: dict[tuple[int, int | None], list[Tile]] = {}

    def __call__(
        self,
        q: Tensor,
        cache: KVCache,
        batch: PagedBatch,
        *,
        scale: float,
        window: int | None = None,
        cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype)
        group = q.shape[1] // cache.k.shape[2]
        for tile in self._plan(batch, cache.block_size, window):
            rows = slice(tile.row, tile.row + tile.rows)
            grouped = q[rows].unflatten(1, (-1, group)).permute(1, 2, 0, 3)  # [Hkv, group, rows, D]
            if tile.rows == 1:
                grouped = grouped.permute(2, 0, 1, 3)  # the group takes the queries' place: [1, Hkv, group, D]
            pieces: list[tuple[Tensor, Tensor]] = []
            for piece in (piece for part in tile.parts for piece in _stretches(cache, part, cap)):
                if len(pieces) == TOGETHER:  # a long context has many, and no more than these are there at once
                    pieces = [_merge(pieces)]
                pieces.append(_attend(grouped, cache, piece, scale, cap))
            found, sums = pieces[0] if len(pieces) == 1 else _merge(pieces)
            if sinks is not None:
                found = found * _shares_beside(sinks, sums, tile.rows)
            target = out[rows].unflatten(1, (-1, group))
            target.copy_(found if tile.rows == 1 else found.permute(2, 0, 1, 3))
        return out

    def _plan(self, batch: PagedBatch, block_size: int, window: int | None) -> list[Tile]:
        if self._batch is not batch:
            self._batch, self._tiles = batch, {}
        key = (block_size, window)
        if key not in self._tiles:
            self._tiles[key] = plan(batch, block_size, window)
        return self._tiles[key]


def _stretches(cache: KVCache, part: Part, cap: float | None) -> Iterator[Part]:
    """The part in pieces of at most WIDEN keys where they have to be widened. A tile's own keys are fewer anyway."""
    if (cache.k_scale is None and cap is None) or part.causal:
        yield part
        return
    for first in range(part.first, part.last, WIDEN):
        last = min(first + WIDEN, part.last)
        mask = None if part.mask is None else part.mask[:, first - part.first : last - part.first]
        yield replace(part, first=first, last=last, mask=mask)


def _attend(q: Tensor, cache: KVCache, part: Part, scale: float, cap: float | None) -> tuple[Tensor, Tensor]:
    """(partial output like q, logarithms of the sums float32) of one tile over one part of its keys."""
    k, v = (_keys(*pair, part, q) for pair in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)))
    if cap is not None:
        return _capped(q, k, v, part, scale, cap)
    mask = None if part.mask is None else part.mask.to(q.dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, part.causal, attn_mask=mask, scale=scale)


def _capped(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float, cap: float) -> tuple[Tensor, Tensor]:
    """The same with cap * tanh(score / cap) as scores."""
    scores = (q.float() @ k.float().transpose(-1, -2)).mul_(scale / cap).tanh_().mul_(cap)
    if part.causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1), -torch.inf)
    elif part.mask is not None:
        scores += part.mask
    sums = scores.logsumexp(-1)
    return scores.sub_(sums.unsqueeze(-1)).exp_() @ v.float(), sums


def _keys(codes: Tensor, scales: Tensor | None, part: Part, q: Tensor) -> Tensor:
    """The part's keys or values: [1, Hkv, L, D] for one query, [Hkv, group, L, D] with a stride of 0 for many.

    Not copied, but for those of scattered blocks and for quantized ones.
    """
    found = _slots(codes, part)
    if scales is not None:
        found = dequantize(found, _slots(scales, part)).to(q.dtype)
    heads_first = found.transpose(0, 1)
    if q.shape[0] == 1 and q.shape[1] == found.shape[1]:
        return heads_first.unsqueeze(0)
    return heads_first.unsqueeze(1).expand(-1, q.shape[1], -1, -1)


def _slots(cache: Tensor, part: Part) -> Tensor:
    """What a cache's tensor has of the part's tokens, in their order: [L, ...]."""
    segment, block_size = part.segment, cache.shape[1]
    first, last = part.first - segment.start, part.last - segment.start
    if segment.gather is None:
        return cache.flatten(0, 1)[segment.slot + first : segment.slot + last]
    blocks = segment.gather[first // block_size : -(-last // block_size)]
    skipped = first // block_size * block_size
    return cache[blocks].flatten(0, 1)[first - skipped : last - skipped]


def _shares_beside(sinks: Tensor, sums: Tensor, rows: int) -> Tensor:
    """What is left of a softmax with a sum of e^``sums`` where there are sinks [Hq], too: float32, for each row of a tile."""
    each = sinks.float().view(1, sums.shape[1], -1) if rows == 1 else sinks.float().view(*sums.shape[:2], 1)
    return torch.sigmoid(sums - each).unsqueeze(-1)


def _merge(pieces: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Partial softmax results weighted by their shares of the whole sum, and its logarithm; both float32."""
    sums = torch.stack([s for _, s in pieces])
    whole = sums.logsumexp(0)
    shares = torch.exp(sums - whole).unsqueeze(-1)
    total = pieces[0][0] * shares[0]
    for (found, _), share in zip(pieces[1:], shares[1:]):
        total = torch.addcmul(total, found.to(total.dtype), share)
    return total, whole
