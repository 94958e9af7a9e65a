"""compressed-tensors' integer formats (its FP8 weights are read by quant.formats.fp8).

pack-quantized  weight_packed I32 [N, ceil(K * bits / 32)], a dense stream of code + 2 ** (bits - 1); weight_scale [N, G];
                weight_zero_point packed the same way along N, I32 [ceil(N * bits / 32), G]; weight_g_idx [K]; weight_shape
int-quantized   weight I8 [N, K]; weight_scale, weight_zero_point I8 of one number, [N, 1] or [N, G]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant.bits import as_bytes, unpack_stream, unpack_words
from quant.errors import CheckpointError
from quant.formats.common import SCALES, Source, from_nibbles, regroup, skip_input_scales, widen
from quant.formats.fp8 import expand_scales
from quant.rules import WeightScheme
from quant.tensor import QuantTensor


def load(source: Source, name: str, scheme: WeightScheme, expect: tuple[int, int] | None = None) -> QuantTensor:
    """The weight of one module, pack-quantized or int-quantized."""
    skip_input_scales(source, name)
    if scheme.layout == "int-quantized":
        return _plain(source, name, scheme, expect)
    return _packed(source, name, scheme, expect)


def _plain(source: Source, name: str, scheme: WeightScheme, expect: tuple[int, int] | None) -> QuantTensor:
    weight = source.take(f"{name}.weight", dtypes=("I8",), shape=expect or (None, None))
    N, K = weight.shape
    offset, wide = (8, 4) if scheme.bits <= 4 else (128, 8)
    values = weight.view(torch.uint8) + offset  # wraps: -128 + 128 = 0
    scale = source.take(f"{name}.weight_scale", dtypes=SCALES)
    scales, size = expand_scales(f"{name}.weight_scale", scale, scheme, N, K)
    zeros = _zeros(source, name, scheme, N, K, scales.shape[0])
    return QuantTensor.from_values(values, scales=scales, zeros=zeros, bits=wide, group_size=size, activation=scheme.activation)


def _packed(source: Source, name: str, scheme: WeightScheme, expect: tuple[int, int] | None) -> QuantTensor:
    bits = scheme.bits
    words = source.take(f"{name}.weight_packed", dtypes=("I32",), shape=(None, None))
    N = words.shape[0]
    rows, K = _shape(source, name, expect, (N, words.shape[1] * 32 // bits))
    if rows != N:
        raise CheckpointError(f"{name}.weight_packed: found {N} rows, but weight_shape says {rows}")
    _check_width(f"{name}.weight_packed", words, bits, K)
    scale = source.take(f"{name}.weight_scale", dtypes=SCALES)
    g_idx = _group_index(source, name, K)
    if g_idx is not None and scale.dim() == 2 and scale.shape[0] == N:
        scales, size = scale.t().contiguous(), K if scheme.group_size == -1 else min(scheme.group_size, K)
        if int(g_idx.max()) >= scales.shape[0]:
            raise CheckpointError(f"{name}.weight_g_idx: found group {int(g_idx.max())} of {scales.shape[0]}")
    else:
        g_idx = None if scheme.group_size == -1 else g_idx
        scales, size = expand_scales(f"{name}.weight_scale", scale, scheme, N, K)
    zeros = _zeros(source, name, scheme, N, K, scales.shape[0])
    perm: Tensor | None = None
    if g_idx is not None:
        perm, size, pieces = regroup(g_idx, size)
        scales = (scales if pieces is None else scales[pieces])[: math.ceil(K / size)].contiguous()
        if zeros is not None:
            zeros = (zeros if pieces is None else zeros[pieces])[: math.ceil(K / size)].contiguous()
    if bits == 4 and perm is None:
        return from_nibbles(as_bytes(words), K, scales=scales, zeros=zeros, group_size=size, activation=scheme.activation)
    values = _unpack(f"{name}.weight_packed", words, bits, K)
    if perm is not None:
        values = values[:, perm]
    values, wide = widen(values, zeros, bits)
    return QuantTensor.from_values(
        values, scales=scales, zeros=zeros, perm=perm, bits=wide, group_size=size, activation=scheme.activation
    )


def _shape(source: Source, name: str, expect: tuple[int, int] | None, held: tuple[int, int]) -> tuple[int, int]:
    """(N, K) from weight_shape, else as expected, else as many as the words hold."""
    full = f"{name}.weight_shape"
    if source.info(full) is None:
        return expect or held
    N, K = source.take(full, dtypes=("I64", "I32"), shape=(2,)).tolist()
    return N, K


def _check_width(name: str, words: Tensor, bits: int, count: int) -> int:
    """The words a row of a dense stream; CheckpointError unless the rows are that wide, or as wide as for whole fields."""
    dense, padded = math.ceil(count * bits / 32), math.ceil(count / (32 // bits))
    if words.shape[1] not in (dense, padded):
        raise CheckpointError(f"{name}: found {words.shape[1]} words for {count} codes of {bits} bits, not {dense}")
    return dense


def _unpack(name: str, words: Tensor, bits: int, count: int) -> Tensor:
    """Dense fields, or whole fields a word as early versions wrote 3, 5, 6 and 7 bits: the width of the rows tells."""
    dense = _check_width(name, words, bits, count)
    return unpack_stream(words, bits, count) if words.shape[1] == dense else unpack_words(words, bits, count)


def _group_index(source: Source, name: str, K: int) -> Tensor | None:
    full = f"{name}.weight_g_idx"
    if source.info(full) is None:
        return None
    g_idx = source.take(full, dtypes=("I32", "I64"), shape=(K,)).to(torch.int64)
    return None if bool((g_idx == -1).any()) else g_idx  # -1: columns stand in order


def _zeros(source: Source, name: str, scheme: WeightScheme, N: int, K: int, groups: int) -> Tensor | None:
    """The zero points uint8 [groups, N] of an asymmetric weight; None for a symmetric one."""
    full, bits = f"{name}.weight_zero_point", scheme.bits
    if scheme.symmetric:
        source.skip(full)
        return None
    stored = source.take(full, dtypes=("I32", "I8", "F16", "BF16", "F32"))
    if stored.dtype == torch.int32 and scheme.layout == "pack-quantized":
        if stored.dim() != 2 or stored.shape[1] != groups:
            raise CheckpointError(f"{full}: found {list(stored.shape)}, expected [{math.ceil(N * bits / 32)}, {groups}]")
        return _unpack(full, stored.t().contiguous(), bits, N)
    # Some converters leave it unpacked: signed, in the shape of the scale.
    offset = 8 if scheme.layout == "int-quantized" and bits <= 4 else 128 if scheme.layout == "int-quantized" else 2 ** (bits - 1)
    shifted = stored.to(torch.float32) + offset
    if bool((shifted != shifted.round().clamp(0, 255)).any()):
        raise CheckpointError(f"{full}: found values from {stored.min()} to {stored.max()}, expected whole {bits}-bit numbers")
    return expand_scales(full, shifted.to(torch.uint8), scheme, N, K)[0]
