"""Products of many rows with a weight of 4 or 8 bits that is expanded first, a slab of outputs at a time, for torch's product.

::

    slab     outputs first .. first + n of the weight as floats [n, K], in a workspace small enough to stay in the card's cache
    out      columns first .. first + n = x [M, K] @ slab.T, + residual; the next slab takes the workspace of the last
    gated    the slab is half gate, half up, their product [M, 2 n / 2] is joined by ``finish``

A weight is rounded once more than in the fused tiles (scale times code, to the activations' type), as with torch's operators.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import layout
from kernels.triton.dequant import byte_pairs, nibbles, whole
from kernels.triton.gate import gate_mul
from kernels.triton.tiled import _params
from kernels.triton.weights import TILE, TritonWeight

FINISH_BLOCK = 512


def multiply(x: Tensor, weight: TritonWeight, residual: Tensor | None, out: Tensor, *, warps: int = 8) -> Tensor:
    """out [M, N] of x [M, K] (16 bits, rows contiguous), with the weight's bias, its gate, and the residual [M, N]."""
    outputs, inputs = layout.triton_slab(weight.outputs, weight.K)
    slab = torch.empty((outputs, inputs), dtype=x.dtype, device=x.device)
    plain = weight.bias is None and not weight.gated and out.dtype == x.dtype
    most = outputs // 2 if weight.gated else outputs
    for first in range(0, weight.N, most):
        count = min(most, weight.N - first)
        expand(weight, first, slab[:count], warps=warps)
        if weight.gated:
            expand(weight, weight.N + first, slab[count : 2 * count], warps=warps)
        right = slab[: 2 * count if weight.gated else count, : weight.K].t()
        columns = slice(first, first + count)
        if not plain:
            _finish(torch.mm(x, right), weight, residual, out, columns)
        elif residual is None:
            torch.mm(x, right, out=out[:, columns])
        else:
            torch.addmm(residual[:, columns], x, right, out=out[:, columns])
    return out


def expand(weight: TritonWeight, first: int, to: Tensor, *, warps: int = 8) -> None:
    """Outputs ``first`` and on of a weight as floats, into ``to`` [n, K in whole tiles]; what is beyond K is left as it was."""
    assert weight.params is not None
    tiles = weight.words.shape[1]
    _expand[(tiles, triton.cdiv(to.shape[0], TILE))](
        weight.words,
        weight.params,
        to,
        first,
        first + to.shape[0],
        weight.K,
        weight.params.shape[2],
        tiles,
        to.stride(0),
        **weight.constants,
        BN=TILE,
        ASM=to.is_cuda,
        num_warps=warps,
        num_stages=1,
    )


def _finish(found: Tensor, weight: TritonWeight, residual: Tensor | None, out: Tensor, columns: slice) -> None:
    """Bias, gate and residual, into ``columns`` of out."""
    count = columns.stop - columns.start
    finish[(found.shape[0], triton.cdiv(count, FINISH_BLOCK))](
        found,
        weight.bias,
        residual,
        out,
        columns.start,
        count,
        found.shape[1],
        weight.N,
        BIAS=weight.bias is not None,
        RESIDUAL=residual is not None,
        GATED=weight.gated,
        GELU=weight.gelu,
        BLOCK=FINISH_BLOCK,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["first", "end"])
def _expand(  # type: ignore[no-untyped-def]
    words, scaling, slab, first, end, K, padded, tiles, stride,
    BITS: tl.constexpr, SLICES: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr, SCALE: tl.constexpr,
    BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """slab [.., stride]: row i is output ``first`` + i of the weight, (code - zero) * scale rounded once, as far as ``end``."""
    DTYPE: tl.constexpr = slab.dtype.element_ty
    PLANE: tl.constexpr = 32
    tile, i = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    column = first + i
    inside = (column < end)[:, None]
    column = tl.minimum(column, end - 1)
    k = tl.arange(0, PLANE)
    LINE: tl.constexpr = 8 * BITS  # words of a tile's output
    at = ((column // 128).to(tl.int64) * tiles + tile) * (128 * LINE) + (column % 128) * LINE
    w_at = words + at[:, None] + k[None, :]
    to = slab + i.to(tl.int64)[:, None] * stride + tile * 128 + k[None, :]
    if BITS == 4:
        packed = tl.load(w_at)
    group, left = 0 if WHOLE else tile * SLICES, K - tile * 128
    scale = tl.zeros((BN,), tl.float32)
    for j in tl.static_range(4):
        if (j * SLICES) % 4 == 0:
            scale, addend = _params(scaling, group + j * SLICES // 4, column, padded, PARTS, SCALE, DTYPE)
            scale = whole(scale, DTYPE, words.dtype.element_ty)
            addend = tl.broadcast_to(addend[:, None], (BN, PLANE))
            if BITS == 4:
                w0, w1, w2, w3 = nibbles(packed, addend, ASM)
        if BITS == 8:
            if j % 2 == 0:
                packed = tl.load(w_at + j // 2 * PLANE)
            if j % 2 == 0 or SLICES == 4:
                w0, w1 = byte_pairs(packed, addend, ASM)
            plane = w0 if j % 2 == 0 else w1
        else:
            plane = w0 if j == 0 else w1 if j == 1 else w2 if j == 2 else w3
        value = (plane.to(tl.float32) * scale[:, None]).to(DTYPE)
        tl.store(to + j * PLANE, value, mask=inside & (k + j * PLANE < left)[None, :])


@triton.jit(do_not_specialize=["first", "count"])
def finish(  # type: ignore[no-untyped-def]
    found, bias, residual, out, first, count, width, N,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``count`` columns of out [M, N] from ``first`` on; found [M, width] holds them, or their gate and then their up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < count
    at = found + row * width + column
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + first + column, mask=mask, other=0.0)
    if GATED:
        up = tl.load(at + count, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            up += tl.load(bias + N + first + column, mask=mask, other=0.0)
        value = gate_mul(value, up, GELU)
    to = row * N + first + column
    if RESIDUAL:
        value += tl.load(residual + to, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + to, value.to(out.dtype.element_ty), mask=mask)
