"""What an instruction computes, by its name: the types of its operands and its result, and a function of decoded arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import NamedTuple

import numpy as np

from tests.emulator.numbers import FLOATS, FP8, INTEGERS, Array, from_fp8, size, to_fp8

MODIFIERS = {"rn", "ftz", "approx", "full", "lo", "hi", "wide", "NaN", "rzi", "rni", "rmi", "rpi", "sat", "satfinite"}
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative, "abs": np.abs, "not": np.invert, "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt,
    "rcp": lambda a: 1 / a, "rsqrt": lambda a: 1 / np.sqrt(a), "mov": lambda a: a, "cvta": lambda a: a,
}  # fmt: skip
BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


class Meaning(NamedTuple):
    inputs: Sequence[str]
    output: str
    compute: Callable[..., Array]


def meaning(name: Sequence[str], operands: int = 2, table: int = 0) -> Meaning:
    """KeyError for an instruction that is not known. ``operands``: of those that may have more or fewer; ``table``: lop3's."""
    if name[0] == "lop3":
        return Meaning(["b32", "b32", "b32"], "b32", _logic(table))
    found, modifiers = _meaning(name, operands), set(name)
    if name[-1] == "f32" and modifiers & {"approx", "full"}:
        found = found._replace(compute=_nearly(found.compute))
    return found._replace(compute=_flushed(found.compute)) if "ftz" in modifiers else found


def _flushed(compute: Callable[..., Array]) -> Callable[..., Array]:
    """Numbers of float32 that are smaller than the least normal one are 0, before and after."""

    def flush(value: Array) -> Array:
        return np.where(np.abs(value) < 2.0**-126, value * 0.0, value)

    return lambda *values: flush(compute(*map(flush, values)))


def _nearly(compute: Callable[..., Array]) -> Callable[..., Array]:
    """As inexact as a card may be where it is said to be approximate: a place of float32 above or below, or neither, as the exact
    result has it, so that equal inputs give equal results. Powers of two are exact, and so is a quotient by one.
    """

    def nearly(*values: Array) -> Array:
        found = np.asarray(compute(*values), dtype="f8")
        bits = found.view("u8") if found.ndim else found.reshape(1).view("u8")[0]
        turned = ((bits >> np.uint64(24) ^ bits >> np.uint64(37)) % np.uint64(3)).astype("f8") - 1
        exact = np.frexp(found)[0] == 0.5
        if len(values) == 2:
            exact = np.abs(np.frexp(values[1])[0]) == 0.5
        return np.where(exact, found, found * (1 + turned * 2.0**-23))

    return nearly


def _meaning(name: Sequence[str], operands: int) -> Meaning:
    what, kind = name[0], name[-1]
    modifiers = set(name[1:-1])
    if what in ("setp", "cvt", "selp", "shl", "shr", "bfe", "bfi", "popc", "clz", "prmt"):
        return SPECIAL[what](name)
    if kind in ("f16", "bf16") and name[-2] == "f32" and what in ("add", "sub", "fma"):  # sums of another type
        inputs = [kind, kind, "f32"] if what == "fma" else [kind, "f32"]
        return Meaning(inputs, "f32", (lambda a, b, c: a * b + c) if what == "fma" else BINARY[what])
    unknown = modifiers - MODIFIERS - {"to", "global"}
    if unknown:
        raise KeyError(f"{'.'.join(name)}: {unknown}")
    if what in UNARY:
        return Meaning([kind], kind, UNARY[what])
    if what in BINARY:
        return Meaning([kind] * 2, kind, BINARY[what])
    if what in ("min", "max"):
        two = _extreme(what, kind, "NaN" in modifiers)
        return Meaning([kind] * operands, kind, lambda *values: reduce(two, values))
    if what in ("div", "rem"):
        return Meaning([kind] * 2, kind, np.divide if kind in FLOATS else _divide if what == "div" else np.fmod)
    if what in ("mul", "mad", "fma"):
        return _multiply(what, kind, modifiers)
    raise KeyError(".".join(name))


