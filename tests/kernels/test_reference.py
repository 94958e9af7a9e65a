"""The reference operators against loops that follow their definitions word by word."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import reference
from kernels.ops import KVCache, Norm
from tests.kernels.paged import make_step
from tests.kernels.weights import random_weight


@pytest.mark.parametrize("bits", [4, 8])
def test_matmul_follows_the_definition_of_the_weight(bits: int) -> None:
    weight = random_weight(5, 13, bits=bits, group_size=4, asymmetric=True, act_order=True, scale_dtype=torch.float32)
    x, bias = torch.randn(3, 13), torch.randn(5)
    codes, perm, zeros = weight.unpack(), weight.perm, weight.zeros
    assert perm is not None and zeros is not None
    found = reference.matmul(x, reference.pack(weight, dtype=torch.float32, bias=bias))
    for t in range(3):
        for n in range(5):
            terms = [
                float(x[t, perm[j]]) * (int(codes[n, j]) - int(zeros[j // 4, n])) * float(weight.scales[j // 4, n])
                for j in range(13)
            ]
            assert math.isclose(float(found[t, n]), math.fsum(terms) + float(bias[n]), rel_tol=1e-4, abs_tol=1e-5)


def test_weights_are_those_of_the_publishing_tool() -> None:
    """float16 scales: the product is with float16 weights, as the tools dequantize."""
    weight = random_weight(8, 64, group_size=32)
    x = torch.randn(4, 64)
    found = reference.matmul(x, reference.pack(weight, dtype=torch.float32))
    assert torch.equal(found, torch.nn.functional.linear(x, weight.dequantize(torch.float16).float()))


def test_int8_activations_are_rounded_per_token() -> None:
    x = torch.tensor([[127.0, 0.49, 0.51, -63.5], [-12.7, 1.26, 0.0, 0.04]])
    expected = torch.tensor([[127.0, 0.0, 1.0, -64.0], [-12.7, 1.3, 0.0, 0.0]])
    assert torch.allclose(reference.quantize_activations(x, "int8-token"), expected, rtol=1e-6)
    assert torch.equal(reference.quantize_activations(torch.zeros(2, 3), "int8-token"), torch.zeros(2, 3))


@pytest.mark.parametrize("activation", [None, "int8-tensor", "fp8-tensor", "fp8-token"])
def test_other_activations_stay_as_they_are(activation: str | None) -> None:
    x = torch.randn(2, 5)
    assert reference.quantize_activations(x, activation) is x


def test_rms_norm() -> None:
    x, weight = torch.randn(3, 7), torch.randn(7)
    found = reference.rms_norm(x, weight, eps=0.1)
    for row, out in zip(x.tolist(), found.tolist(), strict=True):
        size = math.sqrt(sum(v * v for v in row) / 7 + 0.1)
        assert out == pytest.approx([v / size * w for v, w in zip(row, weight.tolist(), strict=True)], rel=1e-5)
    shifted = reference.rms_norm(x, weight, eps=0.1, offset=1.0, residual=x)
    assert torch.allclose(shifted, reference.rms_norm(x, weight + 1, eps=0.1) + x, rtol=1e-5, atol=1e-6)


def test_weights_of_norms_are_added_to_before_they_are_rounded() -> None:
    """1 + 2^-9 is no number in bfloat16; the sum of a product by it with a residual is."""
    x, weight = torch.full((1, 4), 2.0, dtype=torch.bfloat16), torch.full((4,), 2.0**-9, dtype=torch.bfloat16)
    found = reference.rms_norm(x, weight, eps=0.0, offset=1.0, residual=-torch.ones_like(x))
    assert found.tolist() == [[2.0**-9] * 4]


def test_gelu_mul() -> None:
    x = torch.randn(5, 12) * 4
    gate, up = x.double().chunk(2, dim=1)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    assert torch.allclose(reference.gelu_mul(x).double(), gate / 2 * (1 + inner.tanh()) * up, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matmul_normalizes_gates_and_adds(dtype: torch.dtype) -> None:
    """Product, gate and sum in float32, rounded once; the input and the residual stay as they are."""
    weight, bias = torch.randn(6, 7).to(dtype), torch.randn(6)
    x, residual, norm = torch.randn(4, 7).to(dtype), torch.randn(4, 3).to(dtype), Norm(torch.randn(7).to(dtype), 0.1)
    kept = x.clone(), residual.clone()
    packed = reference.pack(weight, dtype=dtype, bias=bias, gated=True)
    assert (packed.N, packed.K) == (3, 7)
    exact = reference.rms_norm(x, norm.weight, eps=0.1).double() @ weight.double().t() + bias.double()
    exact = exact[:, :3] / (1 + (-exact[:, :3]).exp()) * exact[:, 3:] + residual.double()
    found = reference.matmul(x, packed, norm=norm, residual=residual)
    assert found.dtype == dtype and torch.allclose(
        found.double(), exact, rtol=4e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )
    wide = reference.matmul(x, packed, norm=norm, residual=residual, out=torch.empty(4, 3))
    assert torch.allclose(wide.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, kept[0]) and torch.equal(residual, kept[1])


def test_embedding_of_a_packed_table() -> None:
    weight, ids = random_weight(9, 12, group_size=5, asymmetric=True, act_order=True), torch.tensor([8, 0, 8])
    found = reference.embedding(ids, reference.pack(weight, dtype=torch.bfloat16), torch.bfloat16)
    assert torch.equal(found, weight.dequantize().bfloat16()[ids])
    table = torch.randn(9, 12)
    assert torch.equal(reference.embedding(ids, reference.pack(table, dtype=torch.float32), torch.float32), table[ids])


def test_argmax() -> None:
    nan, inf = math.nan, math.inf
    rows = torch.tensor([[1.0, 3.0, 3.0, 2.0], [-inf, -inf, -inf, -inf], [1.0, nan, inf, nan], [0.0, -0.0, 0.0, -1.0]])
    values, ids = reference.argmax(rows)
    assert ids.tolist() == [1, 0, 1, 0] and ids.dtype == torch.int64 and values.dtype == torch.float32
    assert values.nan_to_num(9.0, posinf=inf, neginf=-inf).tolist() == [3.0, -inf, 9.0, 0.0]


def test_rope_rotates_pairs_of_halves_and_leaves_the_rest() -> None:
    angles = torch.rand(9, 3)
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    q, k, positions = torch.randn(2, 4, 8), torch.randn(2, 1, 8), torch.tensor([7, 3])
    for x, found in zip((q, k), reference.rope(q, k, positions, table), strict=True):
        expected = x.clone()
        for t, position in enumerate(positions.tolist()):
            for i in range(3):
                pair = torch.complex(x[t, :, i], x[t, :, i + 3]) * torch.polar(torch.tensor(1.0), angles[position, i])
                expected[t, :, i], expected[t, :, i + 3] = pair.real, pair.imag
        assert torch.allclose(found, expected, atol=1e-6)


def test_silu_mul() -> None:
    found = reference.silu_mul(torch.tensor([[1.0, -2.0, 3.0, 4.0]]))
    assert found[0].tolist() == pytest.approx([1 / (1 + math.exp(-1)) * 3, -2 / (1 + math.exp(2)) * 4])


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_attention(window: int | None) -> None:
    batch, cache = make_step([(0, 3), (5, 1), (4, 2)], block_size=4, kv_heads=2, head_dim=3)
    q = torch.randn(6, 4, 3)
    found = reference.attention(q, cache, batch, scale=0.7, window=window)
    row = 0
    for (before, now), table in zip([(0, 3), (5, 1), (4, 2)], batch.block_tables_list, strict=True):
        for position in range(before, before + now):
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(4):
                at = [(table[p // 4], p % 4, head // 2) for p in range(first, position + 1)]
                weights = [math.exp(0.7 * float(q[row, head] @ cache.k[i])) for i in at]
                mean = sum((w * cache.v[i] for w, i in zip(weights, at, strict=True)), torch.zeros(3)) / sum(weights)
                assert torch.allclose(found[row, head], mean, atol=1e-5)
            row += 1


@pytest.mark.parametrize("window", [None, 3])
def test_sinks_take_their_share(window: int | None) -> None:
    batch, cache = make_step([(0, 3), (5, 1)], block_size=4, kv_heads=2, head_dim=3)
    q, sinks = torch.randn(4, 4, 3), torch.tensor([0.0, -40.0, 3.0, 40.0])
    found = reference.attention(q, cache, batch, scale=0.7, window=window, sinks=sinks)
    plain = reference.attention(q, cache, batch, scale=0.7, window=window)
    row = 0
    for (before, now), table in zip([(0, 3), (5, 1)], batch.block_tables_list, strict=True):
        for position in range(before, before + now):
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(4):
                keys = (cache.k[table[p // 4], p % 4, head // 2] for p in range(first, position + 1))
                whole = math.fsum(math.exp(0.7 * float(q[row, head] @ key)) for key in keys)
                share = whole / (whole + math.exp(float(sinks[head])))
                assert torch.allclose(found[row, head], share * plain[row, head], atol=1e-5)
            row += 1


def test_store_kv() -> None:
    batch, cache = make_step([(5, 4), (0, 2)], block_size=4, kv_heads=2, head_dim=3)
    before = cache.k.clone()
    k, v = torch.randn(6, 2, 3), torch.randn(6, 2, 3)
    reference.store_kv(k, v, cache, batch.slots)
    for i, slot in enumerate(batch.slots.tolist()):
        assert torch.equal(cache.k[slot // 4, slot % 4], k[i]) and torch.equal(cache.v[slot // 4, slot % 4], v[i])
        before[slot // 4, slot % 4] = k[i]
    assert torch.equal(cache.k.nan_to_num(9.0), before.nan_to_num(9.0))


@pytest.mark.parametrize("normed", [False, True])
def test_rope_store(normed: bool) -> None:
    """The steps it consists of, one by one."""
    batch, cache = make_step([(5, 4), (0, 2)], block_size=4, kv_heads=2, head_dim=6)
    _, expected = make_step([(5, 4), (0, 2)], block_size=4, kv_heads=2, head_dim=6)
    qkv, table = torch.randn(6, (4 + 2 + 2) * 6), torch.randn(9, 4)
    norms = {f"{n}_norm": Norm(torch.randn(6), 1e-5) for n in "qk"} if normed else {}
    found = reference.rope_store(qkv, 4, cache, batch, table, **norms)
    q, k, v = qkv.view(6, 8, 6).split([4, 2, 2], dim=1)
    if normed:
        q, k = (reference.rms_norm(x, *norms[f"{n}_norm"][:1], eps=1e-5) for n, x in zip("qk", (q, k), strict=True))
    q, k = reference.rope(q, k, batch.positions, table)
    reference.store_kv(k, v, expected, batch.slots)
    assert torch.equal(found, q)
    assert torch.equal(cache.k.nan_to_num(9.0), expected.k.nan_to_num(9.0))
    assert torch.equal(cache.v.nan_to_num(9.0), expected.v.nan_to_num(9.0))


def test_queries_alone_store_nothing() -> None:
    """As those beside keys and values come out, of caches of any kind."""
    batch, cache = make_step([(5, 4), (0, 2)], block_size=4, kv_heads=2, head_dim=6)
    before, qkv, table = KVCache(cache.k.clone(), cache.v.clone()), torch.randn(6, (4 + 2 + 2) * 6), torch.randn(9, 4)
    norm = Norm(torch.randn(6), 1e-5)
    found = reference.rope_store(qkv[:, : 4 * 6], 4, cache, batch, table, q_norm=norm)
    assert torch.equal(cache.k.nan_to_num(9.0), before.k.nan_to_num(9.0))
    assert torch.equal(cache.v.nan_to_num(9.0), before.v.nan_to_num(9.0))
    assert torch.equal(found, reference.rope_store(qkv, 4, cache, batch, table, q_norm=norm))
