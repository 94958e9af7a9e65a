"""Launches of products whose activations are rounded to a byte first: when they are, how, and how programs are cut."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.ops import Norm
from kernels.triton import eight, fp8
from kernels.triton.norm import MAX_SIZE, rms_norm, rms_norm_int8
from kernels.triton.quantize import Rounded, padded_rows, quantize, quantize_fp8
from kernels.triton.weights import SCALES, TILE, TritonWeight
from kernels.tune import GROUP, MULTIPROCESSORS, Launch, parts

FP8_ROWS = 64  # so few are better off with the weight widened: it is read as fast, and activations stay as they are
FP8_CARDS = 89


def rounds_rows(weight: TritonWeight, rows: int, capability: int) -> bool:
    """Whether activations are rounded for a product of so many rows on a card of sm_``capability``."""
    return weight.rounds is not None or (weight.fp8_rows and rows > FP8_ROWS and capability >= FP8_CARDS)


def choose(*, rows: int, outputs: int, inputs: int, whole: bool, multiprocessors: int = MULTIPROCESSORS) -> Launch:
    """As kernels.tune.choose: few rows are split over the inputs until the card is filled, many take the largest tiles that do.

    whole: sums stay integers until the end, so that a thread has one sum for an output and room for tiles of 128 rows.
    """
    if rows > 64:
        for block_m in (128, 64) if whole else (64,):
            if -(-rows // block_m) * -(-outputs // TILE) >= multiprocessors:
                return Launch(block_m, TILE, 1, block_m // 16, 3, GROUP)
        return Launch(64, 64, 1, 4, 3, GROUP)
    block_m = next(m for m in (16, 32, 64) if rows <= m)
    programs, enough = -(-outputs // TILE), multiprocessors if block_m == 64 else 2 * multiprocessors
    return Launch(block_m, TILE, parts(rows, outputs, inputs, programs, enough), 4, 4 if block_m == 16 else 3, GROUP)


def launch_of(weight: TritonWeight, rows: int, multiprocessors: int) -> Launch:
    """What ``choose`` says of a weight."""
    whole = weight.rounds != "tile" and weight.params is not None and weight.params.shape[0] == 1
    return choose(rows=rows, outputs=weight.outputs, inputs=weight.K, whole=whole, multiprocessors=multiprocessors)


def prepare(x: Tensor, weight: TritonWeight, norm: Norm | None = None) -> Rounded:
    """x [M, K] in int8 (or FP8) as the weight wants it: normalized, in the order of its inputs, and rounded."""
    if norm is not None:
        if takes_codes(weight):
            return Rounded(*rms_norm_int8(x, **norm._asdict()), None)
        x = rms_norm(x, **norm._asdict())
    if weight.perm is not None:
        x = x.index_select(1, weight.perm)
    if weight.fp8_rows:
        # Scales of FP8 weights have 2^8 for float16, which the widened weight lacks (dequant.py).
        return quantize_fp8(x, part=2**-8 if x.dtype == torch.float16 else 1.0)
    return quantize(x, token=weight.rounds == "token", sums=weight.asymmetric)


def takes_codes(weight: TritonWeight) -> bool:
    """Whether the norms of norm.py can round activations to int8 as this weight wants them."""
    plain = weight.rounds == "token" and not weight.asymmetric and weight.perm is None
    return plain and weight.K % TILE == 0 and weight.K <= MAX_SIZE


def multiply(x: Rounded, weight: TritonWeight, residual: Tensor | None, to: Tensor, launch: Launch, *, finished: bool) -> None:
    """The product into ``to``: [M, N] with bias, gate and residual where it is ``finished``; else parts [splits, M, outputs]."""
    rows = x.codes.shape[0]
    assert weight.params is not None and weight.scale_dtype is not None
    if weight.fp8_rows:
        return fp8.multiply(x, weight, residual, to, launch, finished=finished)
    gated = weight.gated and finished
    columns = triton.cdiv(weight.N, launch.block_n // 2) if gated else triton.cdiv(weight.outputs, launch.block_n)
    grid = (columns * triton.cdiv(rows, launch.block_m), launch.split)
    eight.product[grid](
        x.codes,
        x.scales,
        x.sums,
        weight.words,
        weight.params,
        weight.bias,
        residual,
        to,
        rows,
        weight.outputs,
        padded_rows(rows),
        weight.params.shape[2],
        weight.words.shape[1],
        BITS=weight.bits,
        TOKEN=weight.rounds == "token",
        ZEROS=weight.asymmetric,
        WHOLE=weight.params.shape[0] == 1,
        PARTS=weight.params.shape[1],
        SCALE=SCALES[weight.scale_dtype],
        BIAS=weight.bias is not None and finished,
        RESIDUAL=residual is not None,
        BM=launch.block_m,
        BN=launch.block_n,
        GROUP=launch.group,
        GATED=gated,
        GELU=gated and weight.gelu,
        ASM=to.is_cuda,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
