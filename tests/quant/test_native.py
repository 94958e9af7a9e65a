"""What is done in C++ while loading, by every instruction set that runs here: what torch's operators make, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.cpu import backend
from quant import extension, native
from quant.formats import awq
from quant.rows import quantize_rows

SETS = [name for name in backend.available() if name != backend.TORCH]
pytestmark = pytest.mark.skipif(not SETS, reason="the native extension is not built")
SHAPES = [(1, 1), (1, 2), (3, 15), (5, 16), (2, 17), (7, 31), (4, 32), (5, 33), (2, 47), (3, 64), (9, 101), (40, 160)]


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("APPLIANCE_CPU_ISA", request.param)
    return str(request.param)


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that held something else, so that what is not written is seen."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: empty(*shape, **kind).fill_(0x55))


def hard(weight: Tensor) -> Tensor:
    """Some rows that are hard to round."""
    rows = weight.float().clone()
    for row, value in zip(range(0, rows.shape[0], 3), (0.0, 1e-30, 60000.0, 3.0, 6e-8), strict=False):
        rows[row] *= value
    rows[-1, ::2] = rows[-1, 0].abs() * torch.arange(rows[-1, ::2].numel()) / 127 / 2  # ties
    return rows.to(weight.dtype)


def same(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        return found is expected
    nan = torch.isnan(expected)
    return found.dtype == expected.dtype and torch.equal(torch.isnan(found), nan) and torch.equal(found[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_rounded_as_by_torch(isa: str, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch)
    for N, K in SHAPES:
        plain = torch.randn(N, K).to(dtype)
        for bad in (None, float("nan"), float("inf"), -float("inf")):
            weight = hard(plain)
            if bad is not None:
                weight[torch.randint(N, ()), torch.randint(K, ())] = bad
            transposed = weight.t().contiguous().t()  # not in order
            found = quantize_rows(weight, bits)
            again = quantize_rows(transposed, bits)
            with monkeypatch.context() as without:
                without.setenv("APPLIANCE_CPU_ISA", backend.TORCH)
                assert extension.found() is None
                expected = quantize_rows(weight, bits)
            found.check()
            for one in (found, again):
                assert torch.equal(one.packed, expected.packed), (N, K, bad)
                assert same(one.scales, expected.scales) and same(one.zeros, expected.zeros), (N, K, bad)


def test_words_of_awq_are_turned_as_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch)
    for K, width in ((1, 1), (7, 2), (8, 15), (9, 16), (127, 17), (128, 1), (129, 33), (200, 48), (1000, 3)):
        words = torch.randint(-(2**31), 2**31, (K, width)).to(torch.int32)
        for given in (words, words.t().contiguous().t()):
            found = native.turn_awq(given)
            assert found is not None and torch.equal(found, awq._turned(words)), (K, width)
