"""Packed weights of the CPU and their products, one class per layout (those of floats: kernels.cpu.floats). Each keeps a single
copy of its weight.

Few rows go to torch's int4 kernel, which reads the packed codes; many rows are multiplied with slabs of the expanded weight, in
a workspace of fixed size. docs/benchmarks/cpu-torch-ops.md has the measurements behind FEW_ROWS.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.cpu.floats import DenseWeight, Fp4Weight, Fp8Weight, compute_dtype, prepare, total_bytes
from kernels.cpu.nibbles import Expander, int4_block, int4_product, pack_affine, pack_codes
from kernels.layout import BLOCK_N, UNITS, int8_product, padded, scale_unit, slab_rows
from kernels.ops import Clamp, Weight
from kernels.reference import clamped_mul, int8_scales
from quant.errors import CheckpointError
from quant.tensor import QuantTensor

FEW_ROWS = 64


def published_rounding(scales: Tensor, dtype: torch.dtype) -> torch.dtype | None:
    """Weights expanded in float32 are rounded to the dtype of their scales: the weights that the publisher's tool measured."""
    return scales.dtype if compute_dtype(dtype) == torch.float32 and scales.dtype != torch.float32 else None


@dataclass(frozen=True, eq=False)
class NibbleWeight:
    """4- or 8-bit codes as nibbles (see kernels.cpu.nibbles) with (scale, offset) pairs."""

    codes: Tensor  # uint8 [Npad / B, planes * columns, B / 2]
    affine: Tensor  # bfloat16 or float32 [planes * units, Npad, 2]
    perm: Tensor | None  # int32 [K]
    bias: Tensor | None
    planes: int
    unit: int
    activation: str | None
    rounding: torch.dtype | None  # of expanded weights, see published_rounding
    few_rows: int  # up to this many go to the int4 kernel; 0 where it cannot take this weight
    N: int
    K: int

    @property
    def nbytes(self) -> int:
        return total_bytes(self.codes, self.affine, self.perm, self.bias)

    def product(self, x: Tensor) -> Tensor:
        x = prepare(x, self.perm, self.activation)
        if x.shape[0] <= self.few_rows:
            twice = torch.cat((x, x), dim=1) if self.planes == 2 else x.contiguous()
            out = int4_product(twice, self.codes.view(self.affine.shape[1], -1), self.unit, self.affine)[:, : self.N]
        else:
            out = self._expanded(x.to(self.affine.dtype)).to(x.dtype)
        return out.contiguous() if self.bias is None else out + self.bias

    def _expanded(self, x: Tensor) -> Tensor:
        columns = self.codes.shape[1] // self.planes
        step = min(slab_rows(columns, x.dtype.itemsize), padded(self.N, BLOCK_N))
        expander = Expander(self.codes, self.affine, planes=self.planes, unit=self.unit, slab=step, rounding=self.rounding)
        out = torch.empty(x.shape[0], self.N, dtype=x.dtype)
        for first in range(0, self.N, step):
            slab = expander.expand(first, min(first + step, padded(self.N, BLOCK_N)))
            used = min(slab.shape[1], self.N - first)
            torch.mm(x, slab[: self.K, :used], out=out[:, first : first + used])
        return out


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """int8 [N, K] with one scale an output, multiplied as integers with activations rounded to int8 per token."""

    codes: Tensor
    scales: Tensor  # float32 [N]
    perm: Tensor | None
    bias: Tensor | None
    N: int
    K: int

    @property
    def nbytes(self) -> int:
        return total_bytes(self.codes, self.scales, self.perm, self.bias)

    def product(self, x: Tensor) -> Tensor:
        wide = prepare(x, self.perm, None).float()
        scale = int8_scales(wide)
        codes = (wide / scale).round_().clamp_(-128, 127).to(torch.int8)
        out = (int8_dot(codes, self.codes).float() * scale * self.scales).to(x.dtype)
        return out if self.bias is None else out.add_(self.bias)


def int8_dot(x: Tensor, weight: Tensor) -> Tensor:
    """int8 x [T, K] times int8 weight [N, K] -> int32 [T, N]."""
    if int8_product_is_exact():
        return torch._int_mm(x, weight.t())
    out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.int32)
    wide, step = x.float(), slab_rows(weight.shape[1], 4)
    for first in range(0, weight.shape[0], step):
        out[:, first : first + step] = wide @ weight[first : first + step].float().t()
    return out


