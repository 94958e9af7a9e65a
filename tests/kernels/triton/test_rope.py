"""q, k and v taken apart, rotated and stored in Triton, against the reference; and compiled for every architecture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.ops import KVCache, Norm, PagedBatch
from tests.kernels.paged import make_step
from tests.kernels.triton.aot import TARGETS, Compilation, compile_all
from tests.kernels.triton.conftest import DEVICE, INTERPRETED
from tests.kernels.triton.tensors import DTYPES, EXACT, close, draw, poison  # noqa: F401

import triton  # isort: skip  (after the conftest has chosen the interpreter)
import triton.language as tl  # isort: skip
from kernels.triton import rope  # isort: skip
from kernels.triton.narrow import to_fp8  # isort: skip

SHAPES = ((64, 64), (16, 16), (48, 48), (80, 80), (96, 32), (20, 20), (128, 2), (256, 256), (18, 4))  # head size, rotary
FLOAT8 = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def step(sequences: list[tuple[int, int]], **options: Any) -> tuple[PagedBatch, KVCache]:
    batch, cache = make_step(sequences, **options)
    moved = {name: getattr(batch, name).to(DEVICE) for name in ("positions", "slots", "query_starts", "seq_lens", "block_tables")}
    return replace(batch, **moved), KVCache(cache.k.to(DEVICE), cache.v.to(DEVICE))


def clone(cache: KVCache) -> KVCache:
    return KVCache(cache.k.clone(), cache.v.clone())


def angles(rotary: int, positions: int = 64) -> Tensor:
    turn = torch.rand(positions, rotary // 2) * 6.3
    return torch.cat([turn.cos(), turn.sin()], dim=1).to(DEVICE)


def norms(size: int, dtype: torch.dtype, names: str = "qk", offset: float = 0.0) -> dict[str, Norm]:
    return {f"{n}_norm": Norm(draw(size, dtype=dtype), 1e-5 if n == "q" else 1e-3, offset) for n in names}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "rotary"), SHAPES)
@pytest.mark.parametrize("normed", ["", "qk"])
def test_rope_store(size: int, rotary: int, normed: str, dtype: torch.dtype) -> None:
    heads, kv_heads = 6, 2
    batch, cache = step([(5, 2), (0, 3), (17, 1), (7, 0)], kv_heads=kv_heads, head_dim=size, dtype=dtype)
    width, expected_cache, table = (heads + 2 * kv_heads) * size, clone(cache), angles(rotary)
    wide = draw(6, width + 8, dtype=dtype)
    before, qkv, given = wide.clone(), wide[:, 3 : 3 + width], norms(size, dtype, normed)
    expected = reference.rope_store(qkv.clone(), heads, expected_cache, batch, table, **given)
    found = rope.rope_store(qkv, heads, cache, batch, table, **given)
    close(found, expected, dtype)
    assert found.data_ptr() == qkv.data_ptr()
    for ours, theirs in ((cache.k, expected_cache.k), (cache.v, expected_cache.v)):
        close(ours, theirs, dtype)
    written = slice(3, 3 + heads * size)
    before[:, written] = wide[:, written]
    assert torch.equal(wide, before)  # nothing beside q


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("size", "rotary"), [(256, 256), (512, 512), (512, 128), (18, 4)])
def test_norms_with_an_offset(size: int, rotary: int, dtype: torch.dtype) -> None:
    """Of queries and keys, or of queries alone."""
    batch, cache = step([(5, 1), (0, 1)], kv_heads=2, head_dim=size, dtype=dtype)
    table, q = angles(rotary), draw(size, dtype=dtype)
    for given in (norms(size, dtype, offset=1.0), {"q_norm": Norm(q, 1e-6, 1.0), "k_norm": Norm(q, 1e-6)}):
        other, qkv = clone(cache), draw(2, 8 * size, dtype=dtype)
        expected = reference.rope_store(qkv.clone(), 4, other, batch, table, **given)
        close(rope.rope_store(qkv, 4, cache, batch, table, **given), expected, dtype)
        close(cache.k, other.k, dtype)
        close(cache.v, other.v, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("size", "rotary"), [(48, 48), (80, 20), (18, 4)])
@pytest.mark.parametrize("biased", [False, True])
def test_partial_sums(size: int, rotary: int, biased: bool, dtype: torch.dtype) -> None:
    """What a product that adds them up itself would have handed over; in the interpreter, to the last bit."""
    heads, kv_heads = 5, 2
    batch, cache = step([(5, 2), (0, 3), (17, 1), (7, 0)], kv_heads=kv_heads, head_dim=size, dtype=dtype)
    width, other, table = (heads + 2 * kv_heads) * size, clone(cache), angles(rotary)
    bias = draw(width, dtype=torch.float32) if biased else None
    for splits in (1, 3):
        parts, given = draw(splits, 6, width, dtype=torch.float32), norms(size, dtype, "qk" if biased else "")
        total = parts[0].clone()
        for part in (*parts[1:], *([] if bias is None else [bias])):
            total += part
        found = rope.rope_store_sums(parts, bias, heads, cache, batch, table, dtype=dtype, **given)
        expected = rope.rope_store(total.to(dtype), heads, other, batch, table, **given)
        close(found, expected, dtype)
        close(cache.k, other.k, dtype)
        close(cache.v, other.v, dtype)
        if dtype in EXACT and INTERPRETED:  # compilers join a multiplication and an addition here and not there
            pairs = ((found, expected), (cache.k, other.k), (cache.v, other.v))
            assert all(torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7)) for ours, theirs in pairs)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (7, 1), (33, 3), (24, 24), (64, 8)])
@pytest.mark.parametrize("normed", ["q", "k"])
def test_heads(heads: int, kv_heads: int, normed: str) -> None:
    batch, cache = step([(30, 2), (0, 1)], block_size=32, kv_heads=kv_heads, head_dim=32)
    expected_cache, table = clone(cache), angles(32)
    qkv = draw(3, (heads + 2 * kv_heads) * 32, dtype=torch.float32)
    given = norms(32, torch.float32, normed)
    expected = reference.rope_store(qkv.clone(), heads, expected_cache, batch, table, **given)
    close(rope.rope_store(qkv, heads, cache, batch, table, **given), expected, torch.float32)
    close(cache.k, expected_cache.k, torch.float32)
    close(cache.v, expected_cache.v, torch.float32)


def test_nothing() -> None:
    batch, cache = step([])
    assert rope.rope_store(draw(0, 128, dtype=torch.float16), 4, cache, batch, angles(16)).shape == (0, 4, 16)


def test_queries_alone_store_nothing() -> None:
    batch, cache = step([(5, 3)], dtype=torch.float16)
    before, table, qkv = clone(cache), angles(16), draw(3, 8 * 16, dtype=torch.float16)
    given = {"q_norm": Norm(draw(16, dtype=torch.float16), 1e-5)}
    expected = reference.rope_store(qkv[:, : 4 * 16].clone(), 4, cache, batch, table, **given)
    found = rope.rope_store(qkv[:, : 4 * 16].clone(), 4, cache, batch, table, **given)
    close(found, expected, torch.float16)
    assert torch.equal(cache.k.nan_to_num(9.0), before.k.nan_to_num(9.0))
    assert torch.equal(cache.v.nan_to_num(9.0), before.v.nan_to_num(9.0))


def test_padding_is_not_stored() -> None:
    batch, cache = step([(5, 3)], dtype=torch.float16)
    padded = replace(batch, slots=torch.tensor([-1, int(batch.slots[1]), -1], device=DEVICE))
    before, table, qkv = clone(cache), angles(16), draw(3, 8 * 16, dtype=torch.float16)
    expected = reference.rope_store(qkv.clone(), 4, clone(cache), batch, table)
    close(rope.rope_store(qkv, 4, cache, padded, table), expected, torch.float16)
    for ours, old in ((cache.k, before.k), (cache.v, before.v)):
        same = (ours == old).all(-1).all(-1) | (ours.isnan() & old.isnan()).all(-1).all(-1)
        changed = (~same).flatten().nonzero().flatten()
        assert changed.tolist() == [int(padded.slots[1])]


def test_caches_that_are_views() -> None:
    """Keys and values of a block side by side, and blocks far apart."""
    batch, plain = step([(3, 4)], kv_heads=2, head_dim=16)
    blocks = plain.k.shape[0]
    both = torch.zeros(blocks, 2, 2, 16, 16, device=DEVICE)  # [B, k or v, Hkv, block size, D]
    cache = KVCache(both[:, 0].transpose(1, 2), both[:, 1].transpose(1, 2))
    qkv, table = draw(4, 6 * 16, dtype=torch.float32), angles(16)
    rope.rope_store(qkv.clone(), 2, plain, batch, table)
    rope.rope_store(qkv, 2, cache, batch, table)
    for ours, theirs in ((cache.k, plain.k), (cache.v, plain.v)):
        places = [(s // 16, s % 16) for s in batch.slots.tolist()]
        assert all(torch.equal(ours[place], theirs[place]) for place in places)
        assert int((ours != 0).any(-1).any(-1).sum()) == len(places)


@triton.jit
def _narrow(x, out, MANTISSA: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, to_fp8(tl.load(x + place).to(tl.float32), MANTISSA))


@pytest.mark.parametrize("kind", list(FLOAT8), ids=str)
@pytest.mark.filterwarnings("ignore:overflow")
def test_every_float16_and_bfloat16_in_fp8(kind: torch.dtype) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    least = torch.finfo(torch.float32).smallest_normal
    near = (torch.rand(1 << 16) - 0.5) * 2 ** torch.randint(-24, 18, (1 << 16,)).float()
    for x in (bits.view(torch.float16).float(), bits.view(torch.bfloat16).float(), near, torch.full((4096,), least / 3)):
        out = torch.empty(x.shape, dtype=torch.uint8, device=DEVICE)
        _narrow[(x.numel() // 4096,)](x.to(DEVICE), out, MANTISSA=3 if kind == torch.float8_e4m3fn else 2, BLOCK=4096)
        expected = x.clamp(-FLOAT8[kind], FLOAT8[kind]).to(kind).float()
        found = out.cpu().view(kind).float()
        assert torch.equal(found.isnan(), x.isnan())
        assert torch.equal(found.nan_to_num(0), expected.nan_to_num(0))
        assert torch.equal(found.signbit() | x.isnan(), expected.signbit() | x.isnan())


def test_what_does_not_fit() -> None:
    batch, cache = step([(0, 1)])
    qkv, table = draw(1, 8 * 16, dtype=torch.float16), angles(16)
    for heads, wrong in ((3, table), (4, angles(18)), (4, table[:, :15])):
        with pytest.raises(ValueError, match="heads of 16"):
            rope.rope_store(qkv, heads, cache, batch, wrong)
    for parts, bias in ((qkv[None], None), (qkv[None].float(), qkv[0, 1:].float())):
        with pytest.raises(ValueError, match="with a bias"):
            rope.rope_store_sums(parts, bias, 4, cache, batch, table, dtype=torch.float16)
    with pytest.raises(ValueError, match="one type and layout"):
        rope.rope_store(qkv, 4, KVCache(cache.k, cache.v.half()), batch, table)
    with pytest.raises(ValueError, match="scales"):
        rope.rope_store(qkv, 4, KVCache(cache.k.to(torch.int8), cache.v.to(torch.int8)), batch, table)
    with pytest.raises(ValueError, match="halves of 7"):
        small = KVCache.zeros(*cache.k.shape, dtype="int4", device=cache.k.device)
        rope.rope_store(qkv, 4, small, batch, angles(14))


def compilation(
    dtype: str, cache: str, *, size: int, rotary: int, normed: bool, splits: int = 1, bias: bool = False, offset: float = 0.0
) -> Compilation:
    shape = rope.tile(32, rotary // 2, size - rotary, rope.TILE if splits == 1 else rope.PARTED_TILE)
    warps = shape.pop("num_warps")
    code = cache if cache in ("e4m3", "e5m2", "int8", "int4") else ""
    element = "*u8" if code else f"*{cache}"
    types = {
        "qkv": "*fp32" if splits > 1 else f"*{dtype}",
        "q_out": f"*{dtype}",
        "k_ptr": element,
        "v_ptr": element,
        "positions": "*i64",
        "slots": "*i64",
    }
    types |= {"cos_sin": "*fp32", "q_eps": "fp32", "k_eps": "fp32"}
    types |= {f"{n}_stride": "i32" for n in ("qkv", "split", "q", "block", "token", "head", "scale_block", "scale_token")}
    constants: dict[str, Any] = {"HEADS": 32, "KV_HEADS": 8, "BLOCK_SIZE": 16, "HALF": rotary // 2, "REST": size - rotary}
    constants |= {"CODE": code, "SPLITS": splits, "Q_OFFSET": offset, "K_OFFSET": offset, **shape}
    optional = {"q_weight": f"*{dtype}" if normed else None, "k_weight": f"*{dtype}" if normed else None}
    optional |= {"bias": "*fp32" if bias else None}
    optional |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "*i32" if code == "int4" else "*fp32" if code else None)
    optional |= dict.fromkeys(("k_given", "v_given"), "fp32" if code == "e5m2" else None)
    types |= {name: kind for name, kind in optional.items() if kind is not None}
    constants |= {name: None for name, kind in optional.items() if kind is None}
    targets = TARGETS if dtype == "fp16" else (80, 90)
    return Compilation("kernels.triton.rope:_rope_store", types, constants, num_warps=warps, targets=targets)


@pytest.mark.compiles
def test_compilations() -> None:
    wanted = [compilation("fp16", "fp16", size=128, rotary=128, normed=True)]
    wanted.append(compilation("fp16", "fp16", size=128, rotary=128, normed=True, splits=8, bias=True))
    few = [compilation("fp16", cache, size=128, rotary=128, normed=cache != "fp16") for cache in ("fp16", "e4m3", "int8", "int4")]
    few.append(compilation("fp16", "fp16", size=128, rotary=128, normed=False, splits=8))
    wanted += [replace(one, targets=(75, 89, 90)) for one in few]
    wanted.append(compilation("bf16", "bf16", size=96, rotary=32, normed=True))
    wanted.append(compilation("bf16", "e5m2", size=80, rotary=80, normed=False))
    wanted.append(compilation("bf16", "e4m3", size=96, rotary=32, normed=True, splits=4))
    wanted.append(compilation("bf16", "int4", size=96, rotary=32, normed=True, splits=4))
    wanted.append(compilation("bf16", "e4m3", size=256, rotary=256, normed=True, splits=4, offset=1.0))
    wanted.append(compilation("bf16", "e4m3", size=512, rotary=512, normed=True, splits=4))
    for report in compile_all(wanted, loops=False):
        assert report.fits and report.stack == 0, report
