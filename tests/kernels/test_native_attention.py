"""Paged attention of the native extension against the reference, under every instruction set that runs here."""

from __future__ import annotations

import random

import pytest
import torch

from kernels import reference
from kernels.cpu import backend
from kernels.cpu.native_ops import NativeOps
from kernels.layout import SCALED_CACHES
from kernels.ops import KVCache
from tests.kernels.native import instruction_sets, native_ops
from tests.kernels.paged import make_step, quantized

if backend.native() is None:
    pytest.skip("the native extension is not built", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 1e-3}  # bfloat16: shares are rounded too


@pytest.fixture(params=instruction_sets())
def ops(request: pytest.FixtureRequest) -> NativeOps:
    return native_ops(request.param)


def check(
    ops: NativeOps,
    sequences: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    cap: float | None = None,
    spread: float = 1.0,
    kind: str | None = None,
    sinks: bool = False,
    **step: object,
) -> None:
    """``spread`` > 1 makes the softmax sharp, so that its maximum moves from chunk to chunk; ``kind``: of a quantized cache."""
    batch, cache = make_step(sequences, kv_heads=kv_heads, head_dim=size, dtype=dtype, **step)  # type: ignore[arg-type]
    q = (torch.randn(batch.positions.numel(), heads, size) * spread).to(dtype)
    options = {"scale": size**-0.5, "window": window, "cap": cap}
    if sinks:
        options["sinks"] = (torch.randn(heads) * 3 * spread).to(dtype)
    wide = KVCache(cache.k.float(), cache.v.float())
    if kind is not None:
        cache, wide = quantized(wide, kind)
    expected = reference.attention(q.float(), wide, batch, **options)  # type: ignore[arg-type]
    found = ops.attention(q, cache, batch, **options)  # type: ignore[arg-type]
    assert found.dtype == dtype and found.shape == expected.shape
    # Codes are summed up before they are scaled: elsewhere in float32 than the reference rounds.
    limit = TOLERANCE[dtype] * (3 if kind is not None and dtype == torch.float32 else 1)
    torch.testing.assert_close(found.float(), expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("case", range(24))
def test_random_steps(ops: NativeOps, case: int) -> None:
    rng = random.Random(case)
    kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 4, 7, 8])
    check(
        ops,
        [(rng.choice([0, 0, 1, 5, 63, 64, 200]), rng.choice([1, 1, 2, 9, 70])) for _ in range(rng.randint(1, 6))],
        heads=kv_heads * group,
        kv_heads=kv_heads,
        size=rng.choice([16, 48, 64, 80, 96, 128, 20, 7]),
        dtype=rng.choice(DTYPES),
        window=rng.choice([None, None, 1, 10, 64, 100]),
        block_size=rng.choice([1, 8, 16, 32, 128]),
        order=rng.choice(["shuffled", "consecutive", "half"]),
        spread=rng.choice([1.0, 8.0]),
        seed=case,
        cap=[None, 2.0, 50.0][case % 3],
    )


