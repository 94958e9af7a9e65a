"""What a quantized cache stores, against a search for the nearest code, and how little of a vector it loses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.kv_cache import CODES, LARGEST, LEAST_SCALE, KVCache, dequantize, quantize
from kernels.layout import SCALED_CACHES, kv_nbytes
from quant.errors import InputError
from tests.kernels.paged import make_step

QUANTIZED = list(SCALED_CACHES)
SYMMETRIC = [name for name in QUANTIZED if name != "int4"]
# Half a step of the largest code, over the largest magnitude (int4: over the range).
WORST = {"fp8_e4m3": 16 / 448, "fp8_e5m2": 4096 / 57344, "int8": 0.5 / 127, "int4": 0.5 / 15}


def every_value(dtype: str) -> Tensor:
    """All that a code can be, float64, in order; the most negative integer is not used."""
    if dtype == "int8":
        return torch.arange(-127, 128).double()
    values = torch.arange(256, dtype=torch.uint8).view(CODES[dtype]).float()
    return values[values.isfinite() & (values.abs() <= LARGEST[dtype])].unique().double()


@pytest.mark.parametrize("dtype", SYMMETRIC)
@pytest.mark.parametrize("given", [None, 0.017])
def test_codes_are_the_nearest(dtype: str, given: float | None) -> None:
    x = torch.randn(50, 3, 32) * torch.logspace(-6, 3, 50)[:, None, None]
    codes, scales = quantize(x, dtype, given)
    assert codes.shape == x.shape and codes.dtype == CODES[dtype]
    assert scales.shape == (50, 3) and scales.dtype == torch.float32
    if given is None:
        assert torch.equal(scales, x.abs().amax(-1) / LARGEST[dtype])
    else:
        assert bool((scales == torch.tensor(given)).all())
    wanted = x.double() / scales.double().unsqueeze(-1)
    best = (wanted.unsqueeze(-1) - every_value(dtype)).abs().amin(-1)
    lost = (wanted - codes.double()).abs()
    assert bool((lost <= best + 1e-6 * LARGEST[dtype]).all())
    assert torch.equal(dequantize(codes, scales), codes.float() * scales.unsqueeze(-1))


@pytest.mark.parametrize("dtype", SYMMETRIC)
def test_ties_go_to_the_even_code(dtype: str) -> None:
    """Halfway between neighbours, with a scale that is a power of two: nothing else is rounded."""
    values = every_value(dtype)
    halves = (values[1:] + values[:-1]) / 2
    x = torch.cat([halves, values[-1:]]).float() * 0.25
    assert torch.equal((x / 0.25).double(), torch.cat([halves, values[-1:]])), "float32 has all of them"
    codes, scales = quantize(x, dtype)
    assert float(scales) == 0.25
    bits = codes.view(torch.uint8)[:-1]
    if dtype == "int8":
        assert not bool((codes[:-1] % 2).any())
    else:
        assert not bool((bits % 2).any())


@pytest.mark.parametrize("size", [2, 16, 48, 128])
def test_int4_rounds_with_what_is_stored(size: int) -> None:
    x = torch.randn(200, size) * torch.logspace(-3, 3, 200)[:, None] + torch.randn(200, 1) * 3
    codes, scales = quantize(x, "int4")
    assert codes.shape == (200, size // 2) and scales.shape == (200, 2) and scales.dtype == torch.float16
    step, least = scales.double().unbind(-1)
    assert torch.equal(scales[:, 1], x.amin(-1).half())
    torch.testing.assert_close(step, (x.amax(-1).double() - least) / 15, rtol=1e-3, atol=1e-7)
    unpacked = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).double()
    wanted = ((x.double() - least[:, None]) / step[:, None]).clamp(0, 15)
    assert bool(((unpacked - wanted).abs() <= 0.5 + 1e-5).all())
    torch.testing.assert_close(dequantize(codes, scales).double(), unpacked * step[:, None] + least[:, None])


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_what_is_lost(dtype: str) -> None:
    x = torch.randn(1000, 64) * torch.logspace(-4, 4, 1000)[:, None]
    lost = (dequantize(*quantize(x, dtype)) - x).abs().amax(-1)
    span = x.amax(-1) - x.amin(-1) if dtype == "int4" else x.abs().amax(-1)
    assert bool((lost <= WORST[dtype] * span * 1.02 + 1e-6).all())
    assert float((lost / span).mean()) > WORST[dtype] / 4, "it is rounded at all"


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_awkward_vectors(dtype: str) -> None:
    rows = [0.0, 1e-45, -1e-38, 1e-30, 1e-6, -65504.0, 65504.0, 3e38, -3e38]
    x = torch.tensor(rows)[:, None].repeat(1, 16)
    x[:, ::2] *= -0.5
    back = dequantize(*quantize(x, dtype))
    assert bool(back.isfinite().all())
    if dtype == "int4":  # float16 says how far and how fine
        x = x.clamp(-65504, 65504)
    span = x.abs().amax(-1, keepdim=True)
    assert bool(((back - x).abs() <= 1.5 * WORST[dtype] * span * (2 if dtype == "int4" else 1) + 1e-7)[:7].all())
    if dtype != "int4":
        assert bool(((back - x).abs() <= 1.5 * WORST[dtype] * span + LEAST_SCALE * 2**20).all())
    assert bool((back[0] == 0).all())


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_a_constant_vector_stays(dtype: str) -> None:
    x = torch.tensor([1.0, -7.25, 1000.0])[:, None].repeat(1, 16)
    torch.testing.assert_close(dequantize(*quantize(x, dtype)), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", SYMMETRIC)
def test_a_given_scale_clips(dtype: str) -> None:
    x = torch.tensor([[1e6, -1e6, 0.0, 0.5 * LARGEST[dtype]]])
    largest = LARGEST[dtype]
    torch.testing.assert_close(
        dequantize(*quantize(x, dtype, 1.0)), torch.tensor([[largest, -largest, 0.0, largest / 2]]), rtol=0.01, atol=0
    )


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_what_is_not_finite_is_not_hidden(dtype: str) -> None:
    x = torch.randn(2, 16)
    x[1, 5] = float("nan")
    back = dequantize(*quantize(x, dtype))
    assert bool(back[0].isfinite().all()) and not bool(back[1].isfinite().all())


@pytest.mark.parametrize("dtype", [*QUANTIZED, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [2, 64, 80])
def test_a_cache_has_the_planned_bytes(dtype: str, size: int) -> None:
    cache = KVCache.zeros(3, 16, 2, size, dtype=dtype, device=torch.device("cpu"))
    assert sum(t.nbytes for t in cache.tensors) == 3 * 16 * 2 * 2 * kv_nbytes(dtype, size)
    assert (cache.dtype, cache.head_dim, cache.block_size) == (dtype, size, 16)


def test_odd_heads_in_four_bits() -> None:
    with pytest.raises(InputError, match="int4, but heads of 7"):
        KVCache.zeros(3, 16, 2, 7, dtype="int4", device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("given", [None, (0.02, 0.3)])
def test_the_reference_reads_what_it_wrote(dtype: str, given: tuple[float, float] | None) -> None:
    """Attention over a quantized cache is attention over the values that it stands for; slots of nobody are never read."""
    batch, wide = make_step([(0, 33), (0, 16), (0, 1)], block_size=8, head_dim=16, seed=4)
    blocks, size, heads, _ = wide.k.shape
    cache = KVCache.zeros(blocks, size, heads, 16, dtype=dtype, device=torch.device("cpu"), given=given)
    for tensor in cache.tensors:
        tensor.view(torch.uint8).fill_(255)  # NaN in float8, float16 and float32
    k, v = (t.flatten(0, 1)[batch.slots] for t in (wide.k, wide.v))
    reference.store_kv(k, v, cache, batch.slots)
    held = KVCache(*(torch.full_like(wide.k, float("nan")) for _ in range(2)))
    for x, scale, to in zip((k, v), given or (None, None), (held.k, held.v), strict=True):
        to.flatten(0, 1)[batch.slots] = dequantize(*quantize(x, dtype, scale))
    q = torch.randn(50, 4, 16)
    found = reference.attention(q, cache, batch, scale=0.25)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, reference.attention(q, held, batch, scale=0.25), rtol=1e-6, atol=1e-6)
