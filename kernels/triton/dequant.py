"""Packed codes to float operands of a product, exactly: by integer tricks in assembly, or in plain Triton where that cannot run.

A float whose exponent is such that the last bit of its mantissa counts 1 holds a small integer in that mantissa: OR the code in,
and subtract what the exponent stands for together with the zero point, in one addition. In float16 the base is 1024 (0x6400)::

    4 bits   a word  | d | c | b | a |     four planes (a, b, c, d); b and d are shifted by 4, so their sum is scaled by 1/16
    8 bits   a word  |   b   |   a   |     two planes (a, b)

A mantissa of bfloat16 is too short for that. But its smallest numbers are evenly spaced: the eight lowest bits alone, the last
one of the exponent among them, are an integer times 2^-133. Times 2^127 (2^123 for b and d) that is a 64th of the integer; the
same instruction adds the zero point. It keeps subnormal numbers (PTX ISA, "Half Precision Floating Point Instructions: fma").

``addend`` is -(1024 + zero) in float16, -zero / 64 in bfloat16, where the planes are (code - zero) / 64, UNIT; the sums are
multiplied by it. Every step is exact: codes less zero points are integers of at most 8 bits and a sign.

A byte of FP8 (e4m3) is a float already. Its sign stays at the top; the rest, moved so that its exponent is at the low end of the
wider exponent, is the number divided by a power of two, 2^8 in float16 and 2^120 in bfloat16. In float16 that is left to the
group's scale; in bfloat16, where products would underflow, it is multiplied back. There are no NaN: see weights.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.widen import widen

BASE, UNIT = tl.constexpr(1024), tl.constexpr(64)

_NIBBLES_FP16 = tl.constexpr("""{
    .reg .b32 shifted, sixteenth;
    mov.b32 sixteenth, 0x2c002c00;
    shr.u32 shifted, $4, 8;
    lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
    lop3.b32 $2, shifted, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 $3, shifted, 0x00f000f0, 0x64006400, 0xea;
    add.f16x2 $0, $0, $5;
    fma.rn.f16x2 $1, $1, sixteenth, $6;
    add.f16x2 $2, $2, $5;
    fma.rn.f16x2 $3, $3, sixteenth, $6;
}""")
_NIBBLES_BF16 = tl.constexpr("""{
    .reg .b32 upper, low, high;
    mov.b32 low, 0x7f007f00;
    mov.b32 high, 0x7d007d00;
    shr.u32 upper, $4, 8;
    and.b32 $0, $4, 0x000f000f;
    and.b32 $1, $4, 0x00f000f0;
    and.b32 $2, upper, 0x000f000f;
    and.b32 $3, upper, 0x00f000f0;
    fma.rn.bf16x2 $0, $0, low, $5;
    fma.rn.bf16x2 $1, $1, high, $5;
    fma.rn.bf16x2 $2, $2, low, $5;
    fma.rn.bf16x2 $3, $3, high, $5;
}""")
_BYTES_FP16 = tl.constexpr("""{
    .reg .b32 base;
    mov.b32 base, 0x64646464;
    prmt.b32 $0, $2, base, 0x4240;
    prmt.b32 $1, $2, base, 0x4341;
    add.f16x2 $0, $0, $3;
    add.f16x2 $1, $1, $3;
}""")
_BYTES_BF16 = tl.constexpr("""{
    .reg .b32 large;
    mov.b32 large, 0x7f007f00;
    and.b32 $0, $2, 0x00ff00ff;
    prmt.b32 $1, $2, 0, 0x4341;
    fma.rn.bf16x2 $0, $0, large, $3;
    fma.rn.bf16x2 $1, $1, large, $3;
}""")

# Halves of the code (lower byte) and its sign eight times; shifted, all but sign, exponent and mantissa masked out.
_FP8_FP16 = tl.constexpr("""{
    .reg .b32 upper;
    prmt.b32 $0, $2, 0, 0xa280;
    shr.u32 upper, $2, 1;
    shl.b32 $0, $0, 7;
    and.b32 upper, upper, 0x3f803f80;
    and.b32 $0, $0, 0xbf80bf80;
    lop3.b32 $1, $2, 0x80008000, upper, 0xea;
}""")
# -0 for the addend leaves -0 alone; bfloat16 is multiplied by itself on sm_90+ only.
_FP8_BF16 = tl.constexpr("""{
    .reg .b32 upper, large, none;
    mov.b32 large, 0x7b807b80;
    mov.b32 none, 0x80008000;
    prmt.b32 $0, $2, 0, 0xa280;
    shr.u32 upper, $2, 4;
    shl.b32 $0, $0, 4;
    and.b32 upper, upper, 0x07f007f0;
    and.b32 $0, $0, 0x87f087f0;
    lop3.b32 $1, $2, 0x80008000, upper, 0xea;
    fma.rn.bf16x2 $0, $0, large, none;
    fma.rn.bf16x2 $1, $1, large, none;
}""")


@triton.jit
def nibbles(words, addend, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four planes q - zero (in bfloat16 a 64th), in the dtype of ``addend``, of int16 ``words``; both of one shape."""
    if ASM:  # outputs are written before all inputs are read: registers of their own
        if addend.dtype == tl.float16:
            return tl.inline_asm_elementwise(
                _NIBBLES_FP16,
                "=&r,=&r,=&r,=&r,r,r,r",
                [words, addend, addend + 960.0],  # -(64 + zero): the base is a sixteenth there
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            return tl.inline_asm_elementwise(
                _NIBBLES_BF16,
                "=&r,=&r,=&r,=&r,r,r",
                [words, addend],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
    else:
        wide = words.to(tl.int32)
        a, b = _exact(wide & 15, addend), _exact((wide >> 4) & 15, addend)
        return a, b, _exact((wide >> 8) & 15, addend), _exact((wide >> 12) & 15, addend)


@triton.jit
def _exact(code, addend):  # type: ignore[no-untyped-def]
    value, more = code.to(tl.float32), addend.to(tl.float32)
    if addend.dtype == tl.bfloat16:
        return (value * (1.0 / UNIT) + more).to(addend.dtype)
    else:  # float32 has no base
        return (value + (more + BASE if addend.dtype == tl.float16 else more)).to(addend.dtype)


@triton.jit
def whole(sums, DTYPE: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of products with planes in DTYPE, or scales of these, times what the planes lack. WORDS: the dtype of the words."""
    if tl.bfloat16 == DTYPE and tl.uint16 != WORDS:
        return sums * UNIT
    else:
        return sums


@triton.jit
def byte_pairs(words, addend, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two planes q - zero (in bfloat16 a 64th), in the dtype of ``addend``, of int16 ``words``; both of one shape.

    uint16 words are pairs of FP8.
    """
    if words.dtype == tl.uint16:
        return _fp8_pairs(words, addend.dtype, ASM)
    elif ASM:
        if addend.dtype == tl.float16:
            return tl.inline_asm_elementwise(
                _BYTES_FP16, "=&r,=&r,r,r", [words, addend], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                _BYTES_BF16, "=&r,=&r,r,r", [words, addend], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
            )
    else:
        wide = words.to(tl.int32)
        return _exact(wide & 255, addend), _exact((wide >> 8) & 255, addend)


@triton.jit
def _fp8_pairs(words, DTYPE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """(lower, upper) bytes of uint16 ``words`` in DTYPE: the numbers of FP8 e4m3, in float16 a 256th of them."""
    if ASM:
        if tl.float16 == DTYPE:
            return tl.inline_asm_elementwise(
                _FP8_FP16, "=&r,=&r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                _FP8_BF16, "=&r,=&r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
            )
    else:
        part = 0.00390625 if tl.float16 == DTYPE else 1.0
        low, high = widen(words.to(tl.int16, bitcast=True), tl.float32, "e4m3", 0)
        return (low * part).to(DTYPE), (high * part).to(DTYPE)


@triton.jit
def scaled(plane, scale, SCALE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """plane times float32 ``scale``, which can be broadcast to it, in the plane's dtype: rounded once.

    SCALE: what the scale was stored as. Where that is not the plane's dtype, it is taken as the sum of two numbers of it.
    """
    if ASM:
        high = scale.to(plane.dtype)
        none = tl.full(plane.shape, -0.0, plane.dtype)  # leaves -0 alone
        if plane.dtype == SCALE:
            return _fma(plane, tl.broadcast_to(high, plane.shape), none)
        else:
            low = (scale - high.to(tl.float32)).to(plane.dtype)
            rest = _fma(plane, tl.broadcast_to(low, plane.shape), none)
            return _fma(plane, tl.broadcast_to(high, plane.shape), rest)
    else:
        return (plane.to(tl.float32) * scale).to(plane.dtype)


@triton.jit
def _fma(a, b, c):  # type: ignore[no-untyped-def]
    """a * b + c of two bytes each, two at a time; bfloat16 has no product by itself before sm_90."""
    if a.dtype == tl.float16:
        return tl.inline_asm_elementwise("fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], a.dtype, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], a.dtype, is_pure=True, pack=2)
