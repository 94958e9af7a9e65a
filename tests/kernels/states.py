"""Inputs of the gated delta rule for tests: random rules, sequences with a past and without, places full of NaN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import PagedBatch
from kernels.states import DeltaRule, StateCache

SHAPES = [  # key heads, value heads, key_dim, value_dim, kernel
    (1, 1, 16, 16, 4), (2, 6, 48, 20, 4), (2, 2, 128, 128, 4), (1, 3, 5, 130, 2), (3, 6, 12, 64, 5), (2, 4, 33, 1, 3),
]  # fmt: skip


def make(
    shape: Sequence[int], sequences: Sequence[tuple[int, int]], dtype: torch.dtype
) -> tuple[Tensor, Tensor, DeltaRule, StateCache, PagedBatch]:
    """Random inputs: rows of wider tensors. Places that hold nothing of a sequence's past are NaN."""
    key_heads, value_heads, key_dim, value_dim, kernel = shape
    values = value_heads * value_dim
    channels = 2 * key_heads * key_dim + values
    rule = DeltaRule(
        key_heads,
        torch.randn(kernel, channels) / 2,
        torch.exp(torch.randn(value_heads) * 2 - 2),
        torch.randn(value_heads) * 3,
        1 + torch.randn(value_dim) / 4,
        1e-6,
    )
    places, count = torch.randperm(len(sequences) + 2)[: len(sequences)].int(), len(sequences) + 2
    cache = StateCache(
        torch.full((count, kernel - 1, channels), float("nan")),
        torch.full((count, value_heads, key_dim, value_dim), float("nan")),
    )
    for place, (before, _) in zip(places.tolist(), sequences, strict=True):
        if before:
            cache.conv[place], cache.state[place] = torch.randn_like(cache.conv[0]), torch.randn_like(cache.state[0])
    rows, ends = [now for _, now in sequences], [before + now for before, now in sequences]
    starts = torch.tensor([0, *rows]).cumsum(0).int()
    x = torch.randn(sum(rows), channels + values + 9).to(dtype)[:, 4:-5]
    gates = torch.randn(sum(rows), 2 * value_heads + 3).to(dtype)[:, 1:-2]
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = PagedBatch(nothing, nothing, starts, torch.tensor(ends).int(), nothing, max(rows), max(ends), states=places)
    return x, gates, rule, cache, batch


def copied(cache: StateCache) -> StateCache:
    return StateCache(*(one.clone() for one in cache))
