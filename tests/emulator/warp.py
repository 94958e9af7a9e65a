"""Instructions in which the 32 threads of a warp work together: matrices, shuffles, reductions. Arrays are [warps, 32]."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from tests.emulator.numbers import Array, from_fp8

WARP = 32
_lane = np.arange(WARP)
GROUP, WITHIN = _lane // 4, _lane % 4  # a thread's row, and its place in it, in most matrices
_RESULTS = np.stack([(GROUP + 8 * (i // 2)) * 8 + 2 * WITHIN + i % 2 for i in range(4)])  # of [16, 8]: [register, lane]


def spread(raw: Array, kind: str) -> Array:
    """Numbers in registers: uint32 [..] -> [.., 2 or 4], the lowest bits first."""
    if kind in ("f16", "bf16"):
        halves = spread_bits(raw)
        return halves.view("f2").astype("f4") if kind == "f16" else (halves.astype("u4") << np.uint32(16)).view("f4")
    four = np.ascontiguousarray(raw).view("u1").reshape(*raw.shape, 4)
    return (
        four.view("i1").astype("i8") if kind == "s8" else four.astype("i8") if kind == "u8" else from_fp8(four, kind).astype("f4")
    )


def spread_bits(raw: Array) -> Array:
    """uint16 [.., 2], the lower half first."""
    return np.ascontiguousarray(raw).view("u2").reshape(*raw.shape, 2)


def mma(shape: str, kind: str, a: Sequence[Array], b: Sequence[Array], c: Sequence[Array]) -> list[Array]:
    """Registers of A [16, K] @ B [K, 8] + C [16, 8]; c and the result as float32 or int32, [warps, 32] each.

    Layouts: the PTX manual's figures of m16n8k8 and k16 (two numbers a register), and k32 (four).
    """
    warps, each = a[0].shape[0], 4 if kind in ("s8", "u8", "e4m3", "e5m2") else 2
    depth = int(shape.partition("k")[2])
    total = np.dtype("f4" if kind not in ("s8", "u8") else "i8")
    left, right = fragment(a, kind, depth, total), np.zeros((warps, depth * 8), total)
    right[:, _places(len(b), each, 1)] = _numbers(b, kind)
    found = (left @ right.reshape(warps, depth, 8)).reshape(warps, -1)[:, _RESULTS]
    return [(found[:, i] + register).astype(register.dtype) for i, register in enumerate(c)]


def fragment(registers: Sequence[Array], kind: str, depth: int, total: np.dtype) -> Array:
    """A [warps, 16, depth] of its registers."""
    each = 4 if kind in ("s8", "u8", "e4m3", "e5m2") else 2
    matrix = np.zeros((registers[0].shape[0], 16 * depth), total)
    matrix[:, _places(len(registers), each, 2)] = _numbers(registers, kind)
    return matrix.reshape(-1, 16, depth)


def _numbers(registers: Sequence[Array], kind: str) -> Array:
    """[warps, numbers]: of a thread's registers one after another, thread by thread."""
    return spread(np.stack(registers, axis=-1), kind).reshape(len(registers[0]), -1)


@cache
def _places(registers: int, each: int, high: int) -> Array:
    """Where in a matrix of rows [16, depth] (``high``: 2) or of columns [depth, 8] (1) each of those numbers is."""
    i, j = np.arange(registers)[:, None], np.arange(each)
    group, within = GROUP[:, None, None], each * WITHIN[:, None, None] + 4 * each * (i // high) + j
    if high == 1:
        return (within * 8 + group).reshape(-1)
    return ((group + 8 * (i % 2)) * (4 * each * registers // 2) + within).reshape(-1)


def descriptor_places(descriptor: int, outer: int, depth: int, width: int, transposed: bool) -> Array:
    """Addresses [outer, depth] in shared memory of a matrix that a wgmma descriptor tells of, ``width`` bytes a number.

    Not transposed: what lies side by side are numbers along ``depth``; transposed: those along ``outer``. Rows of eight lie in
    atoms as wide as the swizzle; the XOR is that of the addresses themselves (PTX manual, "shared memory matrix layout").
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    span = {1: 128, 2: 64, 3: 32, 0: 16}[descriptor >> 62 & 3]
    n, k = np.arange(outer)[:, None], np.arange(depth)[None, :]
    row, along = (k, n * width) if transposed else (n, k * width)
    linear = start + row // 8 * stride + row % 8 * span + along // span * leading + along % span
    if span == 16:
        return linear
    return linear ^ (linear >> 7 & span // 16 - 1) << 4


def ldmatrix(lines: Array, count: int, transposed: bool) -> list[Array]:
    """``count`` registers from rows of eight 16-bit numbers: lines uint16 [warps, 32, 8], one of each thread's address."""
    registers = []
    for i in range(count):
        matrix = lines[:, 8 * i : 8 * i + 8]
        if transposed:
            matrix = matrix.transpose(0, 2, 1)
        low, high = matrix[:, GROUP, 2 * WITHIN], matrix[:, GROUP, 2 * WITHIN + 1]
        registers.append(low.astype("u4") | high.astype("u4") << np.uint32(16))
    return registers


def shuffle(mode: str, value: Array, by: Array, clamp: Array) -> tuple[Array, Array]:
    """(what each thread gets, whether it came from within its segment)."""
    segment, most = (clamp >> 8 & 31).astype("i8"), (clamp & 31).astype("i8")
    first, by = _lane & segment, by.astype("i8") & 31
    last = first | (most & ~segment)
    if mode == "up":
        source, inside = _lane - by, _lane - by >= last
    elif mode == "down":
        source, inside = _lane + by, _lane + by <= last
    elif mode == "bfly":
        source, inside = _lane ^ by, (_lane ^ by) <= last
    else:
        source, inside = first | (by & ~segment), (first | (by & ~segment)) <= last
    source = np.broadcast_to(np.where(inside, source, _lane), value.shape)
    return np.take_along_axis(value, source, axis=1), np.broadcast_to(inside, value.shape)


def reduce(what: str, value: Array) -> Array:
    """The same of all threads of a warp, for each."""
    functions = {"add": np.sum, "min": np.min, "max": np.max}
    if what in ("and", "or", "xor"):
        found = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[what].reduce(value, axis=1, keepdims=True)
    else:
        found = functions[what](value, axis=1, keepdims=True).astype(value.dtype)  # type: ignore[operator]
    return np.broadcast_to(found, value.shape).copy()