def _multiply(what: str, kind: str, modifiers: set[str]) -> Meaning:
    if kind in FLOATS:
        if what == "mul":
            return Meaning([kind] * 2, kind, np.multiply)
        return Meaning([kind] * 3, kind, lambda a, b, c: a * b + c)
    bits = 8 * size(kind)
    wide = f"{kind[0]}{2 * bits}" if "wide" in modifiers else kind

    def product(a: Array, b: Array) -> Array:
        if "hi" in modifiers:
            return (a.astype(object) * b.astype(object) >> bits).astype(INTEGERS[kind])
        return a.astype(INTEGERS[wide]) * b.astype(INTEGERS[wide])

    if what == "mul":
        return Meaning([kind] * 2, wide, product)
    return Meaning([kind, kind, wide], wide, lambda a, b, c: product(a, b) + c)


def _extreme(what: str, kind: str, with_nan: bool) -> Callable[[Array, Array], Array]:
    if kind in FLOATS and not with_nan:
        return np.fmin if what == "min" else np.fmax  # the number, where the other is none
    return np.minimum if what == "min" else np.maximum


def _divide(a: Array, b: Array) -> Array:
    """Towards zero."""
    found = a // b
    return found + ((found < 0) & (found * b != a)).astype(found.dtype)


def _setp(name: Sequence[str]) -> Meaning:
    compare, kind = name[1], name[-1]
    if set(name[2:-1]) - {"ftz"}:
        raise KeyError(".".join(name))
    if compare in ("nan", "num"):
        return Meaning([kind] * 2, "pred", lambda a, b: (np.isnan(a) | np.isnan(b)) == (compare == "nan"))
    if kind in FLOATS and compare.endswith("u") and compare not in COMPARISONS:  # true where one is no number
        ordered = COMPARISONS[compare[:-1]]
        return Meaning([kind] * 2, "pred", lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b))
    if kind in FLOATS and compare == "ne":
        return Meaning([kind] * 2, "pred", lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b))
    return Meaning([kind] * 2, "pred", COMPARISONS[compare])


def _cvt(name: Sequence[str]) -> Meaning:
    to, kind = name[-2], name[-1]
    modifiers = set(name[1:-2])
    if modifiers - MODIFIERS:
        raise KeyError(".".join(name))
    if to in ("f16x2", "bf16x2") and kind == "f32":
        return Meaning(["f32", "f32"], to, lambda high, low: np.stack(np.broadcast_arrays(low, high), axis=-1))
    if kind[:4] in FP8 and to == "f16x2":
        return Meaning(["b16"], to, lambda a: from_fp8(np.stack([a & 255, a >> 8], axis=-1).astype("u1"), kind[:4]))
    if to[:4] in FP8 and kind == "f32":
        return Meaning(["f32", "f32"], "b16", lambda high, low: to_fp8(low, to[:4]) | to_fp8(high, to[:4]).astype("u2") << 8)
    if to in INTEGERS and kind in FLOATS:
        rounding = np.rint if "rni" in modifiers else np.floor if "rmi" in modifiers else np.trunc
        return Meaning([kind], to, lambda a: _saturate(rounding(a), INTEGERS[to]))
    if to in INTEGERS:
        if "sat" in modifiers:
            raise KeyError(".".join(name))
        return Meaning([kind], to, lambda a: a.astype(INTEGERS[to]))
    if kind in INTEGERS:
        return Meaning([kind], to, lambda a: a.astype("f8"))
    whole = np.rint if "rni" in modifiers else None
    return Meaning([kind], to, lambda a: a if whole is None else whole(a))


def _saturate(value: Array, kind: np.dtype) -> Array:
    limits = np.iinfo(kind)
    clipped = np.where(np.isnan(value), 0, np.clip(value, float(limits.min), float(limits.max)))
    found = clipped.astype(kind)
    return np.where(clipped >= float(limits.max), limits.max, found).astype(kind)


def _shift(name: Sequence[str]) -> Meaning:
    kind = name[-1]
    bits = 8 * size(kind)

    def shift(a: Array, by: Array) -> Array:
        if by.ndim == 0 and by < bits:
            by = by.astype(a.dtype)
            return a << by if name[0] == "shl" else a >> by
        far, by = by >= bits, np.minimum(by, bits - 1).astype(a.dtype)
        if name[0] == "shl":
            return np.where(far, np.zeros((), a.dtype), a << by)
        return np.where(far, a >> np.array(bits - 1, a.dtype) if a.dtype.kind == "i" else np.zeros((), a.dtype), a >> by)

    return Meaning([kind, "u32"], kind, shift)


