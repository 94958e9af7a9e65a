"""float32 to codes of a byte or less, element by element and with integer arithmetic alone.

FP8 (sign, exponent, M mantissa bits): above the least normal number, rounding is an addition to the float32 bits, whose carry may
run into the exponent, then a shift and another bias::

    s eeeeeeee mmm|mmmmmmmmmmmmmmmmmmmm   + 0x7ffff + (last bit kept), >> 20, - (127 - 7) << 3     (e4m3; e5m2 keeps two)

Below it, the steps are equal: adding 2^23 such steps makes the float adder round to one. The same on every card, also on those
without the instruction; a cache gets few numbers for each one that attention reads, so nothing is lost where there is one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_fp8(x, MANTISSA: tl.constexpr):  # type: ignore[no-untyped-def]
    """uint8 codes of float32 x: float8_e4m3fn (MANTISSA 3) or float8_e5m2 (MANTISSA 2).

    To the nearest, halves to even; infinities and what is too large become the largest number, NaN stays NaN.
    """
    BIAS: tl.constexpr = 7 if MANTISSA == 3 else 15
    LARGEST: tl.constexpr = 448.0 if MANTISSA == 3 else 57344.0
    LEAST_NORMAL: tl.constexpr = 0.015625 if MANTISSA == 3 else 6.103515625e-05  # 2^(1 - BIAS)
    MAGIC: tl.constexpr = 16384.0 if MANTISSA == 3 else 128.0  # 2^23 steps of 2^(1 - BIAS - MANTISSA)
    MAGIC_BITS: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
    SHIFT: tl.constexpr = 23 - MANTISSA
    size = tl.minimum(tl.abs(x), LARGEST)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)) >> SHIFT) - ((127 - BIAS) << MANTISSA)
    small = (size + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    code = tl.where(size < LEAST_NORMAL, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def to_int8(x, amax):  # type: ignore[no-untyped-def]
    """(int8 codes, float32 scale) of float32 x in steps of scale = amax / 127: the nearest, halves to even.

    amax, the largest magnitude, has x's dimensions.
    """
    scale = tl.maximum(amax, 1e-12) * (1.0 / 127.0)
    return nearest(x * (1.0 / scale), -127.0, 127.0).to(tl.int8), scale


@triton.jit
def nearest(x, low: tl.constexpr, high: tl.constexpr):  # type: ignore[no-untyped-def]
    """The nearest integers, int32, from low to high, of float32 x: halves to even."""
    x = tl.minimum(tl.maximum(x, low), high) + 12582912.0  # 1.5 * 2^23: the sum has no room for a fraction
    return x.to(tl.int32, bitcast=True) - 0x4B400000
