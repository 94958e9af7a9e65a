"""Paged attention on views against the reference, over every kind of block table, with poison in every slot nobody wrote."""

from __future__ import annotations

import random

import pytest
import torch

from kernels import reference
from kernels.cpu import paged_attention
from kernels.cpu.paged_attention import VIEW_BLOCKS, PagedAttention, segments
from kernels.kv_cache import dequantize
from kernels.layout import GATHER, SCALED_CACHES, TOGETHER, WIDEN
from tests.kernels.paged import make_step, quantized

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def check(
    q_heads: int,
    *,
    window: int | None,
    sequences: list[tuple[int, int]],
    dtype: torch.dtype,
    kind: str | None = None,
    cap: float | None = None,
    sinks: bool = False,
    **step: object,
) -> None:
    """kind: of a quantized cache, which is to give what the values that it stands for give."""
    batch, cache = make_step(sequences, dtype=dtype, **step)  # type: ignore[arg-type]
    if kind is not None:
        cache, held = quantized(cache, kind)
    size = cache.head_dim
    q = torch.randn(batch.query_starts_list[-1], q_heads, size, generator=torch.Generator().manual_seed(3)).to(dtype)
    last = torch.randn(q_heads, generator=torch.Generator().manual_seed(4)).mul(3).to(dtype) if sinks else None
    options = {"scale": size**-0.5, "window": window, "cap": cap, "sinks": last}
    found = PagedAttention()(q, cache, batch, **options)  # type: ignore[arg-type]
    expected = reference.attention(q, cache if kind is None else held, batch, **options)  # type: ignore[arg-type]
    assert found.shape == q.shape and found.dtype == dtype
    assert (found.float() - expected.float()).abs().max() < TOLERANCE[dtype]  # also false for NaN


@pytest.mark.parametrize("case", range(40))
def test_random_steps(case: int) -> None:
    rng = random.Random(case)
    kv_heads = rng.choice([1, 2, 4])
    check(
        kv_heads * rng.choice([1, 2, 3, 7]),
        window=rng.choice([None, None, 1, 5, 17, 128, 300]),
        sequences=[
            (rng.choice([0, 1, 15, 16, 17, 100, 400]), rng.choice([1, 1, 2, 16, 17, 40, 300])) for _ in range(rng.randint(1, 4))
        ],
        dtype=rng.choice(list(TOLERANCE)),
        block_size=rng.choice([8, 16, 32]),
        kv_heads=kv_heads,
        head_dim=rng.choice([16, 48, 64, 80, 96, 128, 256]),
        order=rng.choice(["consecutive", "shuffled", "half"]),
        seed=case,
        cap=[None, 0.5, 50.0][case % 3],
    )


@pytest.mark.parametrize("kind", list(SCALED_CACHES))
@pytest.mark.parametrize("case", range(12))
def test_quantized_caches(kind: str, case: int) -> None:
    rng = random.Random(f"{kind} {case}")
    kv_heads = rng.choice([1, 2, 4])
    check(
        kv_heads * rng.choice([1, 2, 3, 7]),
        window=rng.choice([None, None, 1, 17, 300]),
        sequences=[
            (rng.choice([0, 1, 16, 100, WIDEN - 1, WIDEN, 1200]), rng.choice([1, 1, 17, 300])) for _ in range(rng.randint(1, 3))
        ],
        dtype=rng.choice(list(TOLERANCE)),
        kind=kind,
        block_size=rng.choice([8, 16, 32]),
        kv_heads=kv_heads,
        head_dim=rng.choice([16, 48, 64, 80, 96, 128]),
        order=rng.choice(["consecutive", "shuffled", "half"]),
        seed=case,
        cap=[None, 0.5, 50.0][case % 3],
    )


