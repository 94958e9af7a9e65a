"""Bytes of a cache to fp16 or bf16, exactly, for all 256 codes: two in each 16-bit word, in registers.

    word = code of feature 2 i | code of feature 2 i + 1 << 8    ->    (even, odd), tensors of the words' shape

FP8 needs no arithmetic in FP8. The bits of an e4m3 number, moved so that its exponent lies at the low end of a wider exponent,
are the number divided by a power of two (subnormals too), which one multiplication puts right; its one NaN (magnitude 0x7f) is
the only magnitude that reaches the sign's bit when one is added, and a byte permutation spreads that bit over the result. An e5m2
number is the upper half of an fp16 number. An int8 number with its sign bit flipped, put under the exponent of 1024, is an fp16
number, from which 1152 is subtracted; bf16 has room for seven bits only there, so the sign goes into the addend. The assembly
takes two words at a time; a conversion per element would cost several times as much.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _pairs(step: str, registers: str, *, even: str = "shl.b32 x, $2, 8;", odd: str = "mov.b32 x, $2;") -> tl.constexpr:
    """Assembly: ``step`` from x to $0 and to $1. $2 holds two words, and after ``even`` or ``odd`` the upper bytes of x's halves
    are the codes; the lower ones are rubbish.
    """
    text = " ".join(f"{select} {step.replace('OUT', out)}" for select, out in ((even, "$0"), (odd, "$1")))
    return tl.constexpr(f"{{ .reg .b32 x; {registers} {text} }}")


def _e4m3(shift: int, multiply: str) -> str:
    """Magnitude m moved down by ``shift``, the sign beside it (lop3 0xea is (a & b) | c), scaled; all ones where it is NaN."""
    return (
        f"and.b32 m, x, 0x7f007f00; add.u32 n, m, 0x01000100; prmt.b32 n, n, 0, 0xbb99; shr.u32 m, m, {shift}; "
        f"lop3.b32 m, x, 0x80008000, m, 0xea; {multiply} or.b32 OUT, m, n;"
    )


_INTEGERS = ".reg .b32 m, n, s, t;"
_HALVES = ".reg .b16 h, i; .reg .f32 f, g;"
_TO_BF16 = "mov.b32 {h, i}, x; cvt.f32.f16 f, h; cvt.f32.f16 g, i; cvt.rn.bf16x2.f32 OUT, g, f;"  # a pair of fp16, by fp32
_LOW_BYTES = {"even": "prmt.b32 x, $2, 0, 0x4420;", "odd": "prmt.b32 x, $2, 0, 0x4431;"}  # two codes in the lower half of x

E4M3_FP16 = _pairs(_e4m3(1, "mul.f16x2 m, m, s;"), _INTEGERS + " mov.b32 s, 0x5c005c00;")  # 2^8
# 2^120, and -0 as the addend, which leaves -0 alone: bf16 is multiplied by itself on sm_90+ only.
E4M3_BF16 = _pairs(_e4m3(4, "fma.rn.bf16x2 m, m, s, t;"), _INTEGERS + " mov.b32 s, 0x7b807b80; mov.b32 t, 0x80008000;")
E4M3_FP16_SM89 = _pairs("mov.b32 {h, i}, x; cvt.rn.f16x2.e4m3x2 OUT, h;", _HALVES, **_LOW_BYTES)
E4M3_BF16_SM89 = _pairs("mov.b32 {h, i}, x; cvt.rn.f16x2.e4m3x2 x, h; " + _TO_BF16, _HALVES, **_LOW_BYTES)
E5M2_FP16 = _pairs("and.b32 OUT, x, 0xff00ff00;", "")
E5M2_BF16 = _pairs("and.b32 x, x, 0xff00ff00; " + _TO_BF16, _HALVES)
_LOW = {"even": "mov.b32 x, $2;", "odd": "shr.u32 x, $2, 8;"}  # codes in the lower bytes of the halves
INT8_FP16 = _pairs(  # lop3 0x6a is (a & b) ^ c
    "lop3.b32 m, x, 0x00ff00ff, s, 0x6a; sub.f16x2 OUT, m, s;", _INTEGERS + " mov.b32 s, 0x64806480;", **_LOW
)
INT8_BF16 = _pairs(  # 128 + seven bits, minus 128 or 256
    "lop3.b32 m, x, 0x007f007f, 0x43004300, 0xea; lop3.b32 n, x, 0x00800080, 0xc300c300, 0xea; fma.rn.bf16x2 OUT, m, s, n;",
    _INTEGERS + " mov.b32 s, 0x3f803f80;",
    **_LOW,
)


@triton.jit
def widen(words, DTYPE: tl.constexpr, CODE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """(even, odd) features in DTYPE of int16 words of any shape.

    CODE: "e4m3", "e5m2" or "int8". ASM: 0 for none; 1 for any card with DTYPE's arithmetic; 2 for one that converts FP8 (sm_89+).
    """
    if ASM == 0 or tl.float32 == DTYPE:
        wide = words.to(tl.int32)
        return _plain(wide & 0xFF, DTYPE, CODE), _plain((wide >> 8) & 0xFF, DTYPE, CODE)
    elif tl.float16 == DTYPE:
        if CODE == "int8":
            return _assembly(words, DTYPE, INT8_FP16)
        elif CODE == "e5m2":
            return _assembly(words, DTYPE, E5M2_FP16)
        elif ASM == 2:
            return _assembly(words, DTYPE, E4M3_FP16_SM89)
        else:
            return _assembly(words, DTYPE, E4M3_FP16)
    else:
        if CODE == "int8":
            return _assembly(words, DTYPE, INT8_BF16)
        elif CODE == "e5m2":
            return _assembly(words, DTYPE, E5M2_BF16)
        elif ASM == 2:
            return _assembly(words, DTYPE, E4M3_BF16_SM89)
        else:
            return _assembly(words, DTYPE, E4M3_BF16)


@triton.jit
def _assembly(words, DTYPE: tl.constexpr, TEXT: tl.constexpr):  # type: ignore[no-untyped-def]
    if tl.float16 == DTYPE:  # a tuple of types has to be written out
        return tl.inline_asm_elementwise(TEXT, "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(TEXT, "=r,=r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)


@triton.jit
def _plain(code, DTYPE: tl.constexpr, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """code int32, 0..255."""
    if CODE == "int8":
        return ((code ^ 0x80) - 0x80).to(tl.float32).to(DTYPE)
    elif CODE == "e5m2":
        return (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(DTYPE)
    else:
        magnitude = code & 0x7F
        bits = ((code & 0x80) << 24) | (magnitude << 20)
        value = bits.to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0  # 2^120
        return tl.where(magnitude == 0x7F, float("nan"), value).to(DTYPE)
