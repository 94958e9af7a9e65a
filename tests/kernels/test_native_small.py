"""The native extension's operations between the products, under every instruction set that runs here."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.cpu import backend
from kernels.cpu.native_ops import NativeOps
from kernels.kv_cache import KVCache, dequantize
from kernels.layout import SCALED_CACHES
from kernels.ops import Norm
from tests.kernels.native import instruction_sets, native_ops
from tests.kernels.paged import make_step
from tests.kernels.weights import random_weight

if backend.native() is None:
    pytest.skip("the native extension is not built", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}  # a rounding more or less on the way


@pytest.fixture(params=instruction_sets())
def ops(request: pytest.FixtureRequest) -> NativeOps:
    return native_ops(request.param)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape and found.dtype == dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=EPS[dtype], atol=EPS[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(ops: NativeOps, dtype: torch.dtype) -> None:
    for rows, columns in ((1, 1), (3, 20), (5, 64), (40, 1000), (0, 16)):
        x, weight = (torch.randn(rows, columns) * 7).to(dtype), torch.randn(columns).to(dtype)
        close(ops.rms_norm(x, weight, eps=1e-5), reference.rms_norm(x.float(), weight.float(), eps=1e-5), dtype)
        residual = torch.randn(rows, columns).to(dtype)
        expected = reference.rms_norm(x.float(), weight.float(), eps=1e-5, offset=1.0, residual=residual.float())
        close(ops.rms_norm(x, weight, eps=1e-5, offset=1.0, residual=residual.clone()), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul(ops: NativeOps, dtype: torch.dtype) -> None:
    for rows, columns in ((1, 2), (7, 90), (33, 2048), (0, 8)):
        x = (torch.randn(rows, columns) * 20).to(dtype)
        close(ops.silu_mul(x), reference.silu_mul(x.float()), dtype)
        close(ops.gelu_mul(x), gelu_mul(x), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmoid_mul(ops: NativeOps, dtype: torch.dtype) -> None:
    for rows, columns in ((1, 1), (7, 45), (33, 1024), (0, 8)):
        x, wide = (torch.randn(rows, n) * 20 for n in (columns, columns + 7))
        x, gate = x.to(dtype), wide.to(dtype)[:, 3:-4]  # rows of a wider tensor
        expected = x.float() * torch.sigmoid(gate.float())
        close(ops.sigmoid_mul(x.clone(), gate), expected, dtype)


def gelu_mul(x: torch.Tensor) -> torch.Tensor:
    """From float64: torch's own float32 loses bits of 1 + tanh where that is near 0."""
    gate, up = x.double().chunk(2, dim=1)
    return (torch.nn.functional.gelu(gate, approximate="tanh") * up).float()


