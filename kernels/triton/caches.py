"""What kernels are told of a layer's cache, where tokens lie in it, and how their scales are read.

Scales are a 32-bit word for each token and head, of keys and of values: a float32, or, in int4, step (lower half) and least
(upper half) in float16. So those of all kinds lie at the same places.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.ops import KVCache

CODES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8", torch.uint8: "int4"}
BITS = {"int4": 4}


def code_bits(cache: KVCache) -> int:
    """Of a number of the cache."""
    return BITS.get(CODES.get(cache.k.dtype, ""), 8 * cache.k.element_size())


def cache_arguments(cache: KVCache, item: torch.dtype) -> dict[str, Any]:
    """What a kernel needs of a cache, by the names of its arguments; strides count codes' ``item``s where it is quantized.

    ValueError for a cache that is not laid out as assumed.
    """
    k, v, k_scale, v_scale = cache.k, cache.v, cache.k_scale, cache.v_scale
    if k.stride() != v.stride() or k.stride(3) != 1 or k.dtype != v.dtype:
        raise ValueError("keys and values must be of one type and layout, with the head dimension contiguous")
    if cache.block_size & (cache.block_size - 1):
        raise ValueError(f"a block of {cache.block_size} tokens: a power of two is needed")
    code, D = CODES.get(k.dtype, ""), cache.head_dim
    scale_strides: tuple[int, ...] = (0, 0)
    if code:
        if k_scale is None or v_scale is None or k_scale.stride() != v_scale.stride():
            raise ValueError(f"a cache of {code} needs the scales of keys and of values, in one layout")
        if D * code_bits(cache) % 16:
            raise ValueError(f"a cache of {code} needs heads of whole 16-bit words, not {D} numbers")
        if code == "int4":
            k_scale, v_scale = (t.view(torch.int32).squeeze(3) for t in (k_scale, v_scale))
        if k_scale.stride(2) != 1:
            raise ValueError("the heads of scales must be contiguous")
        k, v, scale_strides = k.view(item), v.view(item), k_scale.stride()[:2]
    names = ("block_stride", "token_stride", "head_stride", "scale_block_stride", "scale_token_stride")
    strides = dict(zip(names, (*k.stride()[:3], *scale_strides), strict=True))
    tensors = {"k_ptr": k, "v_ptr": v, "k_scale_ptr": k_scale, "v_scale_ptr": v_scale}
    return {**tensors, **strides, "BLOCK_SIZE": cache.block_size, "CODE": code}


@triton.jit
def token_rows(  # type: ignore[no-untyped-def]
    table, first, tokens, live, block_stride, token_stride, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """(base, rows [BLOCK_N]): where ``tokens`` = first + 0.. lie in a cache with these strides; first is a multiple of BLOCK_N.

    A tile inside a block has one base, int64, and rows that are the same for all tiles. Else the rows are int64, and in block 0
    where not live.
    """
    if BLOCK_N <= BLOCK_SIZE:
        block = tl.load(table + first // BLOCK_SIZE).to(tl.int64)
        return block * block_stride + first % BLOCK_SIZE * token_stride, tl.arange(0, BLOCK_N) * token_stride
    else:
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        return 0, blocks * block_stride + tokens % BLOCK_SIZE * token_stride


@triton.jit
def load_scales(at, live, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(scale, least) float32 of tokens, least 0 but in int4; 1 or 0 where not live."""
    if CODE == "int4":
        pair = tl.load(at, mask=live, other=0)
        return _half(pair), _half(pair >> 16)
    else:
        return tl.load(at, mask=live, other=1.0), 0.0


@triton.jit
def _half(bits):  # type: ignore[no-untyped-def]
    """The float16 in the lower half of int32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def pack_scales(step, least):  # type: ignore[no-untyped-def]
    """int32 of two float16."""
    low, high = step.to(tl.int16, bitcast=True).to(tl.int32), least.to(tl.int16, bitcast=True).to(tl.int32)
    return (low & 0xFFFF) | (high << 16)
