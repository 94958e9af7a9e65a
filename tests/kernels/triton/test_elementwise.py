"""silu(gate) * up in Triton against the reference, and compiled for every architecture."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from tests.kernels.triton.aot import TARGETS, Compilation, compile_all
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.tensors import DTYPES, close, draw, poison  # noqa: F401

from kernels.triton import elementwise  # isort: skip  (after the conftest has chosen the interpreter)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (7, 90), (3, 2 * elementwise.BLOCK), (2, 2 * 1025), (2, 4094), (0, 8)])
def test_silu_mul(rows: int, columns: int, dtype: torch.dtype) -> None:
    wide = draw(rows, columns + 9, dtype=dtype, scale=20)
    for x in (wide[:, :columns], wide[:, 5 : 5 + columns], draw(columns, rows, dtype=dtype).t()):
        close(elementwise.silu_mul(x), reference.silu_mul(x), dtype)


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter warns of what a card does silently
def test_large_gates() -> None:
    gates = torch.tensor([[1e4, -1e4, 200.0, -200.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float16, device=DEVICE)
    assert elementwise.silu_mul(gates).tolist() == [[1e4, 0, 200, 0, 0]]


def test_odd_columns() -> None:
    with pytest.raises(ValueError, match="7 columns"):
        elementwise.silu_mul(draw(1, 7, dtype=torch.float32))


@pytest.mark.compiles
def test_compilations() -> None:
    wanted = []
    for dtype, targets in (("fp16", TARGETS), ("bf16", TARGETS[1:]), ("fp32", (80, 90))):
        types = {"gate_up": f"*{dtype}", "out": f"*{dtype}", "columns": "i32", "row_stride": "i32"}
        constants = {"BLOCK": elementwise.BLOCK}
        wanted.append(
            Compilation("kernels.triton.elementwise:_silu_mul", types, constants, num_warps=elementwise.WARPS, targets=targets)
        )
    for report in compile_all(wanted, loops=False):
        assert report.fits and report.stack == 0, report
