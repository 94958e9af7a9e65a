"""Bits to numbers and back, by PTX's names of types. Floats are computed with in float64 and rounded once."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

Array = np.ndarray
INTEGERS = {f"{a}{8 * n}": np.dtype(f"{b}{n}") for a, b in (("u", "u"), ("s", "i"), ("b", "u")) for n in (1, 2, 4, 8)}
FLOATS = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "f32x2": 8}
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@cache
def size(kind: str) -> int:
    """Bytes of a type; 0 for a predicate."""
    if kind == "pred":
        return 0
    return FLOATS[kind] if kind in FLOATS else INTEGERS[kind].itemsize


@cache
def storage(kind: str) -> np.dtype:
    return np.dtype(bool) if kind == "pred" else np.dtype(f"u{size(kind)}")


def decode(raw: Array, kind: str) -> Array:
    """Of a pair, [.., 2] with the lower half first."""
    if kind == "pred":
        return raw.view(bool)
    if kind in INTEGERS:
        return raw.view(INTEGERS[kind])
    if kind.endswith("x2"):
        return decode(np.ascontiguousarray(raw).view(storage(kind[:-2])).reshape(*raw.shape, 2), kind[:-2])
    if kind == "bf16":
        return (raw.astype("u4") << np.uint32(16)).view("f4").astype("f8")
    return raw.view(f"f{FLOATS[kind]}").astype("f8")


def encode(value: Array, kind: str) -> Array:
    """The bits, as unsigned integers (bools for a predicate)."""
    if kind == "pred":
        return np.asarray(value, dtype=bool)
    if kind in INTEGERS:
        return np.asarray(value).astype(INTEGERS[kind], copy=False).view(storage(kind))
    if kind.endswith("x2"):
        return np.ascontiguousarray(encode(value, kind[:-2])).view(storage(kind))[..., 0]
    if kind == "bf16":
        bits = np.asarray(value).astype("f4").view("u4")
        rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype("u2")
    return np.asarray(value).astype(f"f{FLOATS[kind]}").view(storage(kind))


def from_fp8(codes: Array, kind: str) -> Array:
    """float64 of uint8 codes."""
    table = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(FP8[kind]).double().numpy()
    return table[codes]


def to_fp8(value: Array, kind: str) -> Array:
    """uint8 codes of floats, to the nearest; what is too large becomes the largest."""
    most = torch.finfo(FP8[kind]).max
    return torch.from_numpy(np.clip(value, -most, most).astype("f4")).to(FP8[kind]).view(torch.uint8).numpy()
