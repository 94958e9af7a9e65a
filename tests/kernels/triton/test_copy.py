"""Blocks of the cache copied in all layers at once; and compiled for every architecture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.ops import KVCache
from tests.kernels.triton.aot import Compilation, compile_all
from tests.kernels.triton.conftest import DEVICE

from kernels.triton import copy  # isort: skip  (after the conftest has chosen the interpreter)


Shape = tuple[int, int, int]  # tokens of a block, heads, features


def layers(blocks: int, *, dtype: torch.dtype = torch.float16, shape: Shape = (4, 2, 24), scales: bool = False) -> list[KVCache]:
    def random(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8).view(dtype).to(DEVICE)

    (tokens, heads, size), width = shape, torch.empty(0, dtype=dtype).element_size()
    found = []
    for _ in range(3):
        k, v = (random(blocks, tokens, heads, size * width) for _ in range(2))
        both = [torch.randn(blocks, tokens, heads).to(DEVICE) if scales else None for _ in range(2)]
        found.append(KVCache(k, v, *both))
    return found


def tensors(caches: list[KVCache]) -> list[Tensor]:
    return [t for c in caches for t in (c.k, c.v, c.k_scale, c.v_scale) if t is not None]


def snapshot(caches: list[KVCache]) -> list[Tensor]:
    return [t.contiguous().view(torch.uint8).clone() for t in tensors(caches)]


def same(caches: list[KVCache], expected: list[Tensor]) -> bool:
    return all(torch.equal(now, then) for now, then in zip(snapshot(caches), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [(4, 2, 24), (16, 1, 16), (3, 1, 5), (2, 1, 1), (16, 3, 300)], ids=str)
def test_copies(shape: Shape, dtype: torch.dtype) -> None:
    caches = layers(7, dtype=dtype, shape=shape, scales=dtype == torch.int8)
    expected = snapshot(caches)
    for tensor in expected:
        tensor[[3, 6]] = tensor[[0, 5]]
    table = copy.CacheTable.of(caches)
    for kind in (torch.int64, torch.int32):
        pairs = torch.tensor([[0, -1, 5, 2], [3, 4, 6, -1]], dtype=kind, device=DEVICE)
        copy.copy_blocks(table, *pairs)
        assert same(caches, expected)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    copy.copy_blocks(table, none, none)
    assert same(caches, expected)


def test_staging() -> None:
    """Out of the cache into a smaller area, and back into other blocks."""
    caches, area = layers(7), layers(2)
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


def test_compilations() -> None:
    types = {"from_places": "*i64", "to_places": "*i64", "sources": "*i64", "targets": "*i64"}
    wanted = [
        Compilation("kernels.triton.copy:_copy_blocks", types, {"BITS": bits, "BLOCK": copy.BLOCK}, num_warps=copy.WARPS)
        for bits in (64, 32)
    ]
    for report in compile_all(wanted):
        assert report.fits and report.stack == 0, report
