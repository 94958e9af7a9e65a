"""Paged attention in Triton against the reference, with poison in every output and in every slot that nobody wrote."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.layout import SCALED_CACHES
from kernels.ops import KVCache, PagedBatch
from tests.kernels.paged import make_step
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.tensors import DTYPES, held, poison  # noqa: F401

import triton  # isort: skip  (after the conftest has chosen the interpreter)
import triton.language as tl  # isort: skip
from kernels.triton.attention import attention  # isort: skip
from kernels.triton.attention_decode import MAX_SPLITS, decode, split_count  # isort: skip
from kernels.triton.kv import capability, capped  # isort: skip

# Shares are rounded to the activations' dtype, which the interpreter does to bfloat16 by cutting off.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2 if DEVICE == "cuda" else 4e-2}


def to_device(batch: PagedBatch) -> PagedBatch:
    names = ("positions", "slots", "query_starts", "seq_lens", "block_tables")
    return replace(batch, **{name: getattr(batch, name).to(DEVICE) for name in names})


def compare(
    found: Tensor,
    q: Tensor,
    values: KVCache,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> None:
    expected = reference.attention(q.float(), values, batch, scale=scale, window=window, cap=cap)
    assert found.shape == q.shape and found.dtype == q.dtype
    torch.testing.assert_close(found.float(), expected, rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype])


def check(
    sequences: list[tuple[int, int]],
    *,
    heads: int = 4,
    dtype: torch.dtype = torch.float16,
    kind: str | None = None,
    window: int | None = None,
    cap: float | None = None,
    spread: float = 1.0,
    multiprocessors: int = 128,
    **step: object,
) -> None:
    """``spread`` > 1 makes the softmax sharp, so that its maximum moves from tile to tile."""
    batch, cache = make_step(sequences, **step)  # type: ignore[arg-type]
    batch = to_device(batch)
    small, values = held(cache, kind or str(dtype).removeprefix("torch."))
    size = cache.k.shape[3]
    q = (torch.randn(len(batch.positions), heads, size) * spread).to(dtype).to(DEVICE)
    scale = size**-0.5
    found = attention(q, small, batch, scale=scale, window=window, cap=cap, multiprocessors=multiprocessors)
    compare(found, q, values, batch, scale=scale, window=window, cap=cap)


@pytest.mark.parametrize("case", range(24))
def test_random_steps(case: int) -> None:
    rng = random.Random(case)
    kv_heads = rng.choice([1, 2, 3])
    prefill = case % 3
    now = [1, 1, 2, 16, 17, 40, 100] if prefill else [1]
    check(
        [(rng.choice([0, 1, 15, 16, 17, 100, 300]), rng.choice(now)) for _ in range(rng.randint(1, 4))],
        heads=kv_heads * rng.choice([1, 2, 3, 4, 7, 8, 16]),
        dtype=rng.choice(DTYPES),
        kind=rng.choice([None, *SCALED_CACHES, *SCALED_CACHES, "float32", "float16", "bfloat16"]),
        window=rng.choice([None, None, 1, 5, 17, 64, 128, 300]),
        spread=rng.choice([1.0, 8.0]),
        multiprocessors=rng.choice([1, 128]),
        block_size=rng.choice([16, 32, 64, 128]),
        kv_heads=kv_heads,
        head_dim=rng.choice([16, 48, 64, 80, 96]),
        order=rng.choice(["consecutive", "shuffled"]),
        seed=case,
    )


@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("window", [None, 1, 33])
def test_borders_of_blocks_and_tiles(block_size: int, window: int | None) -> None:
    borders = [n + d for n in (block_size, 2 * block_size) for d in (-1, 0, 1)]
    check([(n - 1, 1) for n in (1, *borders)], window=window, block_size=block_size)
    check([(0, 1), *((n - 5, 5) for n in borders)], window=window, block_size=block_size)
    check([(0, n) for n in borders[:3]], window=window, block_size=block_size)


@pytest.mark.parametrize("kind", [None, *SCALED_CACHES])
@pytest.mark.parametrize("size", [16, 48, 64, 80, 96, 128, 256])
def test_head_sizes(size: int, kind: str | None) -> None:
    for sequences in ([(40, 1), (0, 1), (200, 1)], [(40, 1), (0, 30), (20, 20)]):
        check(sequences, heads=6, head_dim=size, kind=kind)


@pytest.mark.parametrize(
    ("size", "kind", "dtype"),
    [
        *((512, kind, torch.bfloat16) for kind in (None, *SCALED_CACHES)),
        *((size, kind, torch.float32) for size in (320, 512) for kind in (None, "int4")),
    ],
)
def test_heads_of_more_than_256(size: int, kind: str | None, dtype: torch.dtype) -> None:
    """In float32 values are loaded later than keys."""
    for sequences, window in (([(40, 1), (0, 1), (300, 1)], None), ([(0, 30), (40, 2)], 20), ([(40, 2)], None)):
        check(sequences, heads=8, kv_heads=1, head_dim=size, kind=kind, dtype=dtype, window=window)


@pytest.mark.parametrize("heads", [12, 26])
def test_more_heads_than_a_program_takes(heads: int) -> None:
    """Programs share a key/value head where its queries are too many for one: 6 and 1 to a program here."""
    check([(40, 1), (0, 1), (20, 3)], heads=heads, kv_heads=heads // 12, head_dim=320, dtype=torch.float32)


@pytest.mark.parametrize(
    ("size", "heads", "kind", "dtype"),
    [
        (576, 35, None, torch.bfloat16),
        (576, 16, "fp8_e4m3", torch.float16),
        (576, 3, "int4", torch.float16),
        (530, 9, None, torch.float32),
        (40, 5, None, torch.float16),
        (40, 5, "int8", torch.bfloat16),
    ],
)
def test_values_that_are_keys(size: int, heads: int, kind: str | None, dtype: torch.dtype) -> None:
    """Attention over latents: what heads have beyond 512 numbers is a product of its own, and many queries share a key."""
    for sequences in ([(63, 1), (0, 1), (140, 1)], [(64, 1), (20, 9)]):
        batch, cache = make_step(sequences, kv_heads=1, head_dim=size, block_size=64)
        batch, (small, values) = to_device(batch), held(cache, kind or str(dtype).removeprefix("torch."))
        same, twice = replace(small, v=small.k, v_scale=small.k_scale), replace(values, v=values.k.clone())
        q = torch.randn(len(batch.positions), heads, size).to(dtype).to(DEVICE)
        compare(attention(q, same, batch, scale=size**-0.5), q, twice, batch, scale=size**-0.5)


@pytest.mark.parametrize("kind", [None, *SCALED_CACHES])
@pytest.mark.parametrize(("size", "window", "dtype"), [(256, None, torch.float16), (48, 20, torch.bfloat16)])
def test_capped_scores(size: int, window: int | None, dtype: torch.dtype, kind: str | None) -> None:
    """Where the cap bends them; what is not seen stays unseen behind it."""
    for sequences in ([(140, 1), (0, 1)], [(40, 1), (20, 20)]):
        check(sequences, heads=2, kv_heads=1, head_dim=size, kind=kind, dtype=dtype, window=window, cap=2.0, spread=4.0)


@pytest.mark.parametrize("group", [1, 3, 8, 16, 17, 70])
def test_groups(group: int) -> None:
    check([(40, 1), (70, 1)], heads=group, kv_heads=1)
    check([(40, 1), (0, 30), (20, 3)], heads=2 * group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*SCALED_CACHES, "float16", "bfloat16", "float32"])
def test_caches(kind: str, dtype: torch.dtype) -> None:
    for sequences in ([(70, 1), (0, 1), (300, 1)], [(70, 2), (0, 5), (130, 1)]):
        check(sequences, dtype=dtype, kind=kind, head_dim=48, block_size=32)


@pytest.mark.parametrize("splits", [1, 2, 3, 7, MAX_SPLITS])
@pytest.mark.parametrize("window", [None, 100, 300])
def test_any_number_of_splits(splits: int, window: int | None) -> None:
    """Shorter sequences leave splits empty; the tables are wider than any sequence needs, as those of a recorded graph."""
    batch, cache = make_step([(n - 1, 1) for n in (1, 127, 128, 129, 700, 1000)], head_dim=32, seed=4)
    tables = torch.zeros(6, 2000, dtype=torch.int32)
    tables[:, : batch.block_tables.shape[1]] = batch.block_tables
    batch = to_device(replace(batch, block_tables=tables, max_seq=32000))
    small, values = held(cache, "float16")
    q = torch.randn(6, 6, 32).half().to(DEVICE)
    found = torch.full_like(q, float("nan"))
    decode(q, small, batch, found, 6, scale=0.3, window=window, splits=splits, capability=capability(q.device))
    compare(found, q, values, batch, scale=0.3, window=window)


@pytest.mark.parametrize("heads", [2, 6, 32])
@pytest.mark.parametrize("window", [None, 40])
def test_single_rows_before_chunks(heads: int, window: int | None) -> None:
    """Whether all of them, some or none are said to be single, with the tiles of the chunks beginning anywhere."""
    batch, cache = make_step([(699, 1), (0, 1), (63, 1), (17, 1), (40, 1), (3, 30), (5, 1), (0, 70)], kv_heads=2)
    assert batch.singles == 5
    batch, (small, values) = to_device(batch), held(cache, "float16")
    q = torch.randn(106, heads, 16).half().to(DEVICE)
    for singles in range(6) if heads < 32 else (0, 2, 5):
        found = attention(q, small, replace(batch, singles=singles), scale=0.3, window=window)
        compare(found, q, values, batch, scale=0.3, window=window)


@pytest.mark.parametrize("now", [1, 20])
def test_results_repeat(now: int) -> None:
    batch, cache = make_step([(n, now) for n in (400, 100, 250)], head_dim=32)
    batch, (small, _) = to_device(batch), held(cache, "fp8_e4m3")
    q = torch.randn(3 * now, 4, 32).half().to(DEVICE)
    first, again = (attention(q, small, batch, scale=0.3) for _ in range(2))
    assert torch.equal(first, again)


def test_number_of_splits() -> None:
    for max_seq in (1, 128, 129, 1000, 100_000):
        for sequences in (1, 3, 40, 300):
            splits = split_count(max_seq, sequences, 8, 128)
            assert 1 <= splits <= MAX_SPLITS
            assert splits == 1 or (splits * sequences * 8 <= 2 * 128 and (splits - 1) * 128 < max_seq)
    assert split_count(100_000, 1, 8, 128) == 32
    assert split_count(100_000, 32, 8, 128) == 1


def test_sequences_without_rows() -> None:
    """Empty ones first, last and between others; what follows the last row of a sequence belongs to the next."""
    check([(20, 0), (5, 1), (7, 0), (0, 0), (300, 1), (9, 0)])
    check([(20, 0), (5, 9), (7, 0), (0, 0), (30, 1), (0, 70), (9, 0), (0, 0)])


def test_many_sequences_of_all_lengths() -> None:
    rng = random.Random(1)
    check([(rng.randrange(20), rng.choice([0, 1, 1, 2, 15, 16, 17, 33])) for _ in range(41)], heads=4, kv_heads=1)


@pytest.mark.parametrize("now", [0, 1])
def test_nothing(now: int) -> None:
    batch, cache = make_step([(3, 0)] * now)
    q = torch.empty(0, 4, 16, device=DEVICE)
    assert attention(q, held(cache, "float32")[0], to_device(batch), scale=1.0).shape == (0, 4, 16)


@pytest.mark.parametrize("sequences", [[(5, 1), (40, 1)], [(5, 3), (40, 1)]])
def test_queries_inside_a_wider_tensor(sequences: list[tuple[int, int]]) -> None:
    batch, cache = make_step(sequences)
    batch, (small, _) = to_device(batch), held(cache, "float16")
    rows = len(batch.positions)
    wide = torch.randn(rows, 4 * 2 * 16 + 9).half().to(DEVICE)
    for q in (wide[:, 7 : 7 + 64].unflatten(1, (4, 16)), wide[:, 1:129:2].unflatten(1, (4, 16))):
        assert torch.equal(attention(q, small, batch, scale=0.3), attention(q.contiguous(), small, batch, scale=0.3))


@pytest.mark.parametrize("kind", ["float16", *SCALED_CACHES])
def test_keys_and_values_in_one_tensor(kind: str) -> None:
    """Blocks of [k; v], heads before tokens: strides are free but for the features'."""
    for sequences in ([(5, 1), (40, 1)], [(5, 3), (40, 1)]):
        batch, cache = make_step(sequences)
        batch, (small, _) = to_device(batch), held(cache, kind)
        q = torch.randn(len(batch.positions), 4, 16).half().to(DEVICE)
        joined = torch.stack([small.k, small.v], 1).transpose(2, 3).contiguous().transpose(2, 3)
        view = KVCache(joined[:, 0], joined[:, 1], small.k_scale, small.v_scale)
        assert torch.equal(attention(q, view, batch, scale=0.3), attention(q, small, batch, scale=0.3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SCALED_CACHES)
@pytest.mark.parametrize("sequences", [[(300, 1)], [(50, 40)]])
def test_scales_of_every_size(sequences: list[tuple[int, int]], kind: str, dtype: torch.dtype) -> None:
    """Tokens of zeros, tiny and large ones side by side: shares times scales neither overflow nor vanish."""
    batch, cache = make_step(sequences, head_dim=32)
    for power in (-12, 0, 9):
        factors = torch.tensor([0.0, 2.0**-20, 2.0**-6, 1.0])[torch.randint(4, cache.v.shape[:2])]
        shifts = torch.tensor([0.0, -1.0, 1.0])[torch.randint(3, cache.v.shape[:2])] if kind == "int4" else torch.zeros(1, 1)
        values = (cache.v * factors[:, :, None, None] + shifts[:, :, None, None]) * 2.0**power
        small, wide = held(KVCache(cache.k, values), kind)
        q = torch.randn(len(batch.positions), 4, 32).to(dtype).to(DEVICE)
        found = attention(q, small, to_device(batch), scale=0.2)
        expected = reference.attention(q.float(), wide, to_device(batch), scale=0.2)
        error = (found.float() - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", SCALED_CACHES)
@pytest.mark.parametrize("now", [1, 20])
def test_nothing_but_zeros(kind: str, now: int) -> None:
    """Scales are 0 then; in one sequence all are, in the other one token is."""
    batch, cache = make_step([(20, now), (30, now)], head_dim=16)
    for t in (cache.k, cache.v):
        t[batch.block_tables[0].long()] *= 0.0
        t[int(batch.block_tables[1, 0]), 3] = 0.0
    small, wide = held(cache, kind)
    q = torch.randn(2 * now, 4, 16).half().to(DEVICE)
    compare(attention(q, small, to_device(batch), scale=0.3), q, wide, to_device(batch), scale=0.3)


@pytest.mark.parametrize("kind", SCALED_CACHES)
@pytest.mark.parametrize("part", ["k_scale", "v_scale"])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_is_not_hidden(part: str, kind: str) -> None:
    """Scales of NaN make the rows that see their token NaN, and leave other sequences alone."""
    batch, cache = make_step([(20, 1), (30, 1), (3, 20)], kv_heads=1)
    small, _ = held(cache, kind)
    scales = getattr(small, part)
    scales[int(batch.block_tables[1, 1]), 2] = scales[int(batch.block_tables[2, 0]), 9] = float("nan")
    found = attention(torch.randn(22, 2, 16).half().to(DEVICE), small, to_device(batch), scale=0.3)
    assert bool(found[0].isfinite().all()) and bool(found[[1, *range(8, 22)]].isnan().all())


def test_huge_scores() -> None:
    """The maximum is subtracted before the exponential, and rows that see nothing of a tile stay as they are."""
    check([(100, 1), (50, 1)], spread=3e4, dtype=torch.float32)
    check([(100, 70)], spread=3e4, dtype=torch.float32, window=3)


@triton.jit
def _capped(x, out, cap, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, capped(tl.load(x + place), cap))


@pytest.mark.filterwarnings("ignore:overflow")
def test_the_cap_itself() -> None:
    """A tanh of every size, as exact as a card's exponential is; of what is not finite, too."""
    sizes = torch.cat([torch.logspace(-30, 38, 2045), torch.tensor([0.0, torch.inf, torch.nan])])
    y = torch.cat([sizes, -sizes, torch.linspace(-40, 40, 4096)])
    out = torch.empty_like(y).to(DEVICE)
    _capped[(8,)]((y * 2.8853900817779268).to(DEVICE), out, 50.0, BLOCK=1024)
    torch.testing.assert_close(out.cpu().double(), 50 * y.double().tanh(), rtol=0, atol=50 * 6e-7, equal_nan=True)
    assert out.cpu()[y.abs() > 20].abs().eq(50.0).all()


@pytest.mark.parametrize("kind", ["float16", "fp8_e4m3", "int4"])
def test_offsets_beyond_32_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block 2 Gi words of 16 bits away. The memory between is asked for, but never touched."""
    monkeypatch.undo()  # poison would touch it
    batch, cache = make_step([(40, 1), (20, 1)], kv_heads=1, head_dim=32)
    batch, (small, _) = to_device(batch), held(cache, kind)
    same = KVCache(small.k, small.k, small.k_scale, small.k_scale)
    last = 2 * (2**31 + 2**20) // small.k[0].nbytes - len(small.k)
    try:
        far = [torch.empty((last + len(t), *t.shape[1:]), dtype=t.dtype, device=DEVICE) for t in same.tensors]
    except RuntimeError:
        pytest.skip("not enough memory")
    for there, here in zip(far, same.tensors, strict=True):
        there[last:] = here
    moved = KVCache(*(t for t in far for _ in range(2)))  # values that are the keys
    beyond = replace(batch, block_tables=batch.block_tables + last)
    q = torch.randn(2, 2, 32).half().to(DEVICE)
    for step, there in ((batch, beyond), (replace(batch, max_query=2), replace(beyond, max_query=2))):
        assert torch.equal(attention(q, moved, there, scale=0.3), attention(q, same, step, scale=0.3))


def test_what_is_refused() -> None:
    batch, cache = make_step([(3, 1)])
    small, _ = held(cache, "int8")
    q = torch.randn(1, 4, 16).half().to(DEVICE)
    batch = to_device(batch)
    with pytest.raises(ValueError, match="3 query heads over 2"):
        attention(q[:, :3], small, batch, scale=1.0)
    with pytest.raises(ValueError, match="scales"):
        attention(q, replace(small, v_scale=None), batch, scale=1.0)
    with pytest.raises(ValueError, match="one type"):
        attention(q, replace(small, v=small.v.half()), batch, scale=1.0)
    with pytest.raises(ValueError, match="power of two"):
        attention(q, KVCache(*(t[:, :12] for t in small.tensors)), batch, scale=1.0)
    small, _ = held(make_step([(3, 1)], head_dim=18)[1], "int4")
    with pytest.raises(ValueError, match="16-bit words"):
        attention(torch.randn(1, 4, 18).half().to(DEVICE), small, batch, scale=1.0)
