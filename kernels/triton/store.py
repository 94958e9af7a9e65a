"""Heads in three parts (kernels/triton/rope.py), stored: as they are, or quantized as kernels/kv_cache.py says.

Scales are found and codes made in float32, in registers, by the operations of the oracle there: no rounding is another. In int4
two neighbours share a byte, so parts must have even lengths.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.kv_cache import LARGEST, LEAST_SCALE
from kernels.triton.caches import pack_scales
from kernels.triton.narrow import nearest, to_fp8

_TINY = tl.constexpr(LEAST_SCALE)
_E4M3, _E5M2 = tl.constexpr(LARGEST["fp8_e4m3"]), tl.constexpr(LARGEST["fp8_e5m2"])
_MOST = tl.constexpr(65504.0)  # in float16


@triton.jit
def store(start, a, b, rest, live, HALF: tl.constexpr, REST: tl.constexpr):  # type: ignore[no-untyped-def]
    feature, other = tl.arange(0, a.shape[1])[None, :], tl.arange(0, rest.shape[1])[None, :]
    dtype = start.dtype.element_ty
    tl.store(start + feature, a.to(dtype), mask=live & (feature < HALF))
    tl.store(start + HALF + feature, b.to(dtype), mask=live & (feature < HALF))
    tl.store(start + 2 * HALF + other, rest.to(dtype), mask=live & (other < REST))


@triton.jit
def store_in_cache(  # type: ignore[no-untyped-def]
    start, scales, place, given, a, b, rest, live, CODE: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr
):
    """start: pointers [heads, 1]; place [heads, 1]: of their scales; given: the scale, or None for the one that fits best."""
    if CODE == "":
        store(start, a, b, rest, live, HALF, REST)
    elif CODE == "int4":
        nothing = _largest(a, b, rest) * 0.0  # NaN where a number is not finite: the head is NaN then
        least, most = _least(a, b, rest, HALF, REST), -_least(-a, -b, -rest, HALF, REST) + nothing
        low = tl.minimum(tl.maximum(least, -_MOST), _MOST).to(tl.float16)
        step = tl.div_rn(most - low.to(tl.float32), 15.0)
        step = tl.where(step > _MOST, _MOST, step).to(tl.float16)
        tl.store(scales + place, pack_scales(step, low), mask=live)
        least, share = low.to(tl.float32), _inverse(step.to(tl.float32))
        a, b = _nibbles((a - least) * share), _nibbles((b - least) * share)
        if REST > 0:
            rest = _nibbles((rest - least) * share)
        store(start, a, b, rest, live, HALF // 2, REST // 2)
    else:
        if given is None:
            scale = tl.div_rn(_largest(a, b, rest), 127.0 if CODE == "int8" else (_E4M3 if CODE == "e4m3" else _E5M2))
        else:
            scale = tl.zeros((a.shape[0], 1), tl.float32) + given
        tl.store(scales + place, scale, mask=live)
        share = _inverse(scale)
        store(start, _byte(a * share, CODE), _byte(b * share, CODE), _byte(rest * share, CODE), live, HALF, REST)


@triton.jit
def _largest(a, b, rest):  # type: ignore[no-untyped-def]
    """The largest magnitude of each head, [heads, 1]: NaN where one is, as the bits of NaN are the largest of all.

    Where there is no feature, there is 0.
    """
    found = tl.max(tl.maximum(_bits(a), _bits(b)), 1, keep_dims=True)
    return tl.maximum(found, tl.max(_bits(rest), 1, keep_dims=True)).to(tl.float32, bitcast=True)


@triton.jit
def _bits(x):  # type: ignore[no-untyped-def]
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def _least(a, b, rest, HALF: tl.constexpr, REST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The least number of each head, [heads, 1]."""
    feature, other = tl.arange(0, a.shape[1])[None, :] < HALF, tl.arange(0, rest.shape[1])[None, :] < REST
    found = tl.min(tl.where(feature, tl.minimum(a, b), float("inf")), 1, keep_dims=True)
    return tl.minimum(found, tl.min(tl.where(other, rest, float("inf")), 1, keep_dims=True))


@triton.jit
def _inverse(scale):  # type: ignore[no-untyped-def]
    return tl.where(scale < _TINY, 0.0, tl.div_rn(1.0, tl.maximum(scale, _TINY)))


@triton.jit
def _byte(x, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    if CODE == "int8":
        return nearest(x, -127.0, 127.0)
    else:
        return to_fp8(x, 3 if CODE == "e4m3" else 2)


@triton.jit
def _nibbles(x):  # type: ignore[no-untyped-def]
    """[heads, n / 2] of x [heads, n]: neighbours in a byte, the first in its lower half."""
    low, high = tl.split(nearest(x, 0.0, 15.0).reshape(x.shape[0], x.shape[1] // 2, 2))
    return low | (high << 4)
