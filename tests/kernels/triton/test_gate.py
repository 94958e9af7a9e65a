"""Every product that multiplies gate and up does so with gelu, too, behind a norm with an offset."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels import reference
from kernels.ops import Norm
from kernels.triton.kv import capability
from kernels.triton.matmul import Card, matmul
from kernels.triton.weights import pack
from quant.tensor import QuantTensor
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.tensors import draw, poison  # noqa: F401
from tests.kernels.weights import random_weight

FOUR: dict[str, Any] = {"bits": 4, "group_size": 64, "asymmetric": True, "act_order": True}
INT8, FP8 = {"bits": 8, "activation": "int8-token"}, {"bits": 0, "activation": "fp8-token"}
CASES = {  # a weight, rows, and a card on which they take this path
    "dense": ({}, 3, Card(128, 80)),
    "parts": (FOUR, 1, Card(128, 80)),
    "large tiles": ({"bits": 8, "group_size": 128}, 70, Card(2, 89)),
    "slab": (FOUR, 260, Card(2, 90)),
    "int8 in parts": (INT8, 3, Card(128, 80)),
    "int8": (INT8, 3, Card(2, 80)),
    "FP8": (FP8, 66, Card(2, 89)),
}


@pytest.mark.parametrize("name", CASES)
def test_products_with_gelu(name: str) -> None:
    """As the reference has them, to which silu would be another function."""
    made, rows, card = CASES[name]
    dtype = torch.bfloat16 if name in ("parts", "large tiles", "int8") else torch.float16
    if name.startswith(("int8", "FP8")) and 0 < capability(torch.device(DEVICE)) < (80 if "int8" in name else 89):
        pytest.skip("nothing is rounded on this card")
    weight: QuantTensor | torch.Tensor = random_weight(132, 256, **made) if made else torch.randn(132, 256) * 0.05
    if isinstance(weight, QuantTensor) and weight.bits == 8:
        weight = replace(weight, scales=weight.scales / 16)
    x, bias, residual = draw(rows, 256, dtype=dtype, scale=3), torch.randn(132), draw(rows, 66, dtype=dtype)
    norm = Norm(draw(256, dtype=dtype, scale=0.3), 1e-5, 1.0)
    there = weight.on(torch.device(DEVICE)) if isinstance(weight, QuantTensor) else weight.to(DEVICE)
    packed = pack(there, dtype=dtype, bias=bias.to(DEVICE), gated=True, gelu=True)
    assert packed.N == 66
    found = matmul(x, packed, norm=norm, residual=residual, card=card).float().cpu()
    expected, silu = (
        reference.matmul(
            x.cpu(),
            reference.pack(weight, dtype=dtype, bias=bias, gated=True, gelu=gelu),
            norm=norm._replace(weight=norm.weight.cpu()),
            residual=residual.cpu(),
        ).float()
        for gelu in (True, False)
    )
    off, other = ((found - one).abs().mean() / expected.std() for one in (expected, silu))
    assert off < other / 4 and off < (0.02 if name == "FP8" else 1e-2), (float(off), float(other))
