"""Blocks of the cache copied in all layers at once; and compiled for every architecture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.layout import SCALED_CACHES, kv_nbytes
from kernels.ops import KVCache
from tests.kernels.triton.aot import Compilation, compile_all
from tests.kernels.triton.conftest import DEVICE

from kernels.triton import copy  # isort: skip  (after the conftest has chosen the interpreter)


Shape = tuple[int, int, int]  # tokens of a block, heads, features


KINDS = ("float32", "float16", "bfloat16", *SCALED_CACHES)


def layers(blocks: int, *, kind: str = "float16", shape: Shape = (4, 2, 24)) -> list[KVCache]:
    """Three, full of random bytes, scales too."""
    found = [KVCache.zeros(blocks, *shape, dtype=kind, device=torch.device(DEVICE)) for _ in range(3)]
    for tensor in tensors(found):
        tensor.view(torch.uint8).random_(0, 256)
    return found


def tensors(caches: list[KVCache]) -> list[Tensor]:
    return [t for cache in caches for t in cache.tensors]


def snapshot(caches: list[KVCache]) -> list[Tensor]:
    return [t.contiguous().view(torch.uint8).clone() for t in tensors(caches)]


def same(caches: list[KVCache], expected: list[Tensor]) -> bool:
    return all(torch.equal(now, then) for now, then in zip(snapshot(caches), expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4, 2, 24), (16, 1, 16), (3, 1, 6), (2, 1, 2), (16, 3, 300)], ids=str)
def test_copies(shape: Shape, kind: str) -> None:
    caches = layers(7, kind=kind, shape=shape)
    expected = snapshot(caches)
    assert len(expected) == (12 if kind in SCALED_CACHES else 6)
    assert sum(t[0].numel() for t in expected) == 3 * shape[0] * 2 * shape[1] * kv_nbytes(kind, shape[2])
    for tensor in expected:
        tensor[[3, 6]] = tensor[[0, 5]]
    table = copy.CacheTable.of(caches)
    for whole in (torch.int64, torch.int32):
        pairs = torch.tensor([[0, -1, 5, 2], [3, 4, 6, -1]], dtype=whole, device=DEVICE)
        copy.copy_blocks(table, *pairs)
        assert same(caches, expected)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    copy.copy_blocks(table, none, none)
    assert same(caches, expected)


@pytest.mark.parametrize("kind", ["float16", "int4"])
def test_staging(kind: str) -> None:
    """Out of the cache into a smaller area, and back into other blocks."""
    caches, area = layers(7, kind=kind), layers(2, kind=kind)
    expected, table, staging = snapshot(caches), copy.CacheTable.of(caches), copy.CacheTable.of(area)
    at = [torch.tensor(ids, device=DEVICE) for ids in ([6, 1], [0, 1], [2, 4])]
    copy.copy_blocks(table, at[0], at[1], into=staging)
    assert same(caches, expected)
    assert same(area, [tensor[[6, 1]] for tensor in expected])
    copy.copy_blocks(staging, at[1], at[2], into=table)
    for tensor in expected:
        tensor[[2, 4]] = tensor[[6, 1]]
    assert same(caches, expected)


def test_blocks_that_are_not_in_order() -> None:
    """Keys and values of a block side by side, with heads before tokens."""
    both = torch.randn(5, 2, 2, 16, 8, device=DEVICE)  # [B, k or v, Hkv, block size, D]
    expected = both.clone()
    expected[4] = both[1]
    table = copy.CacheTable.of([KVCache(both[:, 0].transpose(1, 2), both[:, 1].transpose(1, 2))])
    copy.copy_blocks(table, torch.tensor([1], device=DEVICE), torch.tensor([4], device=DEVICE))
    assert torch.equal(both, expected)


def test_what_does_not_fit() -> None:
    caches, ids = layers(3), torch.tensor([0, 1], device=DEVICE)
    with pytest.raises(ValueError, match="as many targets"):
        copy.copy_blocks(copy.CacheTable.of(caches), ids, ids[:1])
    with pytest.raises(ValueError, match="other sizes"):
        copy.copy_blocks(copy.CacheTable.of(caches), ids, ids, into=copy.CacheTable.of(layers(3, shape=(4, 2, 25))))
    with pytest.raises(ValueError, match="dense"):
        copy.CacheTable.of([KVCache(caches[0].k[..., :20], caches[0].v[..., :20])])
    copy.copy_blocks(copy.CacheTable.of([]), ids, ids)


@pytest.mark.compiles
def test_compilations() -> None:
    types = {"from_places": "*i64", "to_places": "*i64", "sources": "*i64", "targets": "*i64"}
    wanted = [
        Compilation("kernels.triton.copy:_copy_blocks", types, {"BITS": bits, "BLOCK": copy.BLOCK}, num_warps=copy.WARPS)
        for bits in (64, 32)
    ]
    for report in compile_all(wanted, loops=False):
        assert report.fits and report.stack == 0, report
