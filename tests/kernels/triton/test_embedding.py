"""Rows of embedding tables in Triton, and compiled for every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import reference
from quant.rows import quantize_rows
from tests.kernels.triton.aot import TARGETS, Compilation, compile_all
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.tensors import DTYPES, EXACT, close, draw, poison  # noqa: F401
from tests.kernels.weights import random_weight

from kernels.triton import embedding as kernels  # isort: skip  (after the conftest has chosen the interpreter)
from kernels.triton.ops import make_ops  # isort: skip
from kernels.triton.weights import pack  # isort: skip

IDS = [3, 49, 0, 3, 17]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 24, 1023, 1024, 1500])
def test_dense_rows(columns: int, dtype: torch.dtype) -> None:
    table, ids = draw(50, columns + 3, dtype=dtype)[:, :columns], torch.tensor(IDS, device=DEVICE)
    assert torch.equal(kernels.embedding(ids, table, dtype), table[ids])
    assert kernels.embedding(ids[:0], table, dtype).shape == (0, columns)
    for other in DTYPES:
        found = kernels.embedding(ids, table, other)
        close(found, reference.embedding(ids, table, other), other)
        assert other not in EXACT or torch.equal(found, table[ids].to(other))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("bits", "group", "asymmetric", "scales"),
    [
        (8, None, False, torch.float32),
        (8, None, False, torch.float16),
        (8, 64, False, torch.float16),
        (4, 32, True, torch.float16),
        (4, 64, True, torch.float32),
        (4, 256, False, torch.bfloat16),
        (4, None, True, torch.float16),
    ],
)
def test_packed_rows(bits: int, group: int | None, asymmetric: bool, scales: torch.dtype, dtype: torch.dtype) -> None:
    """Of a table that was packed for products: what the reference makes of the same codes, to the last bit."""
    for rows, columns in ((131, 96), (300, 1280)):
        group_ = None if group is None else min(group, columns)
        weight = random_weight(rows, columns, bits=bits, group_size=group_, asymmetric=asymmetric, scale_dtype=scales)
        ids = torch.tensor([0, 127, 128, rows - 1, 5, rows, -1])
        expected = torch.zeros(7, columns, dtype=dtype)
        expected[:5] = reference.embedding(ids[:5], reference.pack(weight, dtype=dtype), dtype)
        for activation in ("auto", "int8"):
            table = pack(weight.on(torch.device(DEVICE)), dtype=dtype, activation=activation)
            assert table.bits == bits
            found = kernels.packed_rows(ids.to(DEVICE), table, dtype)
            close(found.cpu(), expected, dtype)
            assert dtype not in EXACT or torch.equal(found.cpu(), expected)
            assert kernels.packed_rows(ids[:0].to(DEVICE), table, dtype).shape == (0, columns)


def test_a_packed_table_is_its_head() -> None:
    """Rows are the weights that the product uses, also of one that is kept dequantized."""
    ops = make_ops(torch.device(DEVICE))
    for given, dtype in ((quantize_rows(torch.randn(70, 130), 8), torch.float16), (torch.randn(70, 130), torch.float32)):
        head = ops.pack(given, dtype=dtype)
        ids = torch.arange(70, device=DEVICE)
        rows = ops.embedding(ids, head, dtype)
        found = ops.matmul(torch.eye(130, dtype=dtype, device=DEVICE), head)
        torch.testing.assert_close(rows.t(), found, rtol=2e-3, atol=0)


def test_ids_outside_the_table() -> None:
    table, ids = draw(9, 20, dtype=torch.float16)[:8], torch.tensor([-1, 8, 7, 1 << 40], device=DEVICE)
    expected = torch.zeros(4, 20, dtype=torch.float16, device=DEVICE)
    expected[2] = table[7]
    assert torch.equal(kernels.embedding(ids, table, torch.float16), expected)


def test_what_does_not_fit() -> None:
    ids, ops = torch.tensor([1], device=DEVICE), make_ops(torch.device(DEVICE))
    with pytest.raises(ValueError, match="consecutive"):
        kernels.embedding(ids, draw(4, 8, dtype=torch.float16).t(), torch.float16)
    weight = random_weight(8, 32, act_order=True)
    others = (random_weight(8, 128, bits=0), weight)
    for packed in (
        *(ops.pack(other, dtype=torch.float16) for other in others),
        ops.pack(weight.without_perm(), dtype=torch.float16, gated=True),
    ):
        with pytest.raises(TypeError, match="no table"):
            ops.embedding(ids, packed, torch.float16)
    with pytest.raises(TypeError, match="other operators"):
        ops.embedding(ids, reference.pack(weight, dtype=torch.float16), torch.float16)


def compilation(dtype: str, bits: int, targets: tuple[int, ...], *, signed: bool = False) -> Compilation:
    """bits: of the table's codes, 16 for a dense one."""
    types = {"ids": "*i64", "out": f"*{dtype}", "vocabulary": "i32", "columns": "i32"}
    if bits == 16:
        types |= {"table": f"*{dtype}", "row_stride": "i32"}
        return Compilation(
            "kernels.triton.embedding:_embedding", types, {"BLOCK": kernels.BLOCK}, num_warps=kernels.WARPS, targets=targets
        )
    words = "*i16" if not signed else "*i8" if bits == 8 else "*u8"
    types |= {"words": words, "scaling": "*i32", "padded": "i32", "tiles": "i32"}
    constants: dict[str, Any] = {
        "BITS": bits,
        "SLICES": 4 if bits == 4 else 1,
        "WHOLE": bits == 8,
        "PARTS": 1 if bits == 4 else 2,
    }
    constants |= {
        "SCALE": "tl.float16" if bits == 4 else "tl.float32",
        "SIGNED": signed,
        "BLOCK": kernels.BLOCK,
    }
    return Compilation(
        "kernels.triton.embedding:_packed_rows",
        types,
        constants,
        num_warps=kernels.WARPS,
        odd=("vocabulary", "tiles"),
        targets=targets,
    )


@pytest.mark.compiles
def test_compilations() -> None:
    wanted = [compilation("fp16", bits, TARGETS) for bits in (4, 8, 16)]
    wanted += [compilation("fp16", bits, (75, 90), signed=True) for bits in (4, 8)]
    wanted += [compilation("bf16", bits, (80, 90)) for bits in (4, 8, 16)]
    for report in compile_all(wanted, loops=False):
        assert report.fits and report.stack == 0, report
