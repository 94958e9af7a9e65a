"""Tensors for the tests of small kernels: random ones on the device, and memory full of what no kernel writes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

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


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that ``torch.empty`` gives is NaN, or -99, for as long as a test runs."""
    empty = torch.empty

    def poisoned(*args: object, **options: object) -> Tensor:
        made: Tensor = empty(*args, **options)  # type: ignore[call-overload]
        return made.fill_(float("nan") if made.is_floating_point() else -99)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
