"""Every instruction set of the native extension that runs here, and what its integer products should be to the last bits."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kernels.cpu import backend
from kernels.cpu.native_ops import NativeOps
from kernels.reference import int8_scales
from quant.tensor import QuantTensor

SEGMENT = 128  # inputs that share an activation scale, at most (native/types.h)


def instruction_sets() -> list[str]:
    """Also the tile kernels on plain loops, where the rest of their code runs."""
    found = [name for name in backend.available() if name != backend.TORCH]
    return found + (["amx_emulated"] if "avx512_bf16" in found else [])


@cache
def native_ops(isa: str, threads: int = 2) -> NativeOps:
    return NativeOps(isa, threads)


def rounded(x: Tensor, weight: QuantTensor) -> Tensor:
    """float32 x [T, K] in the packed order with int8 activations: a scale for each token and segment, or each token."""
    if weight.perm is not None:
        x = x[:, weight.perm]
    if weight.activation == "int8-token":
        scale = int8_scales(x)
        return (x / scale).round() * scale
    out = x.clone()
    for start in range(0, weight.K, weight.group_size):
        end = min(start + weight.group_size, weight.K)
        for first in range(start, end, SEGMENT):
            part = out[:, first : min(first + SEGMENT, end)]
            scale = int8_scales(part)
            part.copy_((part / scale).round() * scale)
    return out


def integer_product(x: Tensor, weight: QuantTensor) -> Tensor:
    """float64 [T, N]: rounded activations times the weight as its codes say, with nothing rounded on the way."""
    if weight.kind == "fp4":
        return rounded(x.float(), weight).double() @ weight.without_perm().dequantize().double().t()
    codes = weight.unpack().double()
    group = torch.arange(weight.K) // weight.group_size
    dense = (codes - weight.explicit_zeros().t()[:, group].double()) * weight.scales.t()[:, group].double()
    return rounded(x.float(), weight).double() @ dense.t()
