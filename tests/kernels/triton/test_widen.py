"""Bytes widened to fp16 and bf16: all pairs of codes, in plain Triton, by the assembly's meaning, and on a card."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.ptx import halves, run

import triton  # isort: skip  (after the conftest has chosen the interpreter)
import triton.language as tl  # isort: skip
from kernels.triton import widen as subject  # isort: skip
from kernels.triton.kv import asm_level, capability  # isort: skip

CODES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}
DTYPES = {"FP16": torch.float16, "BF16": torch.bfloat16}
ASSEMBLY = [(code, dtype, end) for code in ("E4M3", "E5M2", "INT8") for dtype in DTYPES for end in ("", "_SM89")
            if hasattr(subject, f"{code}_{dtype}{end}")]  # fmt: skip


@triton.jit
def _widen(words, even, odd, CODE: tl.constexpr, ASM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, second = subject.widen(tl.load(words + at), even.dtype.element_ty, CODE, ASM)
    tl.store(even + at, first)
    tl.store(odd + at, second)


def all_words() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


def expected(words: Tensor, code: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return tuple(words.view(torch.uint8).view(CODES[code]).unflatten(-1, (-1, 2)).float().to(dtype).unbind(-1))  # type: ignore[return-value]


def same(found: Tensor, wanted: Tensor) -> bool:
    """Bit for bit, the sign of zero included, except that any NaN is as good as another."""
    nan = wanted.isnan()
    return torch.equal(found.isnan(), nan) and torch.equal(found[~nan].view(torch.int16), wanted[~nan].view(torch.int16))


@pytest.mark.parametrize("level", [0] if DEVICE == "cpu" else range(asm_level(capability(torch.device(DEVICE))) + 1))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("code", CODES)
def test_kernel(code: str, dtype: torch.dtype, level: int) -> None:
    words = all_words().to(DEVICE)
    even, odd = torch.empty(2, len(words), dtype=dtype, device=DEVICE)
    _widen[(len(words) // 4096,)](words, even, odd, CODE=code, ASM=level, BLOCK=4096)
    for found, wanted in zip((even, odd), expected(words, code, dtype), strict=True):
        assert same(found, wanted)


@pytest.mark.parametrize(("code", "dtype", "end"), ASSEMBLY)
def test_assembly(code: str, dtype: str, end: str) -> None:
    """What the text computes, by the meaning of its instructions."""
    words = all_words()
    two = torch.stack([words, words.roll(12345)], -1)
    text = getattr(subject, f"{code}_{dtype}{end}").value
    found = run(text, outputs=2, inputs=[two.view(torch.int32)[:, 0].to(torch.int64) & 0xFFFFFFFF])
    for mine, wanted in zip(found, expected(two, code.lower(), DTYPES[dtype]), strict=True):
        assert same(halves(mine, DTYPES[dtype]), wanted)
