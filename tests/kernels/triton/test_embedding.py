"""Rows of embedding tables in Triton, and compiled for every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import reference
from tests.kernels.triton.aot import TARGETS, Compilation, compile_all
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.tensors import DTYPES, EXACT, close, draw, poison  # noqa: F401

from kernels.triton import embedding as kernels  # isort: skip  (after the conftest has chosen the interpreter)

COMPILED = (("fp16", "fp16", TARGETS), ("bf16", "bf16", (80, 90)), ("i8", "fp16", TARGETS), ("i8", "bf16", (80,)))
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 96, 1025])
def test_int8_rows(columns: int, dtype: torch.dtype) -> None:
    codes = torch.randint(-128, 128, (50, columns), dtype=torch.int8, device=DEVICE)
    scales, ids = draw(50, dtype=torch.float32), torch.tensor(IDS, device=DEVICE)
    found = kernels.embedding_int8(ids, codes, scales, dtype)
    expected = codes[ids].float() * scales[ids, None]
    close(found, expected, dtype)
    assert dtype not in EXACT or torch.equal(found, expected.to(dtype))
    assert kernels.embedding_int8(ids[:0], codes, scales, dtype).shape == (0, columns)


def test_ids_outside_the_table() -> None:
    table, ids = draw(9, 20, dtype=torch.float16)[:8], torch.tensor([-1, 8, 7, 1 << 40], device=DEVICE)
    expected = torch.zeros(4, 20, dtype=torch.float16, device=DEVICE)
    expected[2] = table[7]
    assert torch.equal(kernels.embedding(ids, table, torch.float16), expected)


def test_what_does_not_fit() -> None:
    codes, ids = torch.zeros(8, 4, dtype=torch.int8, device=DEVICE), torch.tensor([1], device=DEVICE)
    for scales in (torch.ones(7, device=DEVICE), torch.ones(8, device=DEVICE).half()):
        with pytest.raises(ValueError, match="with scales"):
            kernels.embedding_int8(ids, codes, scales, torch.float16)
    with pytest.raises(ValueError, match="consecutive"):
        kernels.embedding(ids, draw(4, 8, dtype=torch.float16).t(), torch.float16)


def test_compilations() -> None:
    wanted = []
    for table, out, targets in (
        ("fp16", "fp16", TARGETS),
        ("bf16", "bf16", (80, 90)),
        ("i8", "fp16", TARGETS),
        ("i8", "bf16", (80,)),
    ):
        types = {"ids": "*i64", "table": f"*{table}", "scales": "*fp32", "out": f"*{out}"}
        types |= {"vocabulary": "i32", "columns": "i32", "row_stride": "i32"}
        constants: dict[str, Any] = {"SCALED": table == "i8", "BLOCK": kernels.BLOCK}
        if table != "i8":
            del types["scales"]
            constants["scales"] = None
        wanted.append(
            Compilation("kernels.triton.embedding:_embedding", types, constants, num_warps=kernels.WARPS, targets=targets)
        )
    for report in compile_all(wanted):
        assert report.fits and report.stack == 0, report
