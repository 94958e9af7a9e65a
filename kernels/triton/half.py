"""Rows of activations as float16 so small that sums of 128 products with codes fit float16.

A row is multiplied by the power of two that brings its largest number into [1, 2). Codes less zero points are at most 255, so
that a sum of 128 products is below 2 * 255 * 128 = 65280, less than the largest float16 (65504), whatever the row had; numbers
lose nothing but what is 2^-25 of the largest one, or less. The product is multiplied by the inverse, in float32.

GeForce cards multiply twice as fast where sums are float16. What that costs is precision, about 2^-11 of each group's sum, so it
is done only where APPLIANCE_FP16_SUMS=1 in the environment asks for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def shrink(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x [M, K] as float16 with each row's largest number in [1, 2), float32 [M] by which that is multiplied back).

    x: float16 or bfloat16, the numbers of a row side by side. A row of zeros stays as it is, one with infinities or NaN too.
    """
    rows, columns = x.shape
    out = torch.empty((rows, columns), dtype=torch.float16, device=x.device)
    back = torch.empty(rows, dtype=torch.float32, device=x.device)
    _shrink[(rows,)](x, out, back, columns, x.stride(0), BLOCK=BLOCK, num_warps=4)
    return out, back


@triton.jit
def _shrink(x, out, back, columns, x_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        found = tl.load(x + row * x_stride + start + at, mask=start + at < columns, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(found), propagate_nan=tl.PropagateNan.ALL)
    exponent = (tl.max(most.to(tl.int32, bitcast=True), axis=0) >> 23) - 127  # NaN are above all others as integers
    exponent = tl.where(exponent == 128, 0, tl.maximum(exponent, -100))
    down = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    for start in range(0, columns, BLOCK):
        mask = start + at < columns
        found = tl.load(x + row * x_stride + start + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row * columns + start + at, (found * down).to(tl.float16), mask=mask)
    tl.store(back + row, ((127 + exponent) << 23).to(tl.float32, bitcast=True))
