"""GPTQ as AutoGPTQ and GPTQModel write it: qweight [K * bits / 32, N], qzeros [G, N * bits / 32], scales [G, N], g_idx [K].

Codes and zero points are dense little-endian streams, along K in qweight and along N in qzeros (3-bit fields straddle words),
or bit planes (``planar``). Version 1 stores the zero point less one, version 2 as it is. g_idx[k] is the group of input k.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant.bits import as_bytes, unpack_planes, unpack_stream
from quant.errors import CheckpointError
from quant.formats.common import SCALES, Source, from_nibbles, group_columns, regroup, widen
from quant.rules import WeightScheme
from quant.tensor import QuantTensor

WORDS = {"I32": 32, "I8": 8, "I16": 16, "I64": 64}


def load(source: Source, name: str, scheme: WeightScheme, expect: tuple[int, int] | None = None) -> QuantTensor:
    """The weight of one module. ``expect`` (N, K) tells the true K where it is not a multiple of the packing."""
    bits = scheme.bits
    words = source.take(f"{name}.qweight", dtypes=tuple(WORDS) if bits in (2, 4, 8) else ("I32",), shape=(None, None))
    word_bits = words.element_size() * 8
    N, K = words.shape[1], _inputs(source, name, words, scheme, expect)
    scales = source.take(f"{name}.scales", dtypes=SCALES, shape=(None, N))
    groups = scales.shape[0]
    zeros = _zeros(source, name, scheme, groups, N, word_bits)
    g_idx = _group_index(source, name, scheme, groups, K)
    if g_idx is None:
        perm, size, rows = None, group_columns(name, scheme.group_size, K, groups), None
    else:
        perm, size, rows = regroup(g_idx, K if scheme.group_size == -1 or scheme.group_size > K else scheme.group_size)
    if rows is not None:
        scales = scales[rows]
        zeros = zeros[rows] if zeros is not None else None
    scales = scales[: math.ceil(K / size)].contiguous()
    zeros = zeros[: math.ceil(K / size)].contiguous() if zeros is not None else None
    stream = words.t().contiguous()
    if bits == 4 and perm is None and not scheme.planar:
        return from_nibbles(as_bytes(stream), K, scales=scales, zeros=zeros, group_size=size)
    values = unpack_planes(stream, bits, K) if scheme.planar else unpack_stream(stream, bits, K)
    if perm is not None:
        values = values[:, perm]
    values, wide = widen(values, zeros, bits)
    return QuantTensor.from_values(values, scales=scales, zeros=zeros, perm=perm, bits=wide, group_size=size)


def _inputs(source: Source, name: str, words: Tensor, scheme: WeightScheme, expect: tuple[int, int] | None) -> int:
    """K: as expected, or as long as g_idx, or as many as qweight holds; CheckpointError where qweight has not that many."""
    rows, word_bits = words.shape[0], words.element_size() * 8
    g_idx = source.info(f"{name}.g_idx")
    K = expect[1] if expect else g_idx.numel if g_idx is not None and g_idx.numel else rows * word_bits // scheme.bits
    needed = math.ceil(K / 32) * scheme.bits if scheme.planar else math.ceil(K * scheme.bits / word_bits)
    if rows != needed:
        raise CheckpointError(
            f"{name}.qweight: found {rows} rows, expected {needed} for {K} inputs of {scheme.bits} bits in words of {word_bits}; "
            "the bits of the config, or the shape in config.json, do not fit this weight"
        )
    return K


def _zeros(source: Source, name: str, scheme: WeightScheme, groups: int, N: int, word_bits: int) -> Tensor | None:
    """The zero points uint8 [groups, N], or None where they are the mid point everywhere."""
    bits, full = scheme.bits, f"{name}.qzeros"
    info = source.info(full)
    if scheme.symmetric and (info is None or info.numel == 0):
        source.skip(full)
        return None
    width = math.ceil(N / 32) * bits if scheme.planar else math.ceil(N * bits / word_bits)
    dtype = {size: dtype for dtype, size in WORDS.items()}[word_bits]
    words = source.take(full, dtypes=(dtype,), shape=(groups, width))
    stored = unpack_planes(words, bits, N) if scheme.planar else unpack_stream(words, bits, N)
    middle = 2 ** (bits - 1)
    # Symmetric weights tell their version by themselves, and some are published under the wrong one.
    if scheme.symmetric and bool((stored == middle - 1).all() or (stored == middle).all()):
        return None
    if scheme.zero_offset and scheme.zero_borrow:
        words = as_bytes(words).to(torch.int64).view(groups, -1, word_bits // 8)
        return unpack_stream(_add_one_to_each_field(words, bits), bits, N).contiguous()
    # A stored 2 ** bits - 1 is a zero point of 0 that wrapped.
    return (stored + scheme.zero_offset) & (2**bits - 1)


def _add_one_to_each_field(words: Tensor, bits: int) -> Tensor:
    """Bytes [R, W, B] of packed words, as int64 -> uint8 [R, W * B] with 1 added to every field, carries included."""
    ones = sum(1 << i for i in range(0, 8, bits))
    carry = torch.zeros_like(words[..., 0])
    out = torch.empty(words.shape, dtype=torch.uint8)
    for i in range(words.shape[-1]):
        total = words[..., i] + ones + carry
        out[..., i] = (total & 255).to(torch.uint8)
        carry = total >> 8
    return out.view(words.shape[0], -1)


def _group_index(source: Source, name: str, scheme: WeightScheme, groups: int, K: int) -> Tensor | None:
    """g_idx as int64 [K], or None where it is absent or was never filled in."""
    full = f"{name}.g_idx"
    info = source.info(full)
    if info is None or info.numel == 0:
        source.skip(full)
        return None
    g_idx = source.take(full, dtypes=("I32", "I64"), shape=(K,)).to(torch.int64)
    low, high = int(g_idx.min()), int(g_idx.max())
    if not scheme.act_order and groups > 1 and high == 0:
        return None  # all zero without desc_act: a buffer that the packer left at its initial value
    if low < 0 or high >= groups:
        raise CheckpointError(f"{full}: found groups from {low} to {high}, expected 0 to {groups - 1} as the scales have")
    return g_idx
