"""Activations to one byte, for products of bytes: a scale for a row (a token), or for each 128 inputs of it.

    x      a row    | 0 .. 127 | 128 .. 255 | .. | K - 1, zeros up to a whole tile |
    scales token    |                      one                                     |   [M]
           tile     |   one    |    one     | ..                                   |   [K/128, M in whole tiles]
    sums            |   one    |    one     | ..                                   |   [K/128, M in whole tiles]

A program has a row, CHUNK tiles of it at a time; unless the row is one chunk (ONCE), a token's scale takes a pass of its own.
``sums`` are what weights with zero points need beside the product of codes: the sum of a tile's rounded activations (times the
scale where a tile has one). Codes are int8, or FP8 (e4m3) in the order in which words of FP8 weights have a tile's inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.narrow import to_fp8, to_int8

TILE = 128
TOKEN_CHUNK, TILE_CHUNK = 128, 8  # tiles


class Rounded(NamedTuple):
    """Activations in int8 (or FP8): codes [M, K in whole tiles]; float32 scales [M] or [tiles, rows], sums [tiles, rows] or none.

    ``rows`` are M in whole tiles, so that products read scales without asking where they end.
    """

    codes: Tensor
    scales: Tensor
    sums: Tensor | None


@triton.jit(do_not_specialize=["rows"])
def _quantize(  # type: ignore[no-untyped-def]
    x, codes, scales, sums, rows, K, tiles, x_stride,
    TOKEN: tl.constexpr, SUMS: tl.constexpr, FP8: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    row, tile, k = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNK), tl.arange(0, 128)
    within = tile[:, None] * 128 + k[None, :]
    if FP8:
        source = tile[:, None] * 128 + ((k & 64) | (k & 1) * 32 | (k & 63) // 2)[None, :]
    else:
        source = within
    chunks = tl.cdiv(tiles, CHUNK)
    x += row * x_stride
    if TOKEN:
        found = tl.load(x + source, mask=source < K, other=0.0).to(tl.float32)
        amax = tl.max(tl.abs(found), axis=1, keep_dims=True)
        if not ONCE:
            for chunk in range(1, chunks):
                at = chunk * CHUNK * 128 + source
                more = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
                amax = tl.maximum(amax, tl.max(tl.abs(more), axis=1, keep_dims=True))
        amax = tl.broadcast_to(tl.max(amax, axis=0, keep_dims=True), (CHUNK, 1))
    for chunk in range(tl.program_id(1), chunks, tl.num_programs(1)):
        start = chunk * CHUNK * 128
        if not (TOKEN and ONCE):
            found = tl.load(x + start + source, mask=start + source < K, other=0.0).to(tl.float32)
        if not TOKEN:
            amax = tl.max(tl.abs(found), axis=1, keep_dims=True)
        if FP8:
            scale = tl.maximum(amax, 1e-12) * (1.0 / 448.0)
            rounded = to_fp8(found * (1.0 / scale), 3)
        else:
            rounded, scale = to_int8(found, amax)
        tl.store(codes + row * tiles * 128 + start + within, rounded, mask=start + within < tiles * 128)
        here = (chunk * CHUNK + tile)[:, None]
        place = here.to(tl.int64) * rows + row
        if SUMS:
            total = tl.sum(rounded.to(tl.int32), axis=1, keep_dims=True).to(tl.float32)
            tl.store(sums + place, total if TOKEN else total * scale, mask=here < tiles)
        if TOKEN:
            tl.store(scales + row + 0 * here, scale * PART, mask=here == 0)
        else:
            tl.store(scales + place, scale, mask=here < tiles)


def padded_rows(M: int) -> int:
    return triton.cdiv(M, TILE) * TILE


def quantize(x: Tensor, *, token: bool, sums: bool = False) -> Rounded:
    """x [M, K], any float type -> int8: a scale for a row where ``token``, else for each 128 inputs.

    A code is x over the scale, to the nearest; the scale is the largest magnitude over 127.
    """
    M, K = x.shape
    rows, tiles = padded_rows(M), triton.cdiv(K, TILE)
    codes = torch.empty((M, tiles * TILE), dtype=torch.int8, device=x.device)
    scales = torch.empty((M,) if token else (tiles, rows), dtype=torch.float32, device=x.device)
    found = Rounded(codes, scales, torch.empty((tiles, rows), dtype=torch.float32, device=x.device) if sums else None)
    _launch(x, found, token=token, fp8=False)
    return found


def quantize_fp8(x: Tensor, *, part: float = 1.0) -> Rounded:
    """x [M, K], any float type -> FP8 (e4m3), in the order of words: a scale for a row, the largest magnitude over 448.

    What is stored is ``part`` times the scale.
    """
    codes = torch.empty((x.shape[0], padded_rows(x.shape[1])), dtype=torch.uint8, device=x.device)
    found = Rounded(codes, torch.empty((x.shape[0],), dtype=torch.float32, device=x.device), None)
    _launch(x, found, token=True, part=part, fp8=True)
    return found._replace(codes=codes.view(torch.float8_e4m3fn))


def _launch(x: Tensor, to: Rounded, *, token: bool, fp8: bool, part: float = 1.0) -> None:
    (M, K), tiles = x.shape, to.codes.shape[1] // TILE
    if M == 0:
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    chunk = min(TOKEN_CHUNK if token else TILE_CHUNK, triton.next_power_of_2(tiles))
    _quantize[(M, 1 if token else triton.cdiv(tiles, chunk))](
        x,
        to.codes,
        to.scales,
        to.sums,
        padded_rows(M),
        K,
        tiles,
        x.stride(0),
        TOKEN=token,
        SUMS=to.sums is not None,
        FP8=fp8,
        PART=part,
        CHUNK=chunk,
        ONCE=chunk >= tiles,
        num_warps=max(4, min(16, chunk // 4)),
    )
