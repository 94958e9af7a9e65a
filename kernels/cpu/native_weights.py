"""Weights in the native kernels' layout: QuantTensor or dense in, panels of 64 outputs out (see native/pack.h)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.cpu.memory import in_huge_pages
from kernels.layout import int8_product
from kernels.ops import Clamp
from quant.errors import CheckpointError
from quant.tensor import QuantTensor

TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.int8: 4,
    torch.float8_e5m2: 5,
    torch.uint8: 6,
    torch.float8_e8m0fnu: 7,
}  # Type in native/types.h
CODES = {torch.bfloat16: 3, torch.float16: 4, torch.float32: 5}  # Codes there, of dense weights
INT4, INT8, FP8, FP4 = 0, 1, 2, 6


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@dataclass(frozen=True, eq=False)
class NativeWeight:
    """Panels of 64 outputs, see native/pack.h. Keeps the storage that ``handle`` points into."""

    handle: Any
    codes: Tensor  # uint8
    scales: Tensor | None
    zeros: Tensor | None
    bias: Tensor | None  # float32, in panel order
    factors: Tensor | None  # likewise
    perm: Tensor | None  # int32 [K]
    N: int  # outputs of the product
    K: int
    options: dict[str, Any]  # of the handle, but for the addresses
    paired: bool = False  # its product has 64 outputs of gate, 64 of up, and so on, each half padded

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.scales, self.zeros, self.bias, self.factors, self.perm) if t is not None)


def quantizes(weight: QuantTensor, dtype: torch.dtype, activation: str) -> bool:
    """Whether activations are rounded to int8 for this weight, so that products are those of integers."""
    if weight.kind == "fp8":
        return False
    wanted = activation == "int8" or (activation == "auto" and dtype != torch.float32)
    asymmetric = weight.zeros is not None
    return wanted or int8_product(bits=weight.bits, groups=weight.groups, asymmetric=asymmetric, activation=weight.activation)


def expanded_rounding(weight: QuantTensor, dtype: torch.dtype) -> torch.dtype:
    """Weights that are expanded to float32 are rounded to the dtype of their scales, as by the tools that published them."""
    return torch.float32 if dtype == torch.bfloat16 else weight.rounding


def pack(
    module: Any,
    machine: Any,
    weight: QuantTensor | Tensor,
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    gated: bool = False,
    gelu: bool = False,
    clamp: Clamp | None = None,
    activation: str = "auto",
) -> NativeWeight:
    """Panels for activations of ``dtype``, laid out by the threads of ``machine`` (a ``Machine`` of the extension ``module``).

    CheckpointError for an FP8 weight that holds NaN.
    """
    limit, slope = clamp or (0.0, 0.0)
    gate = {"gated": gated, "gelu": gelu, "limit": limit, "slope": slope}
    if isinstance(weight, QuantTensor):
        return _pack_quantized(module, machine, weight, dtype, bias, gate, activation)
    N, K = weight.shape
    options = {"N": N, "K": K, "group": K, **gate, "codes": CODES[dtype], "scale_type": 0, "round_to": 0}
    return _lay_out(module, machine, weight.to(dtype).contiguous(), bias, options | {"quantize": False, "per_token": False})


def _pack_quantized(
    module: Any,
    machine: Any,
    weight: QuantTensor,
    dtype: torch.dtype,
    bias: Tensor | None,
    gate: dict[str, Any],
    activation: str,
) -> NativeWeight:
    scales, packed = weight.scales, weight.packed
    if weight.kind == "fp8":
        packed, scales = packed.view(torch.uint8), scales.float()
        if bool(((packed & 0x7F) == 0x7F).any()):
            raise CheckpointError("an FP8 weight holds NaN: the checkpoint is damaged")
    options = {
        "N": weight.N,
        "K": weight.K,
        "group": weight.group_size,
        **gate,
        "codes": {"fp8": FP8, "fp4": FP4}.get(weight.kind, INT4 if weight.bits == 4 else INT8),
        "scale_type": TYPES[scales.dtype],
        "round_to": TYPES[expanded_rounding(weight, dtype)],
        "quantize": quantizes(weight, dtype, activation),
        "per_token": weight.activation == "int8-token",
    }
    perm = None if weight.perm is None else weight.perm.to(torch.int32)
    zeros = None if weight.zeros is None else weight.zeros.contiguous()
    rest = {"scales": scales.contiguous(), "zeros": zeros, "factors": weight.factors, "perm": perm}
    return _lay_out(module, machine, packed.contiguous(), bias, options, **rest)


def _lay_out(
    module: Any,
    machine: Any,
    codes: Tensor,
    bias: Tensor | None,
    options: dict[str, Any],
    *,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    factors: Tensor | None = None,
    perm: Tensor | None = None,
) -> NativeWeight:
    """Copy into panels, in one pass by all threads: each touches first what it will read (that decides where it lies)."""
    shape = module.Linear(**options, data=0, scales=0, zeros=0, bias=0, factors=0, perm=0)
    outputs, gated = shape.panels * 64, options["gated"]
    to_codes = in_huge_pages(shape.code_bytes)
    to_scales = None if scales is None else torch.empty(scales.shape[0] * outputs, dtype=scales.dtype)
    to_zeros = None if zeros is None else torch.empty(zeros.shape[0] * outputs, dtype=torch.uint8)
    machine.pack(shape, address(codes), address(scales), address(zeros), address(to_codes), address(to_scales), address(to_zeros))
    to_bias, to_factors = (None if one is None else panel_order(one.float(), outputs, gated) for one in (bias, factors))
    handle = module.Linear(
        **options,
        data=address(to_codes),
        scales=address(to_scales),
        zeros=address(to_zeros),
        bias=address(to_bias),
        factors=address(to_factors),
        perm=address(perm),
    )
    N = options["N"] // 2 if gated else options["N"]
    return NativeWeight(handle, to_codes, to_scales, to_zeros, to_bias, to_factors, perm, N, options["K"], options)


def ungated(module: Any, weight: NativeWeight) -> NativeWeight:
    """Of a gated weight: the same panels, of which each gives its own outputs. Made once, and kept with it."""
    if "_ungated" not in weight.__dict__:
        plain = {"gated": False, "gelu": False, "limit": 0.0, "slope": 0.0, "N": weight.handle.panels * 64}
        parts = ("scales", "zeros", "bias", "factors", "perm")
        places = {"data": address(weight.codes)} | {name: address(getattr(weight, name)) for name in parts}
        handle = module.Linear(**weight.options | plain, **places)
        weight.__dict__["_ungated"] = replace(weight, handle=handle, N=2 * weight.N, paired=True)
    found: NativeWeight = weight.__dict__["_ungated"]
    return found


def halves_joined(product: Tensor, outputs: int) -> Tensor:
    """Of a product of paired panels gate and up, one behind the other: [T, outputs]."""
    rows = product.shape[0]
    return product.view(rows, -1, 2, 64).transpose(1, 2).reshape(rows, 2, -1)[:, :, : outputs // 2].reshape(rows, outputs)


def panel_order(each: Tensor, outputs: int, gated: bool) -> Tensor:
    """float32 [N] -> [outputs], padded with zeros; gated: 64 of the first half, 64 of the second, and so on."""
    if not gated:
        return torch.nn.functional.pad(each, (0, outputs - each.numel()))
    halves = each.view(2, -1)
    padded = torch.nn.functional.pad(halves, (0, outputs // 2 - halves.shape[1]))
    return padded.view(2, -1, 64).transpose(0, 1).reshape(-1).contiguous()
