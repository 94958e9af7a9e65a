"""The one canonical form of a quantized weight. Every published format becomes this; every kernel starts from this."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.bits import pack_nibbles, unpack_nibbles

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; the fourth bit is the sign


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A weight of N outputs and K inputs: w[n, perm[j]] = (q[n, j] - zero[j // group_size, n]) * scale[j // group_size, n].

    2- and 3-bit weights are kept in 4 bits, 5- to 7-bit weights in 8. Of 4-bit floats (kind fp4) the value of a code is E2M1's,
    without a zero point, and scales are powers of two (MXFP4), or E4M3's, multiplied by a factor for each output (NVFP4).
    """

    packed: Tensor  # 4 bits: uint8 [N, ceil(K / 2)], low nibble = even j; 8 bits: uint8 [N, K]; fp8: float8_e4m3fn [N, K]
    scales: Tensor  # [G, N], G = ceil(K / group_size), in the published dtype; fp4: float8_e8m0fnu, with factors float8_e4m3fn
    zeros: Tensor | None  # uint8 [G, N]; None: 2 ** (bits - 1) everywhere (fp8, fp4: no offset)
    perm: Tensor | None  # int64 [K]: column j of packed is the original input column perm[j]; None: the identity
    bits: int  # 4 or 8
    group_size: int  # columns per group; the last group may be shorter; K: one scale per output
    K: int
    N: int
    activation: str | None = None  # how the checkpoint wants the activations quantized; see quant.scheme.WeightScheme
    factors: Tensor | None = None  # float32 [N], beside scales in float8_e4m3fn alone

    @staticmethod
    def from_values(
        values: Tensor,
        *,
        scales: Tensor,
        bits: int,
        group_size: int,
        zeros: Tensor | None = None,
        perm: Tensor | None = None,
        activation: str | None = None,
    ) -> QuantTensor:
        """From unpacked codes uint8 [N, K] (columns in packed order); bits is 4 or 8. Raises ValueError on what does not fit."""
        N, K = values.shape
        packed = pack_nibbles(values) if bits == 4 else values.contiguous()
        tensor = QuantTensor(packed, scales, zeros, perm, bits, group_size, K, N, activation)
        tensor.check()
        return tensor

    @property
    def kind(self) -> str:
        """ "int", "fp8" or "fp4"."""
        if self.scales.dtype in (torch.float8_e8m0fnu, torch.float8_e4m3fn):
            return "fp4"
        return "fp8" if self.packed.dtype == torch.float8_e4m3fn else "int"

    @property
    def rounding(self) -> torch.dtype:
        """What the tools that publish such weights dequantize them to: the dtype of the scales. Cards multiply fp4 as it is."""
        return torch.float32 if self.kind == "fp4" else self.scales.dtype

    @property
    def groups(self) -> int:
        return self.scales.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.packed, self.scales, self.zeros, self.perm, self.factors) if t is not None)

    def on(self, device: torch.device) -> QuantTensor:
        """The same weight in the device's memory."""
        zeros, perm, factors = (None if t is None else t.to(device) for t in (self.zeros, self.perm, self.factors))
        scales = self.scales.to(device)
        return replace(self, packed=self.packed.to(device), scales=scales, zeros=zeros, perm=perm, factors=factors)

    def unpack(self) -> Tensor:
        """The codes, uint8 [N, K], columns in packed order. ValueError for fp8, whose values are not codes."""
        if self.kind == "fp8":
            raise ValueError("an fp8 weight has no integer codes to unpack")
        return unpack_nibbles(self.packed, self.K) if self.bits == 4 else self.packed

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] in original column order, computed in float32 and rounded once."""
        if self.kind == "fp8":
            weight = self.packed.float()
        elif self.kind == "fp4":
            values = torch.tensor(E2M1, device=self.packed.device)
            weight = torch.cat((values, -values))[self.unpack().int()]
        else:
            weight = self.unpack().float()
            if self.zeros is None:
                weight -= 2 ** (self.bits - 1)
        scales = self.scales.float() if self.factors is None else self.scales.float() * self.factors
        whole = self.K // self.group_size
        parts = [(slice(whole), weight[:, : whole * self.group_size].unflatten(1, (whole, self.group_size)))]
        if self.K % self.group_size:
            parts.append((slice(whole, None), weight[:, whole * self.group_size :].unsqueeze(1)))
        for groups, part in parts:  # [N, groups, columns of each]
            if self.zeros is not None:
                part -= self.zeros[groups].t().unsqueeze(2)
            part *= scales[groups].t().unsqueeze(2)
        if self.perm is not None:
            original = torch.empty_like(weight)
            original[:, self.perm] = weight
            weight = original
        return weight.to(dtype)

    def check(self) -> None:
        """Raise ValueError unless every shape and dtype is as the fields say."""
        if self.bits not in (4, 8) or not 0 < self.group_size <= max(self.K, 1):
            raise ValueError(f"bits {self.bits} and group size {self.group_size} do not make a weight of {self.K} inputs")
        shape = (self.N, (self.K + 1) // 2 if self.bits == 4 else self.K)
        kinds = (torch.uint8,) if self.bits == 4 else (torch.uint8, torch.float8_e4m3fn)
        if self.packed.dtype not in kinds or tuple(self.packed.shape) != shape:
            raise ValueError(f"packed is {self.packed.dtype} {list(self.packed.shape)}, not {list(shape)} for {self.bits} bits")
        groups = (math.ceil(self.K / self.group_size), self.N)
        fits = self.bits == 4 if self.kind == "fp4" else self.scales.dtype in SCALE_DTYPES
        if not fits or tuple(self.scales.shape) != groups:
            raise ValueError(f"scales are {self.scales.dtype} {list(self.scales.shape)}, not a float dtype {list(groups)}")
        factors = None if self.factors is None else (self.factors.dtype, tuple(self.factors.shape))
        if factors != ((torch.float32, (self.N,)) if self.scales.dtype == torch.float8_e4m3fn else None):
            raise ValueError(f"factors are {factors}: float32 [{self.N}] beside scales in float8_e4m3fn, and else none")
        zeros = self.zeros
        if zeros is not None and (self.kind != "int" or zeros.dtype != torch.uint8 or tuple(zeros.shape) != groups):
            raise ValueError(f"zeros of a {self.kind} weight are {zeros.dtype} {list(zeros.shape)}, not uint8 {list(groups)}")
        if self.perm is not None and not torch.equal(self.perm.sort().values, torch.arange(self.K, device=self.perm.device)):
            raise ValueError(f"perm is not a permutation of {self.K} columns")

    @staticmethod
    def can_cat(tensors: Sequence[QuantTensor]) -> bool:
        """Whether ``cat`` would take these."""
        return _difference(tensors) is None

    @staticmethod
    def cat(tensors: Sequence[QuantTensor]) -> QuantTensor:
        """One weight with the outputs of all, in order. ValueError where kind, bits, K, group, activation or perm differ."""
        difference = _difference(tensors)
        if difference is not None:
            raise ValueError(f"weights with different {difference} cannot be joined")
        if len(tensors) == 1:
            return tensors[0]
        zeros = None
        if any(t.zeros is not None for t in tensors):
            zeros = torch.cat([t.explicit_zeros() for t in tensors], dim=1)
        packed = torch.cat([_plain(t.packed) for t in tensors]).view(tensors[0].packed.dtype)
        scales = torch.cat([_plain(t.scales) for t in tensors], dim=1).view(tensors[0].scales.dtype)
        whole = replace(tensors[0], packed=packed, scales=scales, zeros=zeros, N=sum(t.N for t in tensors))
        if whole.factors is None:
            return whole
        return replace(whole, factors=torch.cat([t.factors for t in tensors if t.factors is not None]))

    def explicit_zeros(self) -> Tensor:
        """The zero points uint8 [G, N], written out where the weight is symmetric."""
        if self.zeros is not None:
            return self.zeros
        return torch.full(self.scales.shape, 2 ** (self.bits - 1), dtype=torch.uint8, device=self.scales.device)

    def split(self, sizes: Sequence[int]) -> list[QuantTensor]:
        """Weights with the next ``sizes[i]`` outputs each; the sizes sum up to N."""
        if sum(sizes) != self.N:
            raise ValueError(f"cannot split {self.N} outputs into {list(sizes)}")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [self._rows(slice(start, start + size), size) for start, size in zip(starts, sizes, strict=True)]

    def select_rows(self, index: Tensor) -> QuantTensor:
        """The weight whose output i is this one's output index[i] (int64)."""
        return self._rows(index, index.numel())

    def _rows(self, rows: slice | Tensor, count: int) -> QuantTensor:
        packed = _plain(self.packed)[rows].contiguous().view(self.packed.dtype)
        scales = _plain(self.scales)[:, rows].contiguous().view(self.scales.dtype)
        zeros = None if self.zeros is None else self.zeros[:, rows].contiguous()
        factors = None if self.factors is None else self.factors[rows].contiguous()
        return replace(self, packed=packed, scales=scales, zeros=zeros, factors=factors, N=count)

    def without_perm(self) -> QuantTensor:
        """The same codes for a caller that feeds activations already permuted: its input j is the original input perm[j]."""
        return replace(self, perm=None)


def _plain(tensor: Tensor) -> Tensor:
    """Float8 as bytes: whether torch can index and join it depends on its version and device."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _difference(tensors: Sequence[QuantTensor]) -> str | None:
    first = tensors[0]
    for other in tensors[1:]:
        for field in ("kind", "bits", "K", "group_size", "activation"):
            if getattr(first, field) != getattr(other, field):
                return field
        if first.scales.dtype != other.scales.dtype:
            return "scale dtype"
        if (first.perm is None) != (other.perm is None):
            return "perm"
        if first.perm is not None and other.perm is not None and not torch.equal(first.perm, other.perm):
            return "perm"
    return None
