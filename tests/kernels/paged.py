"""A paged cache and a step's batch for tests: chosen lengths over block tables that are in order, shuffled or half and half."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from kernels.batch import Wanted
from kernels.kv_cache import dequantize, quantize
from kernels.ops import KVCache, PagedBatch


def make_step(
    sequences: Sequence[tuple[int, int]],  # (tokens in the cache already, tokens of this step)
    *,
    block_size: int = 16,
    kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    order: str = "shuffled",
    seed: int = 0,
) -> tuple[PagedBatch, KVCache]:
    """The cache holds every token of the step already; every slot that belongs to no token is NaN."""
    rng = random.Random(seed)
    lengths = [before + now for before, now in sequences]
    counts = [-(-n // block_size) for n in lengths]
    total = sum(counts) + 3
    ids = list(range(total))
    if order != "consecutive":
        half = total // 2 if order == "half" else 0
        tail = ids[half:]
        rng.shuffle(tail)
        ids[half:] = tail
    tables = [tuple(ids[sum(counts[:i]) : sum(counts[: i + 1])]) for i in range(len(counts))]
    shape = (total, block_size, kv_heads, head_dim)
    cache = KVCache(torch.full(shape, float("nan")), torch.full(shape, float("nan")))
    generator = torch.Generator().manual_seed(seed)
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    for (before, now), length, table in zip(sequences, lengths, tables, strict=True):
        owned = [table[p // block_size] * block_size + p % block_size for p in range(length)]
        for tensor in (cache.k, cache.v):
            tensor.flatten(0, 1)[owned] = torch.randn(length, kv_heads, head_dim, generator=generator)
        positions += range(before, length)
        slots += owned[before:]
        starts.append(starts[-1] + now)
    padded = torch.zeros(len(tables), max(counts, default=0), dtype=torch.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = torch.tensor(table)
    batch = PagedBatch(
        positions=torch.tensor(positions, dtype=torch.int64),
        slots=torch.tensor(slots, dtype=torch.int64),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=padded,
        max_query=max((now for _, now in sequences), default=0),
        max_seq=max(lengths, default=0),
        singles=next((i for i, (_, now) in enumerate(sequences) if now != 1), len(sequences)),
    )
    return batch, KVCache(cache.k.to(dtype), cache.v.to(dtype))


def wanting(batch: PagedBatch, counts: Sequence[int]) -> PagedBatch:
    """The same step; of sequence s the last ``counts[s]`` rows are wanted, and only the last sequences may have none."""
    starts, chosen = [0], [s for s, count in enumerate(counts) if count]
    ends = batch.query_starts_list[1:]
    place = batch.positions.device
    rows = torch.tensor([row for s in chosen for row in range(ends[s] - counts[s], ends[s])], dtype=torch.int64, device=place)
    for s in chosen:
        starts.append(starts[-1] + counts[s])
    few = PagedBatch(
        positions=batch.positions[rows],
        slots=batch.slots[rows],
        query_starts=torch.tensor(starts, dtype=torch.int32, device=place),
        seq_lens=batch.seq_lens[chosen],
        block_tables=batch.block_tables[chosen],
        max_query=max((counts[s] for s in chosen), default=0),
        max_seq=max((batch.seq_lens_list[s] for s in chosen), default=0),
        singles=next((i for i, s in enumerate(chosen) if counts[s] != 1), len(chosen)),
    )
    return replace(batch, wanted=Wanted(rows, few))


def quantized(cache: KVCache, dtype: str, given: tuple[float, float] | None = None) -> tuple[KVCache, KVCache]:
    """(a float cache quantized to ``dtype``, what that stands for in float32); slots that are NaN stay poisoned in both."""
    parts = [quantize(x, dtype, scale) for x, scale in zip((cache.k, cache.v), given or (None, None), strict=True)]
    for x, (codes, scales) in zip((cache.k, cache.v), parts, strict=True):
        nobody = x.isnan().any(-1)
        for tensor in (codes, scales):
            tensor.view(torch.uint8).unflatten(-1, (-1, tensor.element_size()))[nobody] = 255  # NaN, or the largest code
    (k, k_scale), (v, v_scale) = parts
    small = KVCache(k, v, k_scale, v_scale, given)
    return small, KVCache(dequantize(k, k_scale), dequantize(v, v_scale))
