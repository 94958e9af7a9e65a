"""Blocks of the cache copied in all layers by one launch: for copy on write, and to and from a staging area for swapping.

The layers' tensors lie anywhere; a table on the device says where each begins, how far apart its blocks are, and how large they::

    program (pair, tensor, part):   tensor's block sources[pair], words [part * BLOCK, ..)  ->  its block targets[pair]

The table is made once. A block must be dense memory, in whatever order of its dimensions: it is copied as words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import KVCache

BLOCK, WARPS = 1024, 4  # words of a program


@dataclass(frozen=True, eq=False)
class CacheTable:
    """Where the blocks of some layers' tensors are, for ``copy_blocks``."""

    places: Tensor  # int64 [tensors, 3]: address, bytes from a block to the next, bytes of a block
    sizes: tuple[int, ...]  # bytes of a block
    word: int  # bytes that divide every address and size: 1, 2, 4 or 8
    tensors: tuple[Tensor, ...]  # kept alive

    @staticmethod
    def of(caches: Sequence[KVCache]) -> CacheTable:
        """Of the keys, values and scales of all layers. ValueError where a block is not dense memory."""
        tensors = tuple(t for cache in caches for t in cache.tensors)
        rows = []
        for t in tensors:
            size = 1
            for stride, count in sorted((t.stride(d), t.shape[d]) for d in range(1, t.dim()) if t.shape[d] > 1):
                if stride != size:
                    raise ValueError(f"a block of {list(t.shape)} with strides {list(t.stride())} is not dense memory")
                size *= count
            rows.append((t.data_ptr(), t.stride(0) * t.element_size(), size * t.element_size()))
        return CacheTable._of(rows, tensors)

    @staticmethod
    def packed(memory: Tensor, sizes: Sequence[int]) -> CacheTable:
        """Of memory, uint8 [blocks, sum of sizes], in which a block's tensors lie one behind another."""
        if memory.dtype != torch.uint8 or not memory.is_contiguous() or memory.shape[1:] != (sum(sizes),):
            raise ValueError(f"{memory.dtype} {list(memory.shape)} does not have blocks of {sum(sizes)} bytes")
        ends, start = list(accumulate(sizes)), memory.data_ptr()
        rows = [(start + end - size, memory.shape[1], size) for end, size in zip(ends, sizes, strict=True)]
        return CacheTable._of(rows, (memory,))

    @staticmethod
    def _of(rows: list[tuple[int, int, int]], tensors: tuple[Tensor, ...]) -> CacheTable:
        word = math.gcd(8, *(number for row in rows for number in row))
        places = torch.tensor(rows, dtype=torch.int64).view(-1, 3).to(tensors[0].device if tensors else "cpu")
        return CacheTable(places, tuple(row[2] for row in rows), word, tensors)


@triton.jit
def _copy_blocks(from_places, to_places, sources, targets, BITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    pair, tensor = tl.program_id(0), tl.program_id(1)
    word: tl.constexpr = tl.int64 if BITS == 64 else (tl.int32 if BITS == 32 else (tl.int16 if BITS == 16 else tl.int8))
    place = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    none = tl.zeros((BLOCK,), tl.int64)
    source, target = tl.load(sources + pair).to(tl.int64), tl.load(targets + pair).to(tl.int64)
    begin = tl.load(from_places + tensor * 3) + source * tl.load(from_places + tensor * 3 + 1)
    end = tl.load(to_places + tensor * 3) + target * tl.load(to_places + tensor * 3 + 1)
    words = tl.load(to_places + tensor * 3 + 2) // (BITS // 8)
    mask = (place < words) & (none + source >= 0) & (none + target >= 0)
    values = tl.load(begin.to(tl.pointer_type(word)) + place, mask=mask)
    tl.store(end.to(tl.pointer_type(word)) + place, values, mask=mask)


def copy_blocks(caches: CacheTable, sources: Tensor, targets: Tensor, *, into: CacheTable | None = None) -> None:
    """Copy the blocks sources[i] over the blocks targets[i] (int32 or int64 [pairs], on the device), in all tensors of the table.

    into: the table of the targets, where that is another one (a staging area with as many tensors). A pair with a negative number
    is padding. No block may be a target twice, nor both source and target. ValueError where the tables do not match.
    """
    into = caches if into is None else into
    if into.sizes != caches.sizes or sources.shape != targets.shape:
        raise ValueError("the tables have blocks of other sizes, or there are not as many targets as sources")
    if not sources.numel() or not caches.sizes:
        return
    word = math.gcd(caches.word, into.word)
    grid = (sources.numel(), len(caches.sizes), triton.cdiv(max(caches.sizes), word * BLOCK))
    _copy_blocks[grid](
        caches.places, into.places, sources.contiguous(), targets.contiguous(), BITS=8 * word, BLOCK=BLOCK, num_warps=WARPS
    )
