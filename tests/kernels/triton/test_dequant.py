"""The assembly that turns codes into floats, run on every word there is, by a few PTX instructions written in torch."""

from __future__ import annotations

import pytest
import torch

from kernels.triton import dequant
from tests.kernels.triton.ptx import halves, run

HALF = {torch.float16: "FP16", torch.bfloat16: "BF16"}
PART = {torch.float16: 1, torch.bfloat16: dequant.UNIT.value}  # planes are this part of the numbers
ADDEND = {torch.float16: lambda zero: -(dequant.BASE.value + zero), torch.bfloat16: lambda zero: -zero / dequant.UNIT.value}


def words() -> torch.Tensor:
    """Pairs of words in 32 bits, as uint32 in int64: each word once below and once above."""
    every = torch.arange(1 << 16)
    return every | every.roll(12345) << 16


def addend(value: float, dtype: torch.dtype) -> torch.Tensor:
    bits = torch.tensor([value, value]).to(dtype).view(torch.uint16).to(torch.int64)
    return bits[0] | bits[1] << 16


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("zero", [0, 8, 15])
def test_nibbles(dtype: torch.dtype, zero: int) -> None:
    less = [addend(ADDEND[dtype](zero), dtype)]
    if dtype == torch.float16:  # of the planes whose base is a sixteenth
        less.append(addend(ADDEND[dtype](zero) + 960.0, dtype))
    found = run(getattr(dequant, f"_NIBBLES_{HALF[dtype]}").value, outputs=4, inputs=[words(), *less])
    for j, plane in enumerate(found):
        both = torch.stack([words() >> 4 * j & 15, words() >> 16 + 4 * j & 15], -1)
        assert torch.equal(halves(plane, dtype).double(), (both - zero) / PART[dtype])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("zero", [0, 128, 255])
def test_bytes(dtype: torch.dtype, zero: int) -> None:
    found = run(getattr(dequant, f"_BYTES_{HALF[dtype]}").value, outputs=2, inputs=[words(), addend(ADDEND[dtype](zero), dtype)])
    for j, plane in enumerate(found):
        both = torch.stack([words() >> 8 * j & 255, words() >> 16 + 8 * j & 255], -1)
        assert torch.equal(halves(plane, dtype).double(), (both - zero) / PART[dtype])