@cache
def int8_product_is_exact() -> bool:
    """Whether torch's int8 product has no saturating step, as AVX2 code without VNNI may have: tried on extreme values."""
    signs = torch.randint(0, 2, (33, 200), generator=torch.Generator().manual_seed(0), dtype=torch.int8) * 2 - 1
    x, weight = signs[:5] * 127, signs * 127
    x[0], weight[0] = -128, -128
    exact = x.int() @ weight.int().t()
    return all(torch.equal(torch._int_mm(x[:rows], weight.t()), exact[:rows]) for rows in (1, 5))


PlainWeight = DenseWeight | NibbleWeight | Fp8Weight | Fp4Weight | Int8Weight


@dataclass(frozen=True, eq=False)
class GatedWeight:
    """Outputs [gate; up] of which the product is silu(gate) * up, or gelu(gate) * up, or as Clamp says."""

    both: PlainWeight
    gelu: bool
    clamp: Clamp | None = None

    @property
    def N(self) -> int:
        return self.both.N // 2

    @property
    def K(self) -> int:
        return self.both.K

    @property
    def nbytes(self) -> int:
        return self.both.nbytes

    def product(self, x: Tensor) -> Tensor:
        found = self.both.product(x)
        if self.clamp is not None:
            return clamped_mul(found, self.clamp)
        return (gelu_mul if self.gelu else silu_mul)(found)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


CpuWeight = PlainWeight | GatedWeight


def pack(
    weight: QuantTensor | Tensor,
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    gated: bool = False,
    gelu: bool = False,
    clamp: Clamp | None = None,
    activation: str = "auto",
) -> CpuWeight:
    """The layout for activations of ``dtype``, which are never rounded unless the checkpoint says so.

    CheckpointError for an FP8 weight that holds NaN.
    """
    packed = _pack(weight, dtype, None if bias is None else bias.to(dtype))
    return GatedWeight(packed, gelu, clamp) if gated else packed


def _pack(weight: QuantTensor | Tensor, dtype: torch.dtype, bias: Tensor | None) -> PlainWeight:
    if not isinstance(weight, QuantTensor):
        return DenseWeight(weight.to(dtype).contiguous(), bias, *weight.shape)
    perm = None if weight.perm is None else weight.perm.to(torch.int32)
    if weight.kind == "fp8":
        return _pack_fp8(weight, perm, bias, published_rounding(weight.scales, dtype))
    if weight.kind == "fp4":
        scales = weight.scales.view(torch.uint8).t().contiguous().view(weight.scales.dtype)
        return Fp4Weight(weight.packed, scales, weight.factors, weight.group_size, perm, bias, weight.N, weight.K)
    asymmetric = weight.zeros is not None
    if int8_product(bits=weight.bits, groups=weight.groups, asymmetric=asymmetric, activation=weight.activation):
        codes = (weight.packed - 128).view(torch.int8)  # wraps around
        return Int8Weight(codes, weight.scales[0].float(), perm, bias, weight.N, weight.K)
    name = str(dtype).removeprefix("torch.")
    unit, stored = scale_unit(weight.K, weight.group_size, name), compute_dtype(dtype)
    planes = weight.bits // 4  # an 8-bit weight costs the int4 kernel twice as much a row
    suits = stored == torch.bfloat16 and unit in UNITS and weight.K % unit == 0 and int4_block() is not None
    codes = pack_codes(weight, int4_block() or BLOCK_N, padded(weight.K, unit))
    return NibbleWeight(
        codes=codes,
        affine=pack_affine(weight, unit, stored),
        perm=perm,
        bias=bias,
        planes=planes,
        unit=unit,
        activation=weight.activation,
        rounding=published_rounding(weight.scales, dtype),
        few_rows=FEW_ROWS // planes if suits else 0,
        N=weight.N,
        K=weight.K,
    )


def _pack_fp8(weight: QuantTensor, perm: Tensor | None, bias: Tensor | None, rounding: torch.dtype | None) -> Fp8Weight:
    values = weight.packed.view(torch.int8)
    if bool(((values & 0x7F) == 0x7F).any()):
        raise CheckpointError("an FP8 weight holds NaN: the checkpoint is damaged")
    scales = weight.scales.t().float().contiguous()
    return Fp8Weight(values, scales, weight.group_size, perm, bias, rounding, weight.N, weight.K)


def ungated(weight: Weight) -> Weight:
    assert isinstance(weight, GatedWeight)
    return weight.both


def matmul(x: Tensor, weight: Weight) -> Tensor:
    if not isinstance(weight, CpuWeight):
        raise TypeError(f"a {type(weight).__name__} was packed for other operators than the CPU's")
    if x.shape[0] == 0:
        return x.new_empty(0, weight.N)
    return weight.product(x)
