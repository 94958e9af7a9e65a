"""The product of kernels.ops on a card: which kernel a weight and a number of rows take, and what happens before and after."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.ops import Norm, Weight
from kernels.triton import tiled
from kernels.triton.norm import rms_norm
from kernels.triton.weights import TILE, TritonWeight
from kernels.tune import AMPERE, MULTIPROCESSORS, Launch, choose

SCALES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
FINISH_BLOCK = 512


class Card(NamedTuple):
    """What decides how kernels are launched."""

    multiprocessors: int
    capability: int


UNKNOWN = Card(MULTIPROCESSORS, AMPERE)


def matmul(
    x: Tensor,
    weight: Weight,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    card: Card = UNKNOWN,
) -> Tensor:
    """As kernels.ops.MatMul says. Nothing here waits for the device; what is launched depends on shapes alone.

    TypeError for a weight that was packed for other operators, ValueError for an ``out`` that does not fit.
    """
    if not isinstance(weight, TritonWeight):
        raise TypeError(f"a {type(weight).__name__} was packed for other operators than those in Triton")
    rows, shape = x.shape[0], (x.shape[0], weight.N)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    elif out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out is {list(out.shape)}; {list(shape)} is needed, contiguous")
    if rows == 0:
        return out
    if norm is not None:
        x = rms_norm(x, norm.weight, eps=norm.eps)
    if weight.perm is not None:
        x = x.index_select(1, weight.perm)
    residual = None if residual is None else residual.contiguous()
    if weight.bits == 16:
        return _dense(x, weight, residual, out)
    launch = choose(rows=rows, outputs=weight.outputs, inputs=weight.K, **card._asdict())
    return _tiled(x if x.stride(1) == 1 else x.contiguous(), weight, residual, out, launch)


def _tiled(x: Tensor, weight: TritonWeight, residual: Tensor | None, out: Tensor, launch: Launch) -> Tensor:
    rows, split = x.shape[0], launch.split
    parted = split > 1 or weight.gated
    assert weight.params is not None and weight.scale_dtype is not None
    to = torch.empty((split, rows, weight.outputs), dtype=torch.float32, device=x.device) if parted else out
    grid = (triton.cdiv(weight.outputs, launch.block_n), triton.cdiv(rows, launch.block_m), split)
    tiled.product[grid](
        x,
        weight.words,
        weight.params,
        weight.bias,
        residual,
        to,
        rows,
        weight.outputs,
        weight.K,
        weight.params.shape[2],
        weight.words.shape[1],
        x.stride(0),
        BITS=weight.bits,
        SLICES=weight.slices,
        WHOLE=weight.params.shape[0] == 1,
        PARTS=weight.params.shape[1],
        SCALE=SCALES[weight.scale_dtype],
        EVEN=weight.K % TILE == 0,
        BIAS=weight.bias is not None and not parted,
        RESIDUAL=residual is not None and not parted,
        BM=launch.block_m,
        BN=launch.block_n,
        ASM=x.is_cuda,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    if parted:
        tiled.finish[(rows, triton.cdiv(weight.N, FINISH_BLOCK))](
            to,
            weight.bias,
            residual,
            out,
            rows,
            weight.outputs,
            weight.N,
            SPLITS=split,
            BIAS=weight.bias is not None,
            RESIDUAL=residual is not None,
            GATED=weight.gated,
            BLOCK=FINISH_BLOCK,
            num_warps=4,
        )
    return out


def _dense(x: Tensor, weight: TritonWeight, residual: Tensor | None, out: Tensor) -> Tensor:
    found = F.linear(x, weight.words).float()
    if weight.bias is not None:
        found = found + weight.bias
    if weight.gated:
        gate, up = found.chunk(2, dim=1)
        found = F.silu(gate) * up
    if residual is not None:
        found = found + residual.float()
    return out.copy_(found)
