"""AutoAWQ's three packings of 4-bit weights.

gemm       qweight I32 [K, N/8], qzeros I32 [G, N/8], scales [G, N]; a word's nibbles: columns 0 2 4 6 1 3 5 7
gemv       qweight I32 [N, K/8], qzeros I32 [N, Z], scales [N, 8 Z]; nibbles in order along K; Z padded beyond ceil(G / 8)
gemv_fast  qweight I16 [N/4, K], qzeros and scales F16 [8 Z, N]; qzeros hold -zero * scale

Symmetric checkpoints mostly still have qzeros; where they are there, they are used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant import native
from quant.bits import as_bytes, unpack_stream
from quant.errors import CheckpointError
from quant.formats.common import SCALES, Source, from_nibbles, group_columns
from quant.rules import WeightScheme
from quant.tensor import QuantTensor

COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word's nibbles, the lowest first
SLAB = 64  # blocks of eight rows that are worked on at a time: they stay in the cache


def load(source: Source, name: str, scheme: WeightScheme, expect: tuple[int, int] | None = None) -> QuantTensor:
    """The weight of one module in any of the three packings."""
    return {"awq-gemm": _gemm, "awq-gemv": _gemv, "awq-gemv-fast": _gemv_fast}[scheme.layout](source, name, scheme)


def _gemm(source: Source, name: str, scheme: WeightScheme) -> QuantTensor:
    words = source.take(f"{name}.qweight", dtypes=("I32",), shape=(None, None))
    K, N = words.shape[0], words.shape[1] * 8
    scales = source.take(f"{name}.scales", dtypes=SCALES, shape=(None, N))
    size = group_columns(name, scheme.group_size, K, scales.shape[0])
    zeros = None
    if _has_zeros(source, name, scheme):
        packed_zeros = source.take(f"{name}.qzeros", dtypes=("I32",), shape=(scales.shape[0], N // 8))
        zeros = _simplify(_columns(packed_zeros), scheme)
    return from_nibbles(_transposed(words), K, scales=scales, zeros=zeros, group_size=size)


def _columns(words: Tensor) -> Tensor:
    """int32 [R, C/8] -> uint8 [R, C]."""
    out = torch.empty(*words.shape, 8, dtype=torch.uint8)
    for nibble, column in enumerate(COLUMNS):
        out[..., column] = (words >> 4 * nibble) & 15
    return out.view(words.shape[0], words.shape[1] * 8)


def _transposed(words: Tensor) -> Tensor:
    """int32 [K, N/8] -> uint8 [N, 4 ceil(K / 8)], the canonical nibbles, and any behind those of K inputs."""
    turned = native.turn_awq(words)
    return _turned(words) if turned is None else turned


def _turned(words: Tensor) -> Tensor:
    """The same by torch's operators.

    In a block of eight rows nibble i of row j changes places with nibble j of row i, so that what is moved then are whole words.
    """
    (K, width), count = words.shape, math.ceil(words.shape[0] / 8)
    if K % 8:
        words = torch.nn.functional.pad(words, (0, 0, 0, -K % 8))
    blocks = words.view(count, 8 * width)
    out = torch.empty(width, 4, 2, count, dtype=torch.int32)
    # Blocks are an odd number of cache lines apart: with a power of two, a column's words would share few sets of the cache.
    room = torch.empty(min(SLAB, count), (math.ceil(8 * width / 16) | 1) * 16, dtype=torch.int32)[:, : 8 * width]
    spare = torch.empty(len(room), 4 * width, dtype=torch.int32)
    for first in range(0, count, SLAB):
        part = blocks[first : first + SLAB]
        slab = room[: len(part)].copy_(part)
        _exchange(slab, spare[: len(part)])
        out[..., first : first + len(part)] = slab.view(len(part), 2, 4, width).permute(3, 2, 1, 0)
    return as_bytes(out.view(width * 8, count))


def _exchange(slab: Tensor, spare: Tensor) -> None:
    """Transpose the nibbles of each block int32 [8 rows, width] in place: halves of words, then bytes, then nibbles."""
    for rows, bits, mask in ((4, 16, 0x0000FFFF), (2, 8, 0x00FF00FF), (1, 4, 0x0F0F0F0F)):
        above, below = slab.view(len(slab), 4 // rows, 2, -1).unbind(2)
        moved = torch.bitwise_right_shift(above, bits, out=spare.view(above.shape))
        moved.bitwise_xor_(below).bitwise_and_(mask)
        below.bitwise_xor_(moved)
        above.bitwise_xor_(moved.bitwise_left_shift_(bits))


def _gemv(source: Source, name: str, scheme: WeightScheme) -> QuantTensor:
    words = source.take(f"{name}.qweight", dtypes=("I32",), shape=(None, None))
    N, K = words.shape[0], words.shape[1] * 8
    size, groups = _padded_groups(scheme, K)
    width = _padded_width(source, f"{name}.scales", (N, groups), 1)
    scales = source.take(f"{name}.scales", dtypes=SCALES, shape=(N, width))[:, :groups].t().contiguous()
    zeros = None
    if _has_zeros(source, name, scheme):
        width = _padded_width(source, f"{name}.qzeros", (N, math.ceil(groups / 8)), 1)
        packed_zeros = source.take(f"{name}.qzeros", dtypes=("I32",), shape=(N, width))
        zeros = _simplify(unpack_stream(packed_zeros, 4, groups).t().contiguous(), scheme)
    return from_nibbles(as_bytes(words), K, scales=scales, zeros=zeros, group_size=size)


def _gemv_fast(source: Source, name: str, scheme: WeightScheme) -> QuantTensor:
    words = source.take(f"{name}.qweight", dtypes=("I16",), shape=(None, None))
    quads, K = words.shape
    N = quads * 4
    if K % 64:
        raise CheckpointError(f"{name}: gemv_fast packs blocks of 64 inputs, but qweight has {K} columns")
    size, groups = _padded_groups(scheme, K)
    depth = _padded_width(source, f"{name}.scales", (groups, N), 0)
    scales = source.take(f"{name}.scales", dtypes=SCALES, shape=(depth, N))[:groups].contiguous()
    stored = f"{name}.qzeros" if source.info(f"{name}.qzeros") else f"{name}.scaled_zeros"  # the latter is llm-awq's name
    shifts = source.take(stored, dtypes=SCALES, shape=(depth, N))[:groups].float()
    exact = torch.where(scales == 0, 0.0, -shifts / scales.float())
    zeros = exact.round().clamp(0, 15)
    if (exact - zeros).abs().max() > 0.3:
        raise CheckpointError(
            f"{stored}: -qzeros / scales should be whole numbers from 0 to 15, found {exact.min():.2f} to {exact.max():.2f}"
        )
    # Four outputs share a row of words: of every 64 inputs first those of one output, then of the next. Each 32 are shuffled:
    nibbles = unpack_stream(words, 4, K * 4).view(quads, K // 64, 4, 64)
    # split as 4 x 4 x 2, the first two axes swapped, then each 8 of the result split as 4 x 2 and swapped.
    blocks = nibbles.transpose(1, 2).reshape(N, K // 32, 4, 2, 4).transpose(3, 4).reshape(N, K // 32, 4, 4, 2)
    values = blocks.transpose(2, 3).reshape(N, K)
    return QuantTensor.from_values(values, scales=scales, zeros=_simplify(zeros.to(torch.uint8), scheme), bits=4, group_size=size)


def _has_zeros(source: Source, name: str, scheme: WeightScheme) -> bool:
    """Absent zero points are only right for a symmetric weight; taking them then fails with the name of what is missing."""
    return not scheme.symmetric or source.info(f"{name}.qzeros") is not None


def _simplify(zeros: Tensor, scheme: WeightScheme) -> Tensor | None:
    return None if scheme.symmetric and bool((zeros == 8).all()) else zeros


def _padded_groups(scheme: WeightScheme, K: int) -> tuple[int, int]:
    """(group size, groups): the padded scales of the gemv packings cannot tell, so the config is believed."""
    size = K if scheme.group_size == -1 or scheme.group_size > K else scheme.group_size
    return size, math.ceil(K / size)


def _padded_width(source: Source, name: str, least: tuple[int, int], axis: int) -> int:
    """The padded extent of a tensor along ``axis``, at least that of ``least``; CheckpointError where the groups do not fit."""
    info = source.info(name)
    if info is None or len(info.shape) != 2:
        return least[axis]  # take() says what is wrong
    if info.shape[axis] < least[axis]:
        raise CheckpointError(f"{name}: found {info}, expected at least {list(least)}; the group_size of the config does not fit")
    return info.shape[axis]
