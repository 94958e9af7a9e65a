"""The CPU's element-wise operators against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.cpu import torch_ops, weights
from kernels.kv_cache import KVCache, dequantize
from kernels.layout import SCALED_CACHES
from kernels.ops import Norm, get_ops
from quant.errors import InputError
from tests.kernels.paged import make_step
from tests.kernels.weights import random_weight

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(params=list(TOLERANCE), ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    limit = TOLERANCE[expected.dtype]
    return found.dtype == expected.dtype and torch.allclose(found.float(), expected.float(), atol=limit, rtol=limit)


@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (5, 33), (3, 4, 16)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(*shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    assert close(torch_ops.rms_norm(x, weight, eps=1e-5), reference.rms_norm(x, weight, eps=1e-5))
    expected = reference.rms_norm(x, weight, eps=1e-5, offset=1.0, residual=x)
    assert close(torch_ops.rms_norm(x, weight, eps=1e-5, offset=1.0, residual=x.clone()), expected)


def test_norm_of_values_whose_squares_overflow_float16() -> None:
    x = torch.full((1, 64), 3000.0, dtype=torch.float16)
    assert torch_ops.rms_norm(x, torch.ones(64, dtype=torch.float16), eps=1e-5).tolist() == [[1.0] * 64]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotary", [16, 12, 2])
def test_rope_store(rotary: int, normed: bool, dtype: torch.dtype) -> None:
    sequences = [(5, 4), (0, 2), (16, 1), (7, 0)]
    batch, first = make_step(sequences, dtype=dtype)
    _, second = make_step(sequences, dtype=dtype)
    qkv, table = torch.randn(7, (4 + 2 + 2) * 16).to(dtype), torch.randn(30, rotary)
    norms = {f"{n}_norm": Norm(torch.randn(16).to(dtype), 1e-5) for n in "qk"} if normed else {}
    expected = reference.rope_store(qkv.clone(), 4, second, batch, table, **norms)
    found = torch_ops.rope_store(qkv, 4, first, batch, table, **norms)
    assert found.shape == (7, 4, 16) and close(found, expected)
    for ours, theirs in ((first.k, second.k), (first.v, second.v)):
        assert close(ours.nan_to_num(9.0), theirs.nan_to_num(9.0)) and torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("kind", list(SCALED_CACHES))
@pytest.mark.parametrize("given", [None, (0.013, 0.4)])
def test_rope_store_quantizes(kind: str, given: tuple[float, float] | None) -> None:
    """As the reference, but for a code that another rounding of the rotation moves."""
    batch, plain = make_step([(5, 4), (0, 2), (16, 1)])
    shape, device = plain.k.shape, torch.device("cpu")
    ours, theirs = (KVCache.zeros(*shape, dtype=kind, device=device, given=given) for _ in range(2))
    qkv, table = torch.randn(7, 8 * 16), torch.randn(30, 16)
    expected = reference.rope_store(qkv.clone(), 4, theirs, batch, table)
    assert close(torch_ops.rope_store(qkv, 4, ours, batch, table), expected)
    nobody = plain.k.flatten(0, 1).isnan().any(-1).any(-1)
    nobody[batch.slots] = False
    for cache in (ours, theirs):
        for codes, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
            assert scales is not None and not bool(scales.flatten(0, 1)[nobody].any()), "slots of nobody are left alone"
            assert not bool(codes.view(torch.uint8).flatten(0, 1)[nobody].any())
    for pair in (((ours.k, ours.k_scale), (theirs.k, theirs.k_scale)), ((ours.v, ours.v_scale), (theirs.v, theirs.v_scale))):
        found, wanted = (
            dequantize(codes.flatten(0, 1)[batch.slots], scales.flatten(0, 1)[batch.slots]) for codes, scales in pair
        )  # type: ignore[union-attr]
        moved = (found - wanted).abs() > 1e-5
        assert float(moved.float().mean()) < 0.01 and bool(wanted.any())


def test_queries_alone_store_nothing(dtype: torch.dtype) -> None:
    batch, cache = make_step([(5, 4), (0, 2), (16, 1)], dtype=dtype)
    before, qkv, table = KVCache(cache.k.clone(), cache.v.clone()), torch.randn(7, 8 * 16).to(dtype), torch.randn(30, 12)
    norm = Norm(torch.randn(16).to(dtype), 1e-5)
    found = torch_ops.rope_store(qkv[:, : 4 * 16], 4, cache, batch, table, q_norm=norm)
    assert torch.equal(cache.k.nan_to_num(9.0), before.k.nan_to_num(9.0))
    assert torch.equal(found, torch_ops.rope_store(qkv, 4, cache, batch, table, q_norm=norm))


def test_rope_store_of_nothing(dtype: torch.dtype) -> None:
    batch, cache = make_step([], dtype=dtype)
    assert torch_ops.rope_store(torch.empty(0, 128, dtype=dtype), 4, cache, batch, torch.randn(9, 16)).shape == (0, 4, 16)


def test_silu_mul(dtype: torch.dtype) -> None:
    x = torch.randn(5, 66).to(dtype)
    kept = x.clone()
    assert close(weights.silu_mul(x), reference.silu_mul(x))
    assert torch.equal(x, kept)


def test_embedding(dtype: torch.dtype) -> None:
    table, ids = torch.randn(9, 4).to(dtype), torch.tensor([8, 0, 8])
    assert torch.equal(torch_ops.embedding(ids, table, dtype), reference.embedding(ids, table, dtype))


@pytest.mark.parametrize("module", [torch_ops, reference])
def test_rows_of_a_weight_of_others_are_refused(module: object) -> None:
    packed = weights.pack(random_weight(9, 32), dtype=torch.float32)
    with pytest.raises(TypeError, match="NibbleWeight"):
        module.embedding(torch.tensor([1]), packed, torch.float32)  # type: ignore[attr-defined]


def test_get_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")
    assert get_ops("cpu").name == "cpu"
    assert get_ops("cpu", reference=True).name == "reference"
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "z80")
    assert get_ops("cpu", reference=True).name == "reference"
    with pytest.raises(InputError, match="APPLIANCE_CPU_ISA is 'z80'"):
        get_ops("cpu")
