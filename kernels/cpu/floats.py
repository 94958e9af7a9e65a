"""Weights of floats as torch's operators keep them: dense ones, FP8 and 4-bit floats. And what all of their products share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout import slab_rows
from kernels.reference import quantize_activations
from quant.tensor import E2M1


def total_bytes(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products are computed in: few CPUs have a float16 unit, and bfloat16 would lose three of its bits."""
    return torch.float32 if dtype == torch.float16 else dtype


def prepare(x: Tensor, perm: Tensor | None, activation: str | None) -> Tensor:
    """x in the packed order of the inputs, rounded as the checkpoint wants it."""
    if perm is not None:
        x = x.index_select(1, perm)
    return x if activation is None else quantize_activations(x.float(), activation).to(x.dtype)


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """[N, K] in the dtype of the activations."""

    weight: Tensor
    bias: Tensor | None
    N: int
    K: int

    @property
    def nbytes(self) -> int:
        return total_bytes(self.weight, self.bias)

    def product(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float16 or x.shape[0] <= 4:  # torch's float16 product has a fast path for single rows only
            return F.linear(x, self.weight, self.bias)
        out = torch.empty(x.shape[0], self.N, dtype=x.dtype)
        wide, step = x.float(), slab_rows(self.K, 4)
        for first in range(0, self.N, step):
            out[:, first : first + step] = F.linear(wide, self.weight[first : first + step].float())
        return out if self.bias is None else out.add_(self.bias)


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """float8_e4m3fn values [N, K]; expanded at every use: the bits of e4m3, shifted, are a bfloat16 times 2 ** -120."""

    values: Tensor  # int8 view [N, K]
    scales: Tensor  # float32 [N, G]
    group_size: int
    perm: Tensor | None
    bias: Tensor | None
    rounding: torch.dtype | None
    N: int
    K: int

    @property
    def nbytes(self) -> int:
        return total_bytes(self.values, self.scales, self.perm, self.bias)

    def product(self, x: Tensor) -> Tensor:
        return _by_slabs(x, self)

    def expand(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        bits = self.values[first:last].to(torch.int16)  # sign extended
        bits.bitwise_left_shift_(4).bitwise_and_(-0x8000 | 0x7F0)
        tiny, scales = bits.view(torch.bfloat16).to(dtype), self.scales[first:last] * 2.0**120
        for group, start in enumerate(range(0, self.K, self.group_size)):
            tiny[:, start : start + self.group_size] *= scales[:, group : group + 1]
        return tiny if self.rounding is None else tiny.to(self.rounding).to(dtype)


@dataclass(frozen=True, eq=False)
class Fp4Weight:
    """4-bit floats, expanded at every use. Scales that are powers of two round nothing; factors are applied in float32."""

    codes: Tensor  # uint8 [N, ceil(K / 2)], low nibble = even input
    scales: Tensor  # float8_e8m0fnu or float8_e4m3fn [N, G]
    factors: Tensor | None  # float32 [N]
    group_size: int
    perm: Tensor | None
    bias: Tensor | None
    N: int
    K: int

    @property
    def nbytes(self) -> int:
        return total_bytes(self.codes, self.scales, self.factors, self.perm, self.bias)

    def product(self, x: Tensor) -> Tensor:
        return _by_slabs(x, self, None if self.factors is None else 4)

    def expand(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        codes, scales, wide = self.codes[first:last], self.scales[first:last].float(), dtype
        if self.factors is not None:
            scales, wide = scales.mul_(self.factors[first:last, None]), torch.float32
        pairs = both_values(wide).index_select(0, codes.flatten().int()).view(len(codes), -1)
        pairs[:, : self.K] *= scales.to(wide).repeat_interleave(self.group_size, dim=1)[:, : self.K]
        return pairs[:, : self.K].to(dtype)


def _by_slabs(x: Tensor, weight: Fp8Weight | Fp4Weight, item_size: int | None = None) -> Tensor:
    """x [T, K] times a weight of which some rows are expanded at a time -> [T, N]. ``item_size``: of what they are at first."""
    dtype = compute_dtype(x.dtype)
    wide = prepare(x, weight.perm, None).to(dtype)
    out = torch.empty(x.shape[0], weight.N, dtype=dtype)
    step = slab_rows(weight.K, item_size or dtype.itemsize)
    for first in range(0, weight.N, step):
        torch.mm(wide, weight.expand(first, min(first + step, weight.N), dtype).t(), out=out[:, first : first + step])
    out = out.to(x.dtype)
    return out if weight.bias is None else out.add_(weight.bias)


@cache
def both_values(dtype: torch.dtype) -> Tensor:
    """[256, 2]: what the two codes of a byte are worth, the low one first."""
    values = torch.tensor([sign * value for sign in (1.0, -1.0) for value in E2M1], dtype=dtype)
    byte = torch.arange(256)
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=1)
