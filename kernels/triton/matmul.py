"""The product of kernels.ops on a card: which kernel a weight and a number of rows take, and what happens before and after."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from kernels.ops import Norm, Weight
from kernels.triton import many, rounded, slab, tiled
from kernels.triton.kv import capability
from kernels.triton.norm import rms_norm
from kernels.triton.quantize import Rounded
from kernels.triton.weights import NAMES, TILE, TritonWeight
from kernels.tune import AMPERE, MULTIPROCESSORS, Launch, choose

FINISH_BLOCK = 512
FEW = 8  # rows that one matrix instruction takes
REGISTERS = 128  # of a thread, for so few: where the compiler may choose, it puts some aside to have room for more warps


class Card(NamedTuple):
    """What decides how kernels are launched."""

    multiprocessors: int
    capability: int
    name: str = ""  # as the driver has it; none: no table of measured launches
    half: bool = False  # sums in float16 where that is faster, see half.py


UNKNOWN = Card(MULTIPROCESSORS, AMPERE)


def matmul(
    x: Tensor | Rounded,
    weight: Weight,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    card: Card = UNKNOWN,
) -> Tensor:
    """As kernels.ops.MatMul says. Nothing here waits for the device; what is launched depends on shapes alone.

    x may be rounded already, as the weight wants it (rounded.takes_codes); ``out`` is needed then.
    TypeError for a weight that was packed for other operators, ValueError for an ``out`` that does not fit.
    """
    if not isinstance(weight, TritonWeight):
        raise TypeError(f"a {type(weight).__name__} was packed for other operators than those in Triton")
    rows = _rows(x)
    shape = (rows, weight.N)
    if out is None and isinstance(x, Tensor):
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    if out is None or out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out is {None if out is None else list(out.shape)}; {list(shape)} is needed, contiguous")
    if rows == 0:
        return out
    residual, operand = None if residual is None else residual.contiguous(), _operand(x, weight, norm, card)
    if isinstance(operand, Tensor) and weight.bits == 16:
        return _dense(operand, weight, residual, out)
    return _tiled(operand, weight, residual, out, _launch(weight, operand, card))


def partial_sums(x: Tensor | Rounded, weight: Weight, *, card: Card = UNKNOWN) -> Tensor | None:
    """The parts of a product that is cut along its inputs, for a kernel that adds them up itself.

    float32 [splits, T, outputs]: added in order, with the weight's bias [outputs] behind them, they are what ``matmul`` rounds.
    None where ``matmul`` makes no such parts of x [T, K] and this weight, or has more to do with them than to add.
    """
    if not isinstance(weight, TritonWeight) or weight.bits == 16 or weight.gated or _rows(x) == 0:
        return None
    launch = _launch(weight, x, card)
    if launch.split == 1:
        return None
    parts = torch.empty((launch.split, _rows(x), weight.outputs), dtype=torch.float32, device=weight.words.device)
    _multiply(_operand(x, weight, None, card), weight, None, parts, launch, finished=False)
    return parts


def _rows(x: Tensor | Rounded) -> int:
    return (x.codes if isinstance(x, Rounded) else x).shape[0]


def _operand(x: Tensor | Rounded, weight: TritonWeight, norm: Norm | None, card: Card) -> Tensor | Rounded:
    """x as the product reads it: normalized, in the order of the weight's inputs, rounded to a byte where that is wanted."""
    if isinstance(x, Rounded):
        return x
    if rounded.rounds_rows(weight, x.shape[0], card.capability):
        return rounded.prepare(x, weight, norm)
    if norm is not None:
        x = rms_norm(x, **norm._asdict())
    if weight.perm is not None:
        x = x.index_select(1, weight.perm)
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(weight: TritonWeight, x: Tensor | Rounded, card: Card) -> Launch:
    rows, outputs, inputs = _rows(x), weight.outputs, weight.K
    if weight.rounds is not None or isinstance(x, Rounded):
        return rounded.launch_of(weight, rows, card.multiprocessors)
    return choose(rows=rows, outputs=outputs, inputs=inputs, kind=f"w{weight.bits} {NAMES[x.dtype]}", **card._asdict())


def _tiled(x: Tensor | Rounded, weight: TritonWeight, residual: Tensor | None, out: Tensor, launch: Launch) -> Tensor:
    if launch.slab and isinstance(x, Tensor):
        return slab.multiply(x, weight, residual, out, warps=launch.warps)
    rows, split = out.shape[0], launch.split
    if split == 1 and (not weight.gated or launch.group):
        _multiply(x, weight, residual, out, launch, finished=True)
        return out
    parts = torch.empty((split, rows, weight.outputs), dtype=torch.float32, device=out.device)
    _multiply(x, weight, None, parts, launch, finished=False)
    tiled.finish[(rows, triton.cdiv(weight.N, FINISH_BLOCK))](
        parts,
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
        GELU=weight.gelu,
        BLOCK=FINISH_BLOCK,
        num_warps=4,
    )
    return out


def _multiply(
    x: Tensor | Rounded, weight: TritonWeight, residual: Tensor | None, to: Tensor, launch: Launch, *, finished: bool
) -> None:
    """The product into ``to``: with bias and residual where it is ``finished``, else partial sums."""
    if isinstance(x, Rounded):
        return rounded.multiply(x, weight, residual, to, launch, finished=finished)
    if launch.group:
        return many.multiply(x, weight, residual, to, launch, finished=finished)
    rows = x.shape[0]
    assert weight.params is not None
    block_m = min(launch.block_m, FEW) if rows <= FEW else launch.block_m
    recent = capability(x.device) >= AMPERE  # older ones need more registers: there are no asynchronous copies
    grid = (triton.cdiv(weight.outputs, launch.block_n), triton.cdiv(rows, block_m), launch.split)
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
        **weight.constants,
        EVEN=weight.K % TILE == 0,
        BIAS=weight.bias is not None and finished,
        RESIDUAL=residual is not None,
        BM=block_m,
        BN=launch.block_n,
        ASM=x.is_cuda,
        num_warps=launch.warps,
        num_stages=launch.stages,
        maxnreg=REGISTERS if block_m == FEW and launch.block_n == 32 * launch.warps and recent else None,
    )


def _dense(x: Tensor, weight: TritonWeight, residual: Tensor | None, out: Tensor) -> Tensor:
    found = F.linear(x, weight.words).float()
    if weight.bias is not None:
        found = found + weight.bias
    if weight.gated:
        gate, up = found.chunk(2, dim=1)
        found = (F.gelu(gate, approximate="tanh") if weight.gelu else F.silu(gate)).mul_(up)
    if residual is not None:
        found = found + residual.float()
    return out.copy_(found)