@pytest.mark.parametrize("kind", list(SCALED_CACHES))
def test_quantized_keys_are_widened_a_stretch_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the whole cache, nor all that a sequence has."""
    widened = []

    def spy(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        widened.append(codes.shape[0])
        return dequantize(codes, scales)

    monkeypatch.setattr(paged_attention, "dequantize", spy)
    for order in ("consecutive", "shuffled"):
        check(4, window=None, sequences=[(5 * WIDEN, 1), (2000, 300)], dtype=torch.float32, kind=kind, order=order)
    assert max(widened) == WIDEN


def test_a_long_context_has_few_partial_results_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly three times as many pieces as may exist: the first are merged while the rest are to come."""
    counts, merge = [], paged_attention._merge

    def spy(pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        counts.append(len(pieces))
        return merge(pieces)

    monkeypatch.setattr(paged_attention, "_merge", spy)
    for dtype in (torch.float32, torch.bfloat16):
        check(4, window=None, sequences=[(20 * WIDEN, 1), (19 * WIDEN, 3)], dtype=dtype, kind="int8")
    assert max(counts) == TOGETHER and len(counts) == 2 * 2 * 3


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("before", [0, 15, 16, 17])
def test_block_borders(before: int, length: int) -> None:
    check(4, window=None, sequences=[(before, length), (length, 1)], dtype=torch.float32)


@pytest.mark.parametrize("size", [16, 48, 80, 96, 112, 192, 256, 512])
def test_head_sizes(size: int) -> None:
    check(6, window=None, sequences=[(40, 1), (0, 30), (20, 20)], dtype=torch.bfloat16, head_dim=size)


def test_tiles_of_a_long_chunk_over_scattered_blocks() -> None:
    for window in (None, 100, 700):
        check(2, window=window, sequences=[(500, 900)], dtype=torch.float32, kv_heads=1, order="half")


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kind", [None, "int8"])
def test_sinks(kind: str | None, dtype: torch.dtype) -> None:
    for window, order in ((None, "shuffled"), (128, "half"), (5, "consecutive")):
        sequences = [(700, 1), (0, 5), (3, 1), (100, 300)]
        check(6, window=window, sequences=sequences, dtype=dtype, kind=kind, order=order, head_dim=64, sinks=True)


def test_nothing() -> None:
    batch, cache = make_step([])
    assert PagedAttention()(torch.empty(0, 4, 16), cache, batch, scale=1.0).shape == (0, 4, 16)


def test_steps_do_not_mix() -> None:
    """One instance serves step after step, and two windows within a step."""
    attention = PagedAttention()
    for seed in range(3):
        batch, cache = make_step([(20, 3), (9, 1)], seed=seed)
        q = torch.randn(4, 4, 16)
        for window in (None, 4, None):
            expected = reference.attention(q, cache, batch, scale=0.25, window=window)
            assert torch.allclose(attention(q, cache, batch, scale=0.25, window=window), expected, atol=3e-6)


def test_consecutive_blocks_are_one_view() -> None:
    (only,) = segments(range(40, 140), 1595, 16)
    assert (only.start, only.stop, only.slot, only.gather) == (0, 1595, 640, None)


def test_a_tail_elsewhere_is_a_view_too() -> None:
    assert [(s.start, s.stop, s.slot, s.gather) for s in segments([*range(20), 99], 330, 16)] == [
        (0, 320, 0, None),
        (320, 330, 1584, None),
    ]


def test_scattered_blocks_are_gathered_a_bounded_stretch_at_a_time() -> None:
    table = random.Random(0).sample(range(10_000), 300)
    found = segments(table, 300 * 16 - 3, 16)
    assert all(s.gather is not None and len(s.gather) <= GATHER for s in found)
    assert [i for s in found if s.gather is not None for i in s.gather.tolist()] == table
    assert len(found) == -(-300 // GATHER)


@pytest.mark.parametrize("seed", range(20))
def test_segments_cover_every_position_once(seed: int) -> None:
    rng = random.Random(seed)
    table: list[int] = []
    while len(table) < 150:
        first = rng.randrange(10_000)
        table += range(first, first + rng.choice([1, 2, VIEW_BLOCKS - 1, VIEW_BLOCKS, 30]))
    length = len(table) * 16 - rng.randrange(16)
    at = 0
    for segment in segments(table, length, 16):
        assert segment.start == at and segment.stop > at
        blocks = table[at // 16 : -(-segment.stop // 16)]
        if segment.gather is None:
            assert blocks == list(range(segment.slot // 16, segment.slot // 16 + len(blocks)))
        else:
            assert blocks == segment.gather.tolist()
        at = segment.stop
    assert at == length
