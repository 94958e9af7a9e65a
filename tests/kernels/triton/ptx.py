"""A few PTX instructions in torch: what inline assembly computes, for where there is no card to run it.

    even, odd = run("{ .reg .b32 x; shl.b32 x, $2, 8; and.b32 $0, x, 0xff00ff00; ... }", outputs=2, inputs=[words])

Registers are int64 tensors of 32 unsigned bits. ValueError for an instruction that is not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def run(text: str, *, outputs: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    """$0 .. after the block ``text``; the inputs, uint32 in int64, come after the outputs."""
    registers = {f"${outputs + i}": x for i, x in enumerate(inputs)}
    inner = text.strip()
    if not (inner.startswith("{") and inner.endswith("}")):
        raise ValueError("a block in braces is needed")
    for statement in inner[1:-1].split(";"):
        if statement.strip() and not statement.strip().startswith(".reg"):
            _step(statement.strip(), registers)
    return [registers[f"${i}"] for i in range(outputs)]


def _step(statement: str, registers: dict[str, Tensor]) -> None:
    name, _, rest = statement.partition(" ")
    operands = [one.strip() for one in re.findall(r"\{[^}]*\}|[^,]+", rest) if one.strip()]

    def value(operand: str) -> Tensor:
        return registers[operand] if operand in registers else torch.tensor(int(operand, 0) & MASK)

    target, *sources = operands
    if name == "mov.b32" and target.startswith("{"):
        low, high = (part.strip() for part in target[1:-1].split(","))
        registers[low], registers[high] = value(sources[0]) & 0xFFFF, value(sources[0]) >> 16
    elif name in OPERATIONS:
        registers[target] = OPERATIONS[name](*map(value, sources)) & MASK
    else:
        raise ValueError(f"{name} is not known")


def _lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    found = torch.zeros_like(a)
    for i in range(8):
        if int(table) >> i & 1:
            found = found | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found


def _prmt(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    both, found = a | b << 32, torch.zeros_like(a)
    for i in range(4):
        pick = int(selector) >> 4 * i & 15
        byte = both >> 8 * (pick & 7) & 0xFF
        found = found | (((byte >> 7) * 0xFF if pick & 8 else byte) << 8 * i)
    return found


def halves(x: Tensor, dtype: torch.dtype) -> Tensor:
    """uint32 in int64 [...] -> the lower and the upper 16 bits as ``dtype`` [..., 2]."""
    both = torch.stack([x & 0xFFFF, x >> 16 & 0xFFFF], -1)
    return both.to(torch.uint16).view(dtype)


def _joined(x: Tensor) -> Tensor:
    bits = x.view(torch.uint16).to(torch.int64)
    return bits[..., 0] | bits[..., 1] << 16


def _pairwise(dtype: torch.dtype, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *sources: _joined(compute(*(halves(x, dtype).double() for x in sources)).to(dtype))


def _bits(x: Tensor) -> Tensor:
    return x.float().view(torch.int32).to(torch.int64) & MASK


def _floats(x: Tensor) -> Tensor:
    return x.to(torch.uint32).view(torch.float32)


def _from_e4m3(x: Tensor) -> Tensor:
    codes = torch.stack([x & 0xFF, x >> 8 & 0xFF], -1).to(torch.uint8)
    return _joined(codes.view(torch.float8_e4m3fn).to(torch.float16))


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "add.u32": lambda a, b: a + b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "add.f16x2": _pairwise(torch.float16, lambda a, b: a + b),
    "sub.f16x2": _pairwise(torch.float16, lambda a, b: a - b),
    "mul.f16x2": _pairwise(torch.float16, lambda a, b: a * b),
    "fma.rn.f16x2": _pairwise(torch.float16, lambda a, b, c: a * b + c),
    "fma.rn.bf16x2": _pairwise(torch.bfloat16, lambda a, b, c: a * b + c),
    "cvt.f32.f16": lambda a: _bits(a.to(torch.uint16).view(torch.float16)),
    "cvt.rn.bf16x2.f32": lambda high, low: _joined(torch.stack([_floats(low), _floats(high)], -1).bfloat16()),
    "cvt.rn.f16x2.e4m3x2": _from_e4m3,
}
