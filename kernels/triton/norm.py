"""RMS norm, by itself or behind a residual addition: x * weight / sqrt(mean(x^2) + eps).

A program owns a tile of whole rows, which stays in registers from the load to the store, so every number is read once::

               column 0 .. BLOCK - 1 (a power of two, >= N)
    row        +----------------------------------+
    program *  | x[0] + x[1] + .. (+ residual)    |  -> sum of squares -> normed -> out, or codes and a scale a row
    ROWS ..    +----------------------------------+

Small rows (a head's) share a program; a large one has a program to itself. ``x[i]`` are the partial sums of a product that was
split along its inputs: they are added in order, the bias behind them, so the result does not depend on which was ready first.
With ``post`` (the weight of a norm of its own) x is normalized before the residual is added.
With ``perm`` the results stand in the order in which the next weight has its inputs: out[j] is the norm's number perm[j].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.narrow import to_int8

MAX_SIZE = 16384
TILE = 1024  # elements that make a program worth starting


class Tile(NamedTuple):
    rows: int
    block: int
    warps: int


def tile(size: int) -> Tile:
    """How rows of ``size`` numbers are handed out. ValueError above MAX_SIZE."""
    if not 0 < size <= MAX_SIZE:
        raise ValueError(f"a norm over {size} numbers: 1 to {MAX_SIZE} are possible")
    block = max(16, triton.next_power_of_2(size))
    rows = max(1, TILE // block)
    return Tile(rows, block, min(16, max(1, rows * block // 512)))


@triton.jit
def scaled(x, factor, gain, OFFSET: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x * factor * (gain + OFFSET) in float32; without an offset rounded to DTYPE on the way and after, as models' code does."""
    if OFFSET == 0.0:
        return ((x * factor).to(DTYPE).to(tl.float32) * gain).to(DTYPE).to(tl.float32)
    else:
        return x * factor * (gain + OFFSET)


