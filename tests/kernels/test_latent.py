"""Caches whose values are their keys, and what latent attention does with them; against separate keys and values."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.cpu import backend, torch_ops
from kernels.kv_cache import KVCache, dequantize, quantize
from kernels.latent import Latents
from kernels.layout import SCALED_CACHES
from kernels.ops import Ops
from tests.kernels.native import instruction_sets
from tests.kernels.paged import make_step
from tests.models.test_bind import make_ops

NATIVE = instruction_sets() if backend.native() is not None else []
CPU = torch.device("cpu")
STEPS = [(70, 1), (0, 21), (130, 3)]


@pytest.fixture(params=["reference", "torch", *NATIVE])
def ops(request: pytest.FixtureRequest) -> Ops:
    plain = {"reference": reference.make_ops, "torch": torch_ops.make_ops}
    return plain[request.param](CPU) if request.param in plain else make_ops(request.param)


@pytest.mark.parametrize(("heads", "size", "rotary"), [(20, 576, 64), (5, 40, 8), (70, 34, 2)])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", *SCALED_CACHES])
def test_values_that_are_keys(ops: Ops, heads: int, size: int, rotary: int, kind: str) -> None:
    """What is written is the rotated key, once, and nothing elsewhere; what is read is that, as key and as value."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    batch, plain = make_step(STEPS, kv_heads=1, head_dim=size, dtype=dtype)
    owned = ~plain.k.isnan().any(-1)
    if kind in SCALED_CACHES:
        codes, scales = quantize(plain.k, kind)
        cache = KVCache(codes, codes, scales, scales)
    else:
        cache = KVCache(plain.k, plain.k)
    tensors = [(tensor, tensor.clone()) for tensor in cache.tensors]
    qk = torch.randn(len(batch.positions), (heads + 1) * size).to(dtype)
    angles = torch.rand(256, rotary // 2) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    q, k = reference.rope(*qk.float().unflatten(1, (heads + 1, size)).split([heads, 1], dim=1), batch.positions, cos_sin)
    found_q = ops.rope_store(qk, heads, cache, batch, cos_sin)
    close = 0.02 if kind == "bfloat16" else 1e-5
    torch.testing.assert_close(found_q.float(), q, rtol=close, atol=close)
    stored = dequantize(cache.k, cache.k_scale)
    step = k.abs().amax() / (6 if kind == "int4" else 8 if "fp8" in kind else 120) if kind in SCALED_CACHES else close
    torch.testing.assert_close(stored.flatten(0, 1)[batch.slots], k, rtol=0, atol=float(step))
    for tensor, before in tensors:
        others = torch.ones(tensor.flatten(0, 1).shape[0], dtype=torch.bool)
        others[batch.slots] = False
        both = (t.flatten(0, 1)[others].contiguous().view(torch.uint8) for t in (tensor, before))
        assert torch.equal(*both)
    wide = torch.where(owned.unsqueeze(-1), stored, torch.nan)
    expected = reference.attention(found_q.float(), KVCache(wide, wide.clone()), batch, scale=0.11)
    found = ops.attention(found_q, cache, batch, scale=0.11).float()
    torch.testing.assert_close(found, expected, rtol=5 * close, atol=2 * close)


@pytest.mark.parametrize("dtype", ["float32", *SCALED_CACHES])
def test_they_are_counted_and_split_once(dtype: str) -> None:
    shape = 12, 8, 1, 40
    one, two = (KVCache.zeros(*shape, dtype=dtype, device=CPU, values=values) for values in (False, True))
    assert 2 * sum(t.nbytes for t in one.tensors) == sum(t.nbytes for t in two.tensors)
    assert one.values_are_keys and not two.values_are_keys
    for whole in (one, two):
        parts = list(whole.split(4))
        assert len(parts) == 3 and all(part.values_are_keys == whole.values_are_keys for part in parts)
        for tensors in zip(*(part.tensors for part in parts), whole.tensors, strict=True):
            *pieces, all_of_it = tensors
            assert [piece.data_ptr() - all_of_it.data_ptr() for piece in pieces] == [n * pieces[0].nbytes for n in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_absorbed(dtype: torch.dtype) -> None:
    """Scores and values are those of keys and values made of the latents."""
    heads, rope, nope, value, rank, tokens, keys = 3, 4, 6, 5, 11, 260, 9
    up = torch.randn(heads, nope + value, rank).to(dtype)
    latents = Latents.of(up, nope, torch.ones(rank))
    queries = torch.randn(tokens, heads * (rope + nope)).to(dtype)
    rotated, latent = torch.randn(tokens, rope).to(dtype), torch.randn(tokens, rank).to(dtype)
    found = latents.absorbed(queries, rotated, latent).view(tokens, heads + 1, rope + rank)
    assert torch.equal(found[:, -1], torch.cat([rotated, latent], dim=1))
    cached = torch.randn(keys, rope + rank).to(dtype).double()
    each, wide = queries.view(tokens, heads, rope + nope).double(), up.double()
    made = torch.einsum("kr,hnr->khn", cached[:, rope:], wide)  # keys that do not rotate, and values
    expected = torch.einsum("thr,kr->thk", each[..., :rope], cached[:, :rope])
    expected += torch.einsum("thn,khn->thk", each[..., rope:], made[..., :nope])
    scores, close = torch.einsum("thr,kr->thk", found[:, :-1].double(), cached), {torch.float32: 1e-4, torch.float16: 0.05}
    torch.testing.assert_close(scores, expected, rtol=0.0, atol=close.get(dtype, 0.5))
    shares = torch.rand(tokens, heads, keys).double()
    values = latents.results(torch.einsum("thk,kr->thr", shares, cached).to(dtype))
    expected = torch.einsum("thk,khv->thv", shares, made[..., nope:]).flatten(1)
    torch.testing.assert_close(values.double(), expected, rtol=0.0, atol=close.get(dtype, 0.5))
    assert latents.nbytes == up.nbytes + latents.norm.nbytes == sum(one.nbytes for one in latents.weights) + 4 * rank
