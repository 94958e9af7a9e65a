"""The gate of a feed-forward layer: silu(gate) * up, or gelu(gate) * up, where gate and up lie side by side in one row.

A program makes BLOCK outputs of one row; both of its loads and its store are consecutive::

    gate_up row   | gate: 0 .. I - 1          | up: I .. 2 I - 1           |
    program j     |     [j BLOCK, + BLOCK)    |     I + [j BLOCK, + BLOCK) |  -> out row [j BLOCK, + BLOCK)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.gate import gate_mul

BLOCK, WARPS = 1024, 4


@triton.jit
def _gate_mul(gate_up, out, columns, row_stride, GELU: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    start = gate_up + row * row_stride + column
    gate = tl.load(start, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(start + columns, mask=mask, other=0.0).to(tl.float32)
    found = gate_mul(gate, up, GELU)
    tl.store(out + row * columns + column, found.to(out.dtype.element_ty), mask=mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, rounded once, for gate_up [T, 2 * I] (gate first) in float16, bfloat16 or float32 -> [T, I].

    ValueError where the number of columns is odd.
    """
    return _launch(gate_up, gelu=False)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """The same with gelu, in the approximation by tanh."""
    return _launch(gate_up, gelu=True)


def _launch(gate_up: Tensor, *, gelu: bool) -> Tensor:
    tokens, both = gate_up.shape
    if both % 2:
        raise ValueError(f"{both} columns are not a gate and as many others")
    out = torch.empty(tokens, both // 2, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
        grid = (tokens, triton.cdiv(both // 2, BLOCK))
        _gate_mul[grid](gate_up, out, both // 2, gate_up.stride(0), GELU=gelu, BLOCK=BLOCK, num_warps=WARPS)
    return out