@pytest.mark.parametrize("before", [0, 1, 62, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("now", [1, 2, 64])
def test_borders_of_chunks(ops: NativeOps, before: int, now: int) -> None:
    check(ops, [(before, now)])
    check(ops, [(before, now)], dtype=torch.bfloat16, window=64)


@pytest.mark.parametrize("size", [1, 2, 8, 15, 16, 17, 31, 32, 33, 64, 65, 112, 128, 192, 256, 320, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes(ops: NativeOps, size: int, dtype: torch.dtype) -> None:
    check(ops, [(20, 3), (0, 1)], size=size, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 300])
def test_long_sequences_are_cut_and_merged(ops: NativeOps, window: int | None, dtype: torch.dtype) -> None:
    check(ops, [(3000, 1), (10, 1), (1500, 4)], dtype=dtype, window=window, spread=6.0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kind", [None, "int8", "int4", "fp8_e4m3"])
@pytest.mark.parametrize("window", [None, 128])
def test_sinks(ops: NativeOps, window: int | None, kind: str | None, dtype: torch.dtype) -> None:
    """Once a head and token, also where keys are cut and merged, and where a sink is most of the sum."""
    sequences = [(1300, 1), (10, 1), (0, 3), (150, 60)]
    for spread, cap in ((1.0, None), (4.0, 20.0)):
        check(ops, sequences, heads=8, size=64, dtype=dtype, window=window, kind=kind, spread=spread, cap=cap, sinks=True)


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_any_number_of_threads(threads: int) -> None:
    check(NativeOps(backend.available()[0], threads), [(2000, 1), (0, 130), (70, 1)], heads=6, kv_heads=1, size=64, sinks=True)


def test_more_heads_than_a_tile_holds(ops: NativeOps) -> None:
    check(ops, [(30, 3)], heads=71, kv_heads=1)


def test_long_chunk(ops: NativeOps) -> None:
    check(ops, [(100, 600)], heads=8, kv_heads=2, size=64, dtype=torch.bfloat16)


def test_nothing(ops: NativeOps) -> None:
    batch, cache = make_step([])
    assert ops.attention(torch.empty(0, 4, 16), cache, batch, scale=1.0).shape == (0, 4, 16)


def test_queries_inside_a_wider_tensor(ops: NativeOps) -> None:
    batch, cache = make_step([(5, 3)])
    wide = torch.randn(3, 100)
    q = wide.as_strided((3, 4, 16), (100, 16, 1), 7)
    assert torch.equal(ops.attention(q, cache, batch, scale=0.3), ops.attention(q.contiguous(), cache, batch, scale=0.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*SCALED_CACHES, "float16", "bfloat16", "float32"])
def test_other_caches(ops: NativeOps, kind: str, dtype: torch.dtype) -> None:
    """Against the reference over the values that the cache holds, whatever the activations are in."""
    for size in (48, 16, 64, 80, 96, 128, 20, 6, 320, 512) if kind in SCALED_CACHES else (48,):
        batch, cache = make_step([(70, 2), (0, 5), (300, 1)], head_dim=size, seed=size)
        q = torch.randn(8, 4, size).to(dtype)
        if kind in SCALED_CACHES:
            small, held = quantized(cache, kind)
        else:
            small = KVCache(cache.k.to(getattr(torch, kind)), cache.v.to(getattr(torch, kind)))
            held = KVCache(small.k.float(), small.v.float())
        expected = reference.attention(q.float(), held, batch, scale=0.2)
        found = ops.attention(q, small, batch, scale=0.2).float()
        torch.testing.assert_close(
            found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=lambda m, s=size: f"{s}: {m}"
        )


@pytest.mark.parametrize("kind", list(SCALED_CACHES))
@pytest.mark.parametrize("case", range(8))
def test_random_steps_over_codes(ops: NativeOps, kind: str, case: int) -> None:
    rng = random.Random(f"{kind} {case}")
    kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 4, 7, 8])
    check(
        ops,
        [(rng.choice([0, 0, 1, 5, 63, 64, 200, 3000]), rng.choice([1, 1, 2, 9, 70])) for _ in range(rng.randint(1, 5))],
        heads=kv_heads * group,
        kv_heads=kv_heads,
        size=rng.choice([16, 48, 64, 80, 96, 128, 20]),
        dtype=rng.choice(DTYPES),
        cap=[None, 2.0, 50.0][case % 3],
        window=rng.choice([None, None, 1, 10, 64, 100]),
        block_size=rng.choice([1, 8, 16, 32, 128]),
        order=rng.choice(["shuffled", "consecutive", "half"]),
        spread=rng.choice([1.0, 8.0]),
        kind=kind,
        seed=case,
    )


@pytest.mark.parametrize("kind", list(SCALED_CACHES))
def test_vectors_of_very_different_sizes(ops: NativeOps, kind: str) -> None:
    """Each token and head has its own scale, among them zero, and sizes that float16 and bfloat16 have trouble with."""
    batch, cache = make_step([(150, 1), (64, 3)], head_dim=32, seed=5)
    sizes = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 30.0])[torch.randint(0, 5, cache.k.shape[:3])].unsqueeze(-1)
    small, held = quantized(KVCache(cache.k * sizes, cache.v * sizes), kind)
    q = torch.randn(4, 4, 32)
    expected = reference.attention(q, held, batch, scale=0.05)
    torch.testing.assert_close(ops.attention(q, small, batch, scale=0.05), expected, rtol=1e-4, atol=1e-4)


def test_codes_without_scales(ops: NativeOps) -> None:
    batch, cache = make_step([(3, 1)])
    small, _ = quantized(cache, "int8")
    with pytest.raises(ValueError, match="int8 needs scales"):
        ops.attention(torch.randn(1, 4, 16), KVCache(small.k, small.v), batch, scale=1.0)


def test_huge_scores(ops: NativeOps) -> None:
    """The maximum is subtracted before the exponential."""
    check(ops, [(100, 2)], spread=1e4)
