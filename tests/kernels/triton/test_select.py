"""Arg-max and selection in Triton against torch; compiled for every architecture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton.aot import Compilation, compile_all
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.tensors import draw, poison  # noqa: F401

from kernels.triton import argmax as argmaxes  # isort: skip  (after the conftest has chosen the interpreter)
from kernels.triton import sampling, select  # isort: skip

INF = float("inf")
INTEGERS = ("columns", "row_stride", "chunks", "shift")


def device(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5000), (2, 4096), (3, 4097), (2, 40000), (0, 9)])
def test_argmax(rows: int, columns: int) -> None:
    x = torch.randint(-50, 50, (rows, columns)).float().to(DEVICE)  # many equal ones
    for logits in (x, torch.cat([x, x[:, :3] + 99], dim=1)[:, :columns], x.t().contiguous().t()):
        values, ids = sampling.argmax(logits)
        assert torch.equal(ids, (x == x.amax(1, keepdim=True)).int().argmax(1)) if rows else ids.shape == (0,)
        assert torch.equal(values, x.amax(1)) if rows else values.shape == (0,)


def test_argmax_of_strange_rows() -> None:
    x = torch.zeros(8, 9000)
    x[0] = -INF
    x[1, 8999] = INF
    x[2, 1500], x[2, 2000], x[2, 7] = torch.nan, torch.nan, INF
    x[3] = -5
    x[4, 0] = torch.nan
    x[5, 2998] = 1e-30
    x[6, :6000] = -0.0
    x[7, 3], x[7, 8000] = -torch.nan, torch.nan
    values, ids = sampling.argmax(x.to(DEVICE))
    assert ids.tolist() == [0, 8999, 1500, 0, 0, 2998, 0, 3]
    assert values.isnan().tolist() == [False, False, True, False, True, False, False, True]


def test_kth_largest() -> None:
    for n in (1, 2, 17, 2049):
        rows = (torch.randn(n), torch.randint(-3, 3, (n,)).float() * 0.5, torch.full((n,), -INF), torch.randn(n) * 1e-39)
        rows[1][::2] *= -1  # zeros of both signs
        for row in rows if n < 2049 else rows[:2]:
            for k in {n, (n + 2) // 3}:
                assert sampling.kth_largest(row.to(DEVICE), k) == row.topk(k).values[-1].item()
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"no largest number {k} among 2"):
            sampling.kth_largest(torch.zeros(2, device=DEVICE), k)


def test_kth_logits_of_rows() -> None:
    x = draw(5, 3000, dtype=torch.float32)
    x[3, :2990] = -INF
    found = select.kth_logits(x, device([1, 700, 0, 11, 3001], torch.int32))
    expected = [x[0].amax().item(), x[1].topk(700).values[-1].item(), -INF, -INF, -INF]
    assert found.tolist() == expected


def compilation(kernel: str, names: str, constants: dict[str, Any], *, warps: int, **others: str) -> Compilation:
    """A kernel of argmax, select or sampling; ``others``: types of arguments that are not always the same."""
    types = dict.fromkeys(("logits", "best", "temperature", "kth", "values", "thresholds"), "*fp32")
    types |= dict.fromkeys(("min_p", "uniform"), "*fp64") | dict.fromkeys(INTEGERS, "i32")
    types |= dict.fromkeys(("codes", "ids", "masses", "next_masses", "state", "next_state", "taken", "ties"), "*i64")
    types |= {"greedy": "*i64", "out": "*i64"} | others
    types = {name: types[name] for name in names.split() if name not in constants}
    return Compilation(f"kernels.triton.{kernel}", types, constants, num_warps=warps, odd=INTEGERS)


@pytest.mark.compiles
def test_compilations() -> None:
    wanted = [
        compilation(
            "argmax:_largest_of_chunk",
            "logits codes columns row_stride chunks",
            {"CHUNK": argmaxes.CHUNK},
            warps=argmaxes.WARPS,
        ),
        compilation("argmax:_largest_of_row", "logits codes values ids row_stride chunks", {"CHUNK_BLOCK": 64}, warps=1),
    ]
    digit = "logits wanted best temperature kth min_p masses next_masses state next_state columns row_stride chunks shift"
    finish = "wanted temperature masses state thresholds taken columns chunks"
    for weighted, kind in ((False, "*i64"), (True, "*fp64")):
        shape = {"WEIGHTED": weighted, "CHUNK_BLOCK": 128}
        absent = {} if weighted else {"best": None, "kth": None, "min_p": None}
        for step in (0, 1, 2):
            constants = {**shape, **absent, "STEP": step, "CHUNK": select.CHUNK, "PIECE": select.PIECE}
            one = compilation("select:_select_digit", digit, constants, warps=select.WARPS, wanted=kind)
            wanted.append(one if step == 2 else replace(one, targets=(75,)))
        wanted.append(compilation("select:_finish", finish, shape, warps=select.WARPS, wanted=kind))
    for report in compile_all(wanted, loops=False):
        assert report.fits and report.stack == 0, report