@triton.jit(do_not_specialize=["rows", "inner"])  # one compilation for all numbers of tokens
def _rms_norm(  # type: ignore[no-untyped-def]
    x,  # [SPLITS, rows, N], rows in two dimensions: row // inner and row % inner
    bias,  # float32 [N]
    post,  # [N]: x is normalized with this weight before the residual is added
    residual,  # [rows, N]
    weight,  # [N], in the dtype of the activations; none: nothing but the sum is wanted
    perm,  # int64 [N]
    out,  # [rows, N], int8 where QUANTIZE
    added,  # [rows, N]
    scales,  # float32 [rows]
    rows,
    inner,
    N,
    outer_stride,
    inner_stride,
    split_stride,
    residual_stride,
    eps,
    SPLITS: tl.constexpr, ADD: tl.constexpr, QUANTIZE: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    dtype = added.dtype.element_ty if ADD else weight.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < N)[None, :]
    begin = x + (row // inner * outer_stride + row % inner * inner_stride)[:, None]
    start = begin + column[None, :]
    wide = tl.load(start, mask=mask, other=0.0).to(tl.float32)
    if BLOCK <= 8192 and SPLITS <= 8:
        for i in tl.static_range(1, SPLITS):  # loads of all parts at once
            wide += tl.load(start + tl.cast(i, tl.int64) * split_stride, mask=mask, other=0.0).to(tl.float32)
    else:  # for which there are no registers
        for i in range(1, SPLITS):
            wide += tl.load(start + tl.cast(i, tl.int64) * split_stride, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        wide += tl.load(bias + column, mask=column < N, other=0.0)[None, :]
    if post is not None:
        wide = wide.to(dtype).to(tl.float32)  # as a product that is not split is rounded
        factor = tl.rsqrt(tl.sum(wide * wide, axis=1) / N + eps)
        gain = tl.load(post + column, mask=column < N, other=0.0).to(tl.float32)
        wide = scaled(wide, factor[:, None], gain[None, :], OFFSET, dtype)
    place = (row * N)[:, None] + column[None, :]
    if ADD:
        wide += tl.load(residual + (row * residual_stride)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        narrow = wide.to(dtype)
        tl.store(added + place, narrow, mask=mask)
        wide = narrow.to(tl.float32)  # the norm is that of the sum as the next layers see it
    if weight is not None:
        factor = tl.rsqrt(tl.sum(wide * wide, axis=1) / N + eps)
        source = column
        if perm is not None:
            source = tl.load(perm + column, mask=column < N, other=0)
            if ADD:
                tl.debug_barrier()  # the whole program has stored the sum
                wide = tl.load(added + (row * N)[:, None] + source[None, :], mask=mask, other=0.0).to(tl.float32)
            else:
                wide = tl.load(begin + source[None, :], mask=mask, other=0.0).to(tl.float32)
        gain = tl.load(weight + source, mask=column < N, other=0.0).to(tl.float32)
        normed = scaled(wide, factor[:, None], gain[None, :], OFFSET, dtype).to(dtype)
        if QUANTIZE:
            rounded = normed.to(tl.float32)
            codes, scale = to_int8(rounded, tl.max(tl.abs(rounded), axis=1, keep_dims=True))
            tl.store(out + place, codes, mask=mask)
            tl.store(scales + row[:, None], scale, mask=(row < rows)[:, None])
        else:
            tl.store(out + place, normed, mask=mask)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, perm: Tensor | None = None) -> Tensor:
    """x [..., N] (float16, bfloat16 or float32) * (weight [N] + offset) / sqrt(mean(x^2) + eps) -> a new tensor like x.

    perm, int64 [N]: the order of the results, as in index_select. x may be a view with strides. ValueError where weight or perm
    is of another size or dtype, or N is above MAX_SIZE.
    """
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    _launch(x, None, weight, eps, offset, out=out, perm=perm)
    return out


def rms_norm_int8(
    x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, perm: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What ``rms_norm`` gives, rounded to int8 by rows: (codes int8 [..., N], scales float32 [...])."""
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _launch(x, None, weight, eps, offset, out=out, scales=scales, perm=perm)
    return out, scales


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """rms_norm(x) + residual, both [..., N] in one dtype, rounded once where there is an offset -> a new tensor."""
    added = torch.empty(residual.shape, dtype=residual.dtype, device=x.device)
    flat, other = (t.reshape(-1, t.shape[-1]) for t in (x, residual))
    _launch(flat, other, None, eps, offset, post=weight, added=added)
    return added


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    bias: Tensor | None = None,
    post: Tensor | None = None,
    perm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(sum), sum) of sum = x + residual [T, N], rounded once; both new, in residual's dtype.

    x: [T, N] in residual's dtype, or the float32 partial sums [splits, T, N] of a product whose bias (float32 [N]) was not added.
    post, [N]: the weight of a norm of x, which then is normalized (once it is rounded) before it is added. perm, int64 [N]: the
    order of the norm's results; the sum keeps its own. ValueError where shapes or dtypes do not fit.
    """
    out, added = (torch.empty(residual.shape, dtype=residual.dtype, device=x.device) for _ in range(2))
    _launch(x, residual, weight, eps, offset, bias=bias, post=post, out=out, added=added, perm=perm)
    return out, added


def add_rms_norm_int8(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    bias: Tensor | None = None,
    post: Tensor | None = None,
    perm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``add_rms_norm`` gives with the norm rounded to int8: (codes int8 [T, N], scales float32 [T], sum [T, N])."""
    added = torch.empty(residual.shape, dtype=residual.dtype, device=x.device)
    out = torch.empty(residual.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(residual.shape[0], dtype=torch.float32, device=x.device)
    _launch(x, residual, weight, eps, offset, bias=bias, post=post, out=out, added=added, scales=scales, perm=perm)
    return out, scales, added


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
    *,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    post: Tensor | None = None,
    added: Tensor | None = None,
    scales: Tensor | None = None,
    perm: Tensor | None = None,
) -> None:
    splits = x.shape[0] if residual is not None and x.dim() == 3 else 1
    like, shape = (x, x.shape) if residual is None else (residual, (*x.shape[: x.dim() - 2], *residual.shape))
    for gain in (weight, post):
        if gain is not None and (gain.shape != like.shape[-1:] or gain.dtype != like.dtype or x.shape != shape):
            raise ValueError(f"a norm of {_words(x)} with weight {_words(gain)} and residual {_words(residual)}")
    if residual is not None and (x.dtype != (residual.dtype if x.dim() == 2 else torch.float32) or splits == 0):
        raise ValueError(f"{_words(x)} cannot be added to residual {_words(residual)}")
    if bias is not None and (bias.shape != like.shape[-1:] or bias.dtype != torch.float32):
        raise ValueError(f"a bias {_words(bias)} for {_words(x)}")
    if perm is not None and (perm.shape != like.shape[-1:] or perm.dtype != torch.int64):
        raise ValueError(f"a permutation {_words(perm)} for {_words(x)}")
    N = x.shape[-1]
    rows, (tile_rows, block, warps) = like.numel() // max(N, 1), tile(N)
    if rows == 0:
        return
    # A row's place needs two strides at most: leading dimensions are joined where they can be, and copied where they cannot.
    x = x if x.stride(-1) == 1 and x.dim() <= 3 else x.contiguous().view(-1, N)
    inner = x.shape[-2] if x.dim() > 1 else 1
    outer_stride, inner_stride = x.stride(0) if x.dim() == 3 else 0, x.stride(-2) if x.dim() > 1 else 0
    if residual is not None and residual.stride(-1) != 1:
        residual = residual.contiguous()
    _rms_norm[(triton.cdiv(rows, tile_rows),)](
        x,
        bias,
        None if post is None else post.contiguous(),
        residual,
        None if weight is None else weight.contiguous(),
        perm,
        out,
        added,
        scales,
        rows,
        inner,
        N,
        0 if residual is not None else outer_stride,
        inner_stride,
        outer_stride,
        0 if residual is None else residual.stride(0),
        eps,
        SPLITS=splits,
        ADD=residual is not None,
        QUANTIZE=scales is not None,
        OFFSET=offset,
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=warps,
    )


def _words(x: Tensor | None) -> str:
    return "none" if x is None else f"{x.dtype} {list(x.shape)}"
