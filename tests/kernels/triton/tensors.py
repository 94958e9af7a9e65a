"""Tensors for the tests of small kernels: random ones on the device, and memory full of what no kernel writes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.kv_cache import CODES, KVCache, dequantize, quantize
from tests.kernels.triton.conftest import DEVICE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One rounding more or less on the way. The interpreter cuts bfloat16 off where a card rounds to the nearest, perhaps twice.
EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-7 if DEVICE == "cuda" else 2**-5, torch.float16: 2**-9}
EXACT = (torch.float32, torch.float16) if DEVICE == "cpu" else DTYPES  # the dtypes to which one rounding is as torch's


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype).to(DEVICE)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape and found.dtype == dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=EPS[dtype], atol=EPS[dtype], equal_nan=True)


def held(cache: KVCache, kind: str) -> tuple[KVCache, KVCache]:
    """(a cache of this kind, one with the float32 values that it stands for), unwritten slots as poisonous as can be.

    ``cache`` is of float32, NaN where nobody wrote; kind: as in KVCache.dtype.
    """
    if kind not in CODES:
        small = KVCache(*(t.to(getattr(torch, kind)).to(DEVICE) for t in (cache.k, cache.v)))
        return small, KVCache(small.k.float(), small.v.float())
    parts = []
    for values in (cache.k, cache.v):
        codes, scales = quantize(values, kind)
        nobody = values.isnan().any(-1)
        bytes_ = codes.view(torch.uint8)
        bytes_[nobody] = torch.randint(256, bytes_[nobody].shape, dtype=torch.uint8) if "int" in kind else 0x7F  # in FP8 a NaN
        scales[nobody] = float("nan")
        parts.append((codes.to(DEVICE), scales.to(DEVICE)))
    (k, k_scale), (v, v_scale) = parts
    return KVCache(k, v, k_scale, v_scale), KVCache(dequantize(k, k_scale), dequantize(v, v_scale))


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that ``torch.empty`` gives is NaN, or -99, for as long as a test runs."""
    empty = torch.empty

    def poisoned(*args: object, **options: object) -> Tensor:
        made: Tensor = empty(*args, **options)  # type: ignore[call-overload]
        return made.fill_(float("nan") if made.is_floating_point() else -99)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