def test_gates_of_large_values(ops: NativeOps) -> None:
    gate = torch.tensor([0.0, 1e-20, 3.0, 30.0, 1e4, 3e38, -1e-20, -3.0, -30.0, -1e4, -3e38])
    both = torch.cat([gate, torch.ones(11)]).unsqueeze(0)
    for found, expected in ((ops.gelu_mul(both), gelu_mul(both)), (ops.silu_mul(both), reference.silu_mul(both))):
        torch.testing.assert_close(found, expected.nan_to_num(0), rtol=2e-6, atol=4.0)  # e^88 is the largest: -3e38 becomes -2
        torch.testing.assert_close(found[:, :10], expected[:, :10], rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "rotary"), [(64, 64), (16, 16), (80, 80), (96, 32), (20, 20), (128, 2), (512, 512), (320, 80)])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_store(ops: NativeOps, size: int, rotary: int, normed: bool, dtype: torch.dtype) -> None:
    heads, kv_heads = 6, 2
    batch, cache = make_step([(5, 3), (0, 40), (17, 1)], kv_heads=kv_heads, head_dim=size, dtype=dtype)
    tokens = batch.positions.numel()
    wide = torch.randn(tokens, (heads + 2 * kv_heads) * size + 8).to(dtype)
    qkv = wide[:, 3 : 3 + (heads + 2 * kv_heads) * size]  # rows of a wider tensor
    cos_sin = torch.cat([torch.randn(64, rotary // 2), torch.randn(64, rotary // 2)], dim=1)
    norms = {n: Norm(torch.rand(size).to(dtype), 1e-6, 0.5) for n in ("q_norm", "k_norm")} if normed else {}
    expected_cache = KVCache(cache.k.float(), cache.v.float())
    wide_norms = {n: norm._replace(weight=norm.weight.float()) for n, norm in norms.items()}
    expected = reference.rope_store(qkv.float(), heads, expected_cache, batch, cos_sin, **wide_norms)
    found = ops.rope_store(qkv, heads, cache, batch, cos_sin, **norms)
    close(found, expected, dtype)
    for ours, theirs in ((cache.k, expected_cache.k), (cache.v, expected_cache.v)):
        torch.testing.assert_close(ours.float(), theirs, rtol=EPS[dtype], atol=EPS[dtype], equal_nan=True)


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_queries_alone_store_nothing(ops: NativeOps, kind: str) -> None:
    batch, plain = make_step([(5, 3), (0, 40), (17, 1)], kv_heads=2, head_dim=96)
    cache = KVCache.zeros(*plain.k.shape, dtype=kind, device=torch.device("cpu"))
    qkv, cos_sin, norm = torch.randn(44, 10 * 96), torch.randn(64, 32), Norm(torch.rand(96), 1e-6, 0.5)
    found = ops.rope_store(qkv[:, : 6 * 96].clone(), 6, cache, batch, cos_sin, q_norm=norm)
    assert not any(bool(tensor.view(torch.uint8).any()) for tensor in cache.tensors)
    assert torch.equal(found, ops.rope_store(qkv, 6, cache, batch, cos_sin, q_norm=norm))


@pytest.mark.parametrize("kind", list(SCALED_CACHES))
@pytest.mark.parametrize("given", [None, (0.011, 0.25)])
@pytest.mark.parametrize("size", [16, 20, 48, 64, 80, 96, 128, 2, 512])
def test_what_is_stored_in_codes(ops: NativeOps, kind: str, given: tuple[float, float] | None, size: int) -> None:
    """Bit by bit what the reference stores, and nothing elsewhere. Angles of zero: nothing is rounded before."""
    tokens, kv_heads = 9, 3
    batch, plain = make_step([(3, 5), (0, 4)], block_size=4, kv_heads=kv_heads, head_dim=size)
    ours, theirs = (KVCache.zeros(*plain.k.shape, dtype=kind, device=torch.device("cpu"), given=given) for _ in range(2))
    for cache in (ours, theirs):
        for tensor in cache.tensors:
            tensor.view(torch.uint8).fill_(0xA5)
    k, v = (torch.randn(tokens, kv_heads, size) * torch.tensor([1e-3, 1.0, 300.0]).view(1, 3, 1) for _ in range(2))
    for row, value in enumerate((0.0, 1e-38, -1e-30, 65504.0, -3e38)):
        v[row, 1] = value
    k[0, 1, 1], v[1, 0] = 0.0, v[1, 0].abs() + 7
    qkv = torch.cat([torch.zeros(tokens, size), k.flatten(1), v.flatten(1)], dim=1)
    cos_sin = torch.cat([torch.ones(16, size // 2), torch.zeros(16, size // 2)], dim=1)
    reference.rope_store(qkv.clone(), 1, theirs, batch, cos_sin)
    ops.rope_store(qkv.clone(), 1, ours, batch, cos_sin)
    for found, wanted in zip(ours.tensors, theirs.tensors, strict=True):
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("kind", list(SCALED_CACHES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotated_keys_in_codes(ops: NativeOps, kind: str, dtype: torch.dtype) -> None:
    """As the reference, but for what the reference rounds to the activations' type before."""
    batch, plain = make_step([(5, 3), (0, 40), (17, 1)], kv_heads=2, head_dim=64)
    ours, theirs = (KVCache.zeros(*plain.k.shape, dtype=kind, device=torch.device("cpu")) for _ in range(2))
    qkv, cos_sin = torch.randn(44, 8 * 64).to(dtype), torch.randn(64, 32)
    norms = {n: Norm(torch.rand(64).to(dtype) + 0.5, 1e-6) for n in ("q_norm", "k_norm")}
    wide_norms = {n: Norm(norm.weight.float(), norm.eps) for n, norm in norms.items()}
    reference.rope_store(qkv.float(), 4, theirs, batch, cos_sin, **wide_norms)
    ops.rope_store(qkv, 4, ours, batch, cos_sin, **norms)
    for name in ("k", "v"):
        found, wanted = (
            dequantize(getattr(c, name), getattr(c, f"{name}_scale")).flatten(0, 1)[batch.slots] for c in (ours, theirs)
        )
        moved = (found - wanted).abs() > 1e-4 * wanted.abs().amax()
        assert float(moved.float().mean()) < 1e-3
        assert float((found - wanted).abs().max()) < 0.3 * float(wanted.abs().max()), "a neighbouring code at most"


@pytest.mark.parametrize("kind", list(SCALED_CACHES))
@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(ops: NativeOps, kind: str, spoilt: float) -> None:
    batch, plain = make_step([(0, 2)], kv_heads=1, head_dim=48)
    cache = KVCache.zeros(*plain.k.shape, dtype=kind, device=torch.device("cpu"))
    qkv = torch.randn(2, 3 * 48)
    qkv[1, 2 * 48 + 17] = spoilt
    ops.rope_store(qkv, 1, cache, batch, torch.cat([torch.ones(4, 24), torch.zeros(4, 24)], dim=1))
    found = dequantize(cache.v, cache.v_scale).flatten(0, 1)[batch.slots]
    assert bool(found[0].isfinite().all()) and not bool(found[1].isfinite().any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_look_up_of_dense_rows(ops: NativeOps, dtype: torch.dtype) -> None:
    table, ids = torch.randn(50, 24).to(dtype), torch.tensor([3, 49, 0, 3])
    assert torch.equal(ops.embedding(ids, table, dtype), table[ids])
    assert ops.embedding(ids[:0], table, dtype).shape == (0, 24)
    assert ops.embedding(ids, table.double(), dtype).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_look_up_of_packed_rows(ops: NativeOps, bits: int, dtype: torch.dtype) -> None:
    for group, asymmetric in ((None, False), (32, True), (100, False)):
        weight = random_weight(150, 300, bits=bits, group_size=group, asymmetric=asymmetric, scale_dtype=torch.float32)
        ids = torch.tensor([0, 149, 64, 63, 17, 100])
        found = ops.embedding(ids, ops.pack(weight, dtype=dtype), dtype)
        assert torch.equal(found, weight.dequantize()[ids].to(dtype))


def test_what_cannot_be_looked_up(ops: NativeOps) -> None:
    ids = torch.tensor([1])
    for weight in (random_weight(8, 16, bits=0), random_weight(8, 16, act_order=True), torch.ones(8, 16)):
        with pytest.raises(TypeError, match="integer tables"):
            ops.embedding(ids, ops.pack(weight, dtype=torch.float32), torch.float32)


def test_argmax(ops: NativeOps) -> None:
    for rows, columns in ((1, 1), (1, 5000), (2, 1024), (7, 1025), (0, 9)):
        x = torch.randint(-50, 50, (rows, columns)).float()  # many equal ones
        values, ids = ops.argmax(x)
        assert torch.equal(ids, (x == x.amax(1, keepdim=True)).int().argmax(1)) if rows else ids.shape == (0,)
        assert torch.equal(values, x.amax(1)) if rows else values.shape == (0,)


def test_argmax_of_strange_rows(ops: NativeOps) -> None:
    x = torch.zeros(6, 3000)
    x[0] = -torch.inf
    x[1, 2999] = torch.inf
    x[2, 1500], x[2, 2000], x[2, 7] = torch.nan, torch.nan, torch.inf
    x[3] = -5
    x[4, 0] = torch.nan
    x[5, 2998] = 1e-30
    values, ids = ops.argmax(x)
    assert ids.tolist() == [0, 2999, 1500, 0, 0, 2998]
    assert values.isnan().tolist() == [False, False, True, False, True, False]
    assert [ops.argmax(row.view(1, -1))[1].item() for row in x] == ids.tolist()


def test_kth_largest(ops: NativeOps) -> None:
    for n in (1, 2, 15, 16, 17, 100, 5000):
        rows = (torch.randn(n), torch.randint(-3, 3, (n,)).float(), torch.full((n,), -torch.inf), torch.arange(n).float())
        for row in rows:
            for k in {1, 2, n // 3, n - 1, n} - {0}:
                if k <= n:
                    assert ops.kth_largest(row, k) == row.topk(k).values[-1].item()
    with pytest.raises(ValueError, match="no largest number 3 among 2"):
        ops.kth_largest(torch.zeros(2), 3)