def _field(name: Sequence[str]) -> Meaning:
    """Bits of a from a place on, so many; with the sign of the last for signed ones."""
    kind = name[-1]
    bits = 8 * size(kind)

    def extract(a: Array, place: Array, count: Array) -> Array:
        place, count = place & 255, count & 255
        left = np.maximum(bits - count.astype("i8") - place, 0).astype(a.dtype)
        moved = (a << left) >> np.minimum(left.astype("i8") + place, bits - 1).astype(a.dtype)
        return np.where(count == 0, np.zeros((), a.dtype), moved)

    return Meaning([kind, "u32", "u32"], kind, extract)


def _insert(name: Sequence[str]) -> Meaning:
    kind = name[-1]

    def insert(a: Array, b: Array, place: Array, count: Array) -> Array:
        chosen = ((np.uint64(1) << count.astype("u8")) - np.uint64(1)) << place.astype("u8")
        return ((b & ~chosen) | ((a.astype("u8") << place.astype("u8")) & chosen)).astype(b.dtype)

    return Meaning([kind, kind, "u32", "u32"], kind, insert)


@cache
def _logic(table: int) -> Callable[[Array, Array, Array], Array]:
    """A function of three bits, whose value for them (as a number, the first one highest) is that bit of ``table``."""
    bits, two = (0xF0, 0xCC, 0xAA), [BINARY["and"], BINARY["or"], BINARY["xor"]]
    for i, j, k in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        for inner in two:
            for outer in two:
                if int(outer(inner(bits[i], bits[j]), bits[k])) == table:
                    return lambda *given, i=i, j=j, k=k, inner=inner, outer=outer: outer(inner(given[i], given[j]), given[k])

    def lop3(a: Array, b: Array, c: Array) -> Array:
        found = np.zeros((), "u4")
        for chosen in _terms(table):
            factors = [value for value, bit in ((a, 4), (b, 2), (c, 1)) if chosen & bit]
            found = found ^ (reduce(np.bitwise_and, factors) if factors else np.uint32(0xFFFFFFFF))
        return found

    return lop3


def _terms(table: int) -> list[int]:
    """A function of three bits, whose value for them (as a number) is that bit of ``table``, as the XOR of products of them."""
    return [term for term in range(8) if sum(table >> i & 1 for i in range(8) if i & term == i) % 2]


def _prmt(name: Sequence[str]) -> Meaning:
    def prmt(a: Array, b: Array, selector: Array) -> Array:
        if selector.ndim == 0 and not int(selector) & 0x8888:
            eight = np.stack(np.broadcast_arrays(a, b), axis=-1).view("u1")
            return np.ascontiguousarray(eight[..., [int(selector) >> 4 * i & 7 for i in range(4)]]).view("u4")[..., 0]
        both, found = a.astype("u8") | b.astype("u8") << np.uint64(32), np.zeros((), "u8")
        for i in range(4):
            code = (selector >> np.uint32(4 * i)).astype("u8")
            byte = both >> ((code & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
            byte = np.where(code & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
            found = found | byte << np.uint64(8 * i)
        return found.astype("u4")

    return Meaning(["b32", "b32", "b32"], "b32", prmt)


def _count(name: Sequence[str]) -> Meaning:
    kind = name[-1]

    if name[0] == "clz":
        raise KeyError(".".join(name))
    return Meaning([kind], "u32", lambda a: np.bitwise_count(a.view(f"u{a.dtype.itemsize}")).astype("u4"))


SPECIAL: dict[str, Callable[[Sequence[str]], Meaning]] = {
    "setp": _setp,
    "cvt": _cvt,
    "selp": lambda name: Meaning([name[-1], name[-1], "pred"], name[-1], lambda a, b, p: np.where(p, a, b)),
    "shl": _shift,
    "shr": _shift,
    "bfe": _field,
    "bfi": _insert,
    "popc": _count,
    "clz": _count,
    "prmt": _prmt,
}
