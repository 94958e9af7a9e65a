"""Between the qkv product and attention: take q, k and v apart, normalize heads, rotate them, fill the cache. One pass.

A program has one token and a tile of heads, all of q, of k or of v; a head is loaded in three parts, so that a thread has both
numbers of every pair it rotates::

    qkv row     | q heads: tile 0, tile 1, .. | k heads: tile .. | v heads: tile .. |
    a head      | a: 0 .. H - 1 | b: H .. 2 H - 1 | rest: 2 H .. D - 1 |          H = rotary / 2
                  a cos - b sin   b cos + a sin     as it is

q goes back to where it came from; keys and values go to their token's slot, as they are or quantized, with a scale of each head
(kernels/kv_cache.py); where values are keys there are none. A negative slot is padding: nothing is stored. Where the product was
cut along its inputs, its partial sums [splits, T, features] are added here, in order and with the bias behind them, and rounded
as the product would have been.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import KVCache, Norm, PagedBatch
from kernels.triton.caches import cache_arguments
from kernels.triton.norm import scaled
from kernels.triton.store import store, store_in_cache

TILE = 1024  # features that a program has, or one head
PARTED_TILE = 256  # of partial sums: there are few rows, and each number is read several times


@triton.jit
def _add(row, bias, place, mask, split_stride, SPLITS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of the product in float32: the sum of its parts, rounded to DTYPE where they are wider."""
    found = tl.load(row + place, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(1, SPLITS):
        found += tl.load(row + tl.cast(i, tl.int64) * split_stride + place, mask=mask, other=0.0)
    if bias is not None:
        found += tl.load(bias + place, mask=mask, other=0.0)
    if row.dtype.element_ty != DTYPE:
        found = found.to(DTYPE).to(tl.float32)
    return found


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    row, bias, place, live, split_stride,
    SPLITS: tl.constexpr, DTYPE: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """The three parts of each head, 0 where there is nothing. place (in the row) and live are [heads, 1]."""
    feature, other = tl.arange(0, HALF_BLOCK)[None, :], tl.arange(0, REST_BLOCK)[None, :]
    a = _add(row, bias, place + feature, live & (feature < HALF), split_stride, SPLITS, DTYPE)
    b = _add(row, bias, place + HALF + feature, live & (feature < HALF), split_stride, SPLITS, DTYPE)
    rest = _add(row, bias, place + 2 * HALF + other, live & (other < REST), split_stride, SPLITS, DTYPE)
    return a, b, rest


@triton.jit
def _load_vector(start, HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The parts of one vector that all heads share, [1, features] each. Loaded without heads, so that heads keep their layout."""
    feature, other = tl.arange(0, HALF_BLOCK), tl.arange(0, REST_BLOCK)
    a = tl.load(start + feature, mask=feature < HALF, other=0.0).to(tl.float32)
    b = tl.load(start + HALF + feature, mask=feature < HALF, other=0.0).to(tl.float32)
    rest = tl.load(start + 2 * HALF + other, mask=other < REST, other=0.0).to(tl.float32)
    return a[None, :], b[None, :], rest[None, :]


@triton.jit
def _prepare(  # type: ignore[no-untyped-def]
    a, b, rest, weight, eps, angles,
    OFFSET: tl.constexpr, DTYPE: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Heads of q or k, normalized where there is a weight, and rotated. Rounded where the models' own code rounds."""
    if weight is not None:
        squares = tl.sum(a * a, 1, keep_dims=True) + tl.sum(b * b, 1, keep_dims=True) + tl.sum(rest * rest, 1, keep_dims=True)
        factor = tl.rsqrt(squares / (2 * HALF + REST) + eps)
        gain_a, gain_b, gain_rest = _load_vector(weight, HALF, REST, HALF_BLOCK, REST_BLOCK)
        a = scaled(a, factor, gain_a, OFFSET, DTYPE).to(DTYPE).to(tl.float32)
        b = scaled(b, factor, gain_b, OFFSET, DTYPE).to(DTYPE).to(tl.float32)
        rest = scaled(rest, factor, gain_rest, OFFSET, DTYPE).to(DTYPE).to(tl.float32)
    cos, sin, _ = _load_vector(angles, HALF, 0, HALF_BLOCK, 1)
    return (a * cos - b * sin).to(DTYPE).to(tl.float32), (b * cos + a * sin).to(DTYPE).to(tl.float32), rest


@triton.jit
def _rope_store(  # type: ignore[no-untyped-def]
    qkv,  # [T, (HEADS + 2 KV_HEADS) * D], or float32 [SPLITS, T, ..]
    bias,  # float32 [(HEADS + 2 KV_HEADS) * D]
    q_out,  # [T, HEADS * D]
    k_ptr,  # [B, BLOCK_SIZE, KV_HEADS, D], uint8 where quantized
    v_ptr,
    k_scale_ptr,  # float32 [B, BLOCK_SIZE, KV_HEADS], or int32 for pairs
    v_scale_ptr,
    k_given,  # the scales to be stored, where a checkpoint has some
    v_given,
    positions,  # int64 [T]
    slots,  # int64 [T]
    cos_sin,  # float32 [max positions, 2 HALF]
    q_weight,  # [D]
    k_weight,
    q_eps,
    k_eps,
    qkv_stride,
    split_stride,
    q_stride,
    block_stride,
    token_stride,
    head_stride,
    scale_block_stride,
    scale_token_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    CODE: tl.constexpr, SPLITS: tl.constexpr, Q_OFFSET: tl.constexpr, K_OFFSET: tl.constexpr, TILE_HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF + REST
    DTYPE: tl.constexpr = q_out.dtype.element_ty
    Q_TILES: tl.constexpr = (HEADS + TILE_HEADS - 1) // TILE_HEADS
    KV_TILES: tl.constexpr = (KV_HEADS + TILE_HEADS - 1) // TILE_HEADS
    token, part, within = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, TILE_HEADS)[:, None]
    row = qkv + token * qkv_stride
    angles = cos_sin + tl.load(positions + token) * (2 * HALF)
    if part < Q_TILES:
        head = part * TILE_HEADS + within
        live = head < HEADS
        a, b, rest = _load(row, bias, head * D, live, split_stride, SPLITS, DTYPE, HALF, REST, HALF_BLOCK, REST_BLOCK)
        a, b, rest = _prepare(a, b, rest, q_weight, q_eps, angles, Q_OFFSET, DTYPE, HALF, REST, HALF_BLOCK, REST_BLOCK)
        tl.debug_barrier()  # whoever holds a copy of an element has read it before it is written over
        store(q_out + token * q_stride + head * D, a, b, rest, live, HALF, REST)
    else:
        head = (part - Q_TILES) % KV_TILES * TILE_HEADS + within
        slot = tl.load(slots + token) + tl.zeros((TILE_HEADS, 1), tl.int64)
        live = (head < KV_HEADS) & (slot >= 0)
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        place = block * block_stride + offset * token_stride + head * head_stride
        scale_place = block * scale_block_stride + offset * scale_token_stride + head
        first = tl.where(part < Q_TILES + KV_TILES, HEADS, HEADS + KV_HEADS)
        a, b, rest = _load(row, bias, (first + head) * D, live, split_stride, SPLITS, DTYPE, HALF, REST, HALF_BLOCK, REST_BLOCK)
        if part < Q_TILES + KV_TILES:
            a, b, rest = _prepare(a, b, rest, k_weight, k_eps, angles, K_OFFSET, DTYPE, HALF, REST, HALF_BLOCK, REST_BLOCK)
            store_in_cache(k_ptr + place, k_scale_ptr, scale_place, k_given, a, b, rest, live, CODE, HALF, REST)
        else:
            store_in_cache(v_ptr + place, v_scale_ptr, scale_place, v_given, a, b, rest, live, CODE, HALF, REST)


def tile(heads: int, half: int, rest: int, features: int = TILE) -> dict[str, int]:
    """Heads and features of a program's tile, and its warps: constants of a launch for heads of 2 * half + rest features."""
    half_block, rest_block = triton.next_power_of_2(half), triton.next_power_of_2(max(rest, 1))
    size = 2 * half_block + (rest_block if rest else 0)
    count = max(1, min(features // triton.next_power_of_2(size), triton.next_power_of_2(heads)))
    warps = min(4, max(1, count * size // 512))
    return {"TILE_HEADS": count, "HALF_BLOCK": half_block, "REST_BLOCK": rest_block, "num_warps": warps}


def rope_store(
    qkv: Tensor,
    heads: int,
    cache: KVCache,
    batch: PagedBatch,
    cos_sin: Tensor,
    *,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> Tensor:
    """As the RopeStore protocol in kernels.ops has it; q is rotated in place, and a view of qkv [T, (Hq + 2 Hkv) * D].

    qkv: float16, bfloat16 or float32. cache: any float dtype, or quantized, as in kernels.kv_cache. A token whose slot is
    negative is not stored, and nothing is where qkv is [T, Hq * D]. ValueError for layouts that are not taken.
    """
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    q = qkv.as_strided((qkv.shape[0], heads * cache.head_dim), (qkv.stride(0), 1))
    return _launch(qkv[None], None, q, heads, cache, batch, cos_sin, q_norm, k_norm)


def rope_store_sums(
    parts: Tensor,
    bias: Tensor | None,
    heads: int,
    cache: KVCache,
    batch: PagedBatch,
    cos_sin: Tensor,
    *,
    dtype: torch.dtype,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> Tensor:
    """``rope_store`` of the sum of parts, float32 [splits, T, (Hq + 2 Hkv) * D], and bias, float32; q is new, in ``dtype``."""
    if parts.dtype != torch.float32 or parts.stride(2) != 1 or (bias is not None and bias.shape != parts.shape[2:]):
        raise ValueError(f"parts {parts.dtype} {list(parts.shape)} with a bias {None if bias is None else list(bias.shape)}")
    q = torch.empty(parts.shape[1], heads * cache.head_dim, dtype=dtype, device=parts.device)
    return _launch(parts, bias, q, heads, cache, batch, cos_sin, q_norm, k_norm)


def _launch(
    parts: Tensor,
    bias: Tensor | None,
    q: Tensor,
    heads: int,
    cache: KVCache,
    batch: PagedBatch,
    cos_sin: Tensor,
    q_norm: Norm | None,
    k_norm: Norm | None,
) -> Tensor:
    """q [T, Hq * D] is filled, and returned as heads."""
    (splits, tokens, width), kv_heads, size, rotary = parts.shape, cache.k.shape[2], cache.head_dim, cos_sin.shape[1]
    kept = 0 if width == heads * size else 1 if cache.values_are_keys else 2  # of each key head: keys, and values
    if width != (heads + kept * kv_heads) * size or not 2 <= rotary <= size or rotary % 2 or not splits:
        raise ValueError(
            f"qkv {list(parts.shape)} is not {heads} + {kept} * {kv_heads} heads of {size}, of which {rotary} rotate"
        )
    stored = cache_arguments(cache, torch.uint8)
    if stored["CODE"] == "int4" and rotary % 4:
        raise ValueError(f"an int4 cache has two numbers in a byte, so halves of {rotary // 2} cannot be rotated")
    k_given, v_given = (None, None) if cache.given is None or stored["CODE"] in ("", "int4") else cache.given
    shape = tile(max(heads, kv_heads), rotary // 2, size - rotary, TILE if splits == 1 else PARTED_TILE)
    programs = triton.cdiv(heads, shape["TILE_HEADS"]) + kept * triton.cdiv(kv_heads, shape["TILE_HEADS"])
    if tokens:
        _rope_store[(tokens, programs)](
            parts,
            bias,
            q,
            positions=batch.positions,
            slots=batch.slots,
            cos_sin=cos_sin,
            q_weight=None if q_norm is None else q_norm.weight,
            k_weight=None if k_norm is None else k_norm.weight,
            q_eps=0.0 if q_norm is None else q_norm.eps,
            k_eps=0.0 if k_norm is None else k_norm.eps,
            qkv_stride=parts.stride(1),
            split_stride=parts.stride(0),
            q_stride=q.stride(0),
            k_given=k_given,
            v_given=v_given,
            HEADS=heads,
            KV_HEADS=kv_heads,
            HALF=rotary // 2,
            REST=size - rotary,
            SPLITS=splits,
            Q_OFFSET=0.0 if q_norm is None else q_norm.offset,
            K_OFFSET=0.0 if k_norm is None else k_norm.offset,
            **stored,
            **shape,
        )
    return q.as_strided((tokens, heads, size), (q.stride(0), size, 1))
