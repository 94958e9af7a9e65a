"""Keys and values as a quantized cache takes them, in Triton: the oracle's codes and scales, and nothing beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.kv_cache import LARGEST, dequantize, quantize
from kernels.layout import SCALED_CACHES
from kernels.ops import KVCache
from tests.kernels.triton.conftest import DEVICE, INTERPRETED
from tests.kernels.triton.tensors import DTYPES, draw, poison  # noqa: F401
from tests.kernels.triton.test_rope import angles, norms, step

from kernels.triton import rope  # isort: skip  (after the conftest has chosen the interpreter)


def empty_cache(kind: str, shape: tuple[int, ...], given: tuple[float, float] | None = None) -> KVCache:
    """With poison in every slot."""
    cache = KVCache.zeros(*shape, dtype=kind, device=torch.device(DEVICE), given=given)  # type: ignore[misc]
    for codes in cache.tensors[:2]:
        codes.view(torch.uint8).fill_(0x7F)
    for scales in cache.tensors[2:]:
        scales.fill_(float("nan"))
    return cache


def stored(cache: KVCache, slots: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(codes, scales) of keys and of values at these slots; nothing is written anywhere else."""
    others = torch.ones(cache.k.shape[0] * cache.block_size, dtype=torch.bool)
    others[slots.cpu()] = False
    found = []
    for codes, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        assert scales is not None and bool(scales.flatten(0, 1).cpu()[others].isnan().all())
        assert bool((codes.view(torch.uint8).flatten(0, 1).cpu()[others] == 0x7F).all())
        found.append((codes.view(torch.uint8).flatten(0, 1)[slots].view(codes.dtype), scales.flatten(0, 1)[slots]))
    return found


def check_stored(found: tuple[Tensor, Tensor], exact: Tensor, kind: str, given: float | None = None) -> None:
    """As the oracle would store ``exact``, the numbers in a cache that is not quantized. On cards a compiler may have rounded
    those once less on the way: a code may be the neighbour of what it should be there.
    """
    expected = quantize(exact, kind, given)
    if INTERPRETED:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
        return
    torch.testing.assert_close(found[1], expected[1], rtol=2**-10 if kind == "int4" else 1e-6, atol=2**-24)
    mine, theirs = dequantize(*found), dequantize(*expected)
    span = exact.float().amax(-1, keepdim=True) - exact.float().amin(-1, keepdim=True)
    assert bool(((mine - theirs).abs() <= span / 6).all())
    assert float(((mine - theirs).abs() > span / 1000).float().mean()) < 0.01


@pytest.mark.parametrize("kind", SCALED_CACHES)
@pytest.mark.parametrize(
    ("size", "rotary", "dtype"),
    [(16, 16, 0), (20, 8, 1), (48, 16, 2), (64, 64, 1), (80, 80, 0), (96, 24, 2), (128, 128, 1), (128, 64, 2)],
)
def test_quantized_caches(size: int, rotary: int, dtype: int, kind: str) -> None:
    """Tiny and large numbers, a head of zeros, and one of equal numbers."""
    batch, wide = step([(0, 3), (7, 2)], block_size=8, kv_heads=3, head_dim=size, dtype=DTYPES[dtype])
    qkv = draw(5, 7 * size, dtype=DTYPES[dtype])
    qkv[:, 4 * size : 5 * size] *= 1e-3
    qkv[:, 6 * size :] *= 300
    qkv[3, size : 3 * size] = 0
    qkv[4, 4 * size : 5 * size] = 2.5
    table = angles(rotary)
    rope.rope_store(qkv.clone(), 1, wide, batch, table)
    small = empty_cache(kind, wide.k.shape)
    rope.rope_store(qkv, 1, small, batch, table)
    for found, values in zip(stored(small, batch.slots), (wide.k, wide.v), strict=True):
        check_stored(found, values.flatten(0, 1)[batch.slots], kind)


@pytest.mark.parametrize("kind", SCALED_CACHES)
def test_given_scales(kind: str) -> None:
    """Those of the checkpoint are stored, and what is larger is cut; int4 has its own all the same."""
    batch, wide = step([(0, 3)], kv_heads=2, head_dim=32)
    qkv, table, given = draw(3, 5 * 32, dtype=torch.float32), angles(32), (1 / LARGEST[kind], 0.7 / LARGEST[kind])
    rope.rope_store(qkv.clone(), 1, wide, batch, table)
    small = empty_cache(kind, wide.k.shape, given)
    rope.rope_store(qkv, 1, small, batch, table)
    for found, values, scale in zip(stored(small, batch.slots), (wide.k, wide.v), given, strict=True):
        exact = values.flatten(0, 1)[batch.slots]
        check_stored(found, exact, kind, scale)
        if kind != "int4":
            assert bool((found[1] == torch.tensor(scale)).all())
            torch.testing.assert_close(dequantize(*found).abs().max(), torch.tensor(scale * LARGEST[kind], device=DEVICE))


@pytest.mark.parametrize("kind", SCALED_CACHES)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_is_not_hidden(wrong: float, kind: str) -> None:
    """A head with such a number is not finite, in part or all of it; others are as ever."""
    batch, _ = step([(0, 2)], kv_heads=2, head_dim=16)
    qkv, small = draw(2, 6 * 16, dtype=torch.float32), empty_cache(kind, (3, 16, 2, 16))
    qkv[1, 2 * 16 + 3] = qkv[1, 5 * 16 + 12] = wrong
    rope.rope_store(qkv, 2, small, batch, angles(8))
    for (codes, scales), head in zip(stored(small, batch.slots), (0, 1), strict=True):
        finite = dequantize(codes, scales).isfinite().all(-1)
        assert not finite[1, head] and int(finite.sum()) == 3


@pytest.mark.parametrize("kind", SCALED_CACHES)
def test_partial_sums_into_quantized_caches(kind: str) -> None:
    """What a product that adds them up itself would have left there; padding is left alone."""
    batch, wide = step([(5, 2), (17, 1), (7, 1)], kv_heads=2, head_dim=64, dtype=torch.float16)
    batch = replace(batch, slots=torch.where(torch.arange(4, device=DEVICE) == 2, -1, batch.slots))
    parts, table, given = draw(3, 4, 9 * 64, dtype=torch.float32), angles(64), norms(64, torch.float16)
    small, other = (empty_cache(kind, wide.k.shape) for _ in range(2))
    rope.rope_store_sums(parts, None, 5, small, batch, table, dtype=torch.float16, **given)
    total = (parts[0] + parts[1] + parts[2]).half()
    rope.rope_store(total, 5, other, batch, table, **given)
    slots = batch.slots[batch.slots >= 0]
    for mine, theirs in zip(stored(small, slots), stored(other, slots), strict=True):
        same = [(dequantize(*mine) - dequantize(*theirs)).abs() <= 2e-3, mine[1] == theirs[1]]
        assert all(bool(s.all()) for s in (same if INTERPRETED else same[:1]))
