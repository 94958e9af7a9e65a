"""Gates in Triton against torch in float64, and compiled for every architecture."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.functional import gelu, silu

from tests.kernels.triton.aot import TARGETS, Compilation, compile_all
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.tensors import DTYPES, close, draw, poison  # noqa: F401

from kernels.triton import elementwise  # isort: skip  (after the conftest has chosen the interpreter)


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter warns of what a card does silently
@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (7, 90), (3, 2 * elementwise.BLOCK), (2, 2 * 1025), (2, 4094), (0, 8)])
def test_gates(rows: int, columns: int, dtype: torch.dtype, name: str) -> None:
    ours, function = (
        (elementwise.silu_mul, silu) if name == "silu_mul" else (elementwise.gelu_mul, partial(gelu, approximate="tanh"))
    )
    wide = draw(rows, columns + 9, dtype=dtype, scale=20)
    for x in (wide[:, :columns], wide[:, 5 : 5 + columns], draw(columns, rows, dtype=dtype).t()):
        gate, up = x.double().chunk(2, dim=1)
        close(ours(x), (function(gate) * up).to(dtype), dtype)


@pytest.mark.filterwarnings("ignore:overflow")
def test_large_gates() -> None:
    gates = torch.tensor([[1e4, -1e4, 200.0, -200.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float16, device=DEVICE)
    assert elementwise.silu_mul(gates).tolist() == elementwise.gelu_mul(gates).tolist() == [[1e4, 0, 200, 0, 0]]


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value", "ignore:divide by zero")
def test_every_gelu() -> None:
    """All numbers of float16 and of bfloat16, those that are not finite too."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        gates = torch.cat([bits.view(dtype), torch.ones(1 << 16, dtype=dtype)])[None].float().to(DEVICE)
        gate = gates[:, : 1 << 16].double()
        bent = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        expected = (gate * torch.sigmoid(2 * bent)).float()  # 1 + tanh u is 2 sigmoid 2 u, which does not cancel
        torch.testing.assert_close(elementwise.gelu_mul(gates), expected, rtol=2e-5, atol=1e-30, equal_nan=True)


def test_odd_columns() -> None:
    with pytest.raises(ValueError, match="7 columns"):
        elementwise.silu_mul(draw(1, 7, dtype=torch.float32))


@pytest.mark.compiles
def test_compilations() -> None:
    wanted = []
    for dtype, targets in (("fp16", TARGETS), ("bf16", TARGETS[1:]), ("fp32", (80, 90))):
        types = {"gate_up": f"*{dtype}", "out": f"*{dtype}", "columns": "i32", "row_stride": "i32"}
        constants = {"GELU": dtype == "bf16", "BLOCK": elementwise.BLOCK}
        wanted.append(
            Compilation("kernels.triton.elementwise:_gate_mul", types, constants, num_warps=elementwise.WARPS, targets=targets)
        )
    for report in compile_all(wanted, loops=False):
        assert report.fits and report.stack == 0, report
