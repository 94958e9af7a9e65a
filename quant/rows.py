"""Tables of many rows, from float to codes and back while they are loaded, without a second copy of the whole in float."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant import native
from quant.bits import pack_nibbles
from quant.rules import ROWS
from quant.tensor import QuantTensor

SLAB = 1 << 22  # values that are worked on at a time


def quantize_rows(weight: Tensor, bits: int) -> QuantTensor:
    """A weight [N, K] of any float dtype, each value rounded to the nearest, in 8 or 4 bits (ValueError for others).

    8: symmetric, one float32 scale an output, the row's largest magnitude over 127 (float16 would lose rows of tiny values).
    4: a float16 scale and a zero point for 32 inputs, from their extremes (0 is always among the values). A row with values that
    are not finite gives values that are not finite.
    """
    if bits not in ROWS:
        raise ValueError(f"rows are quantized to 4 or 8 bits, not {bits}")
    N, K = weight.shape
    group = min(ROWS[bits].group_size, K) if bits == 4 else K
    groups = -(-K // group)
    packed = torch.empty(N, (K + 1) // 2 if bits == 4 else K, dtype=torch.uint8)
    scales = torch.empty(groups, N, dtype=torch.float16 if bits == 4 else torch.float32)
    zeros = torch.empty(groups, N, dtype=torch.uint8) if bits == 4 else None
    if native.round_rows(weight, bits, group, packed, scales, zeros):
        return QuantTensor(packed, scales, zeros, None, bits, group, K, N)
    step = max(1, SLAB // K)
    for first in range(0, N, step):
        rows = slice(first, first + step)
        wide = weight[rows].float()
        if zeros is None:
            packed[rows], scales[0, rows] = _symmetric(wide)
        else:
            codes, scale, zero = _asymmetric(wide, group)
            packed[rows], scales[:, rows], zeros[:, rows] = pack_nibbles(codes), scale.t(), zero.t()
    return QuantTensor(packed, scales, zeros, None, bits, group, K, N)


def dequantize_rows(weight: QuantTensor, dtype: torch.dtype) -> Tensor:
    """``weight.dequantize(dtype)``, a slab at a time: what is in float32 stays small."""
    out = torch.empty(weight.N, weight.K, dtype=dtype, device=weight.packed.device)
    step = max(1, SLAB // weight.K)
    for first in range(0, weight.N, step):
        rows = torch.arange(first, min(first + step, weight.N), device=weight.packed.device)
        out[rows] = weight.select_rows(rows).dequantize(dtype)
    return out


def _symmetric(wide: Tensor) -> tuple[Tensor, Tensor]:
    """(codes uint8 [n, K], scales float32 [n]); w = (code - 128) * scale."""
    scale = wide.abs().amax(dim=1) / 127.0
    codes = (wide / _divisor(scale).unsqueeze(1)).round_().clamp_(-127, 127).nan_to_num_(0.0).add_(128)
    return codes.to(torch.uint8), scale


def _asymmetric(wide: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [n, K], scales float16 [n, G], zeros uint8 [n, G]); w = (code - zero) * scale."""
    K = wide.shape[1]
    parts = pad(wide, (0, -K % group)).unflatten(1, (-1, group))
    low, high = parts.amin(dim=2).clamp_(max=0), parts.amax(dim=2).clamp_(min=0)
    scale = ((high - low) / 15.0).half()
    divisor = _divisor(scale.float())
    zero = (-low / divisor).round_().clamp_(0, 15).nan_to_num_(0.0)
    codes = (parts / divisor.unsqueeze(2)).round_().add_(zero.unsqueeze(2)).clamp_(0, 15).nan_to_num_(0.0)
    return codes.flatten(1)[:, :K].to(torch.uint8), scale, zero.to(torch.uint8)


def _divisor(scale: Tensor) -> Tensor:
    """The scale, or 1 where it is 0 (all values are 0, or too small for it)."""
    return torch.where(scale == 0, 1.0, scale)
