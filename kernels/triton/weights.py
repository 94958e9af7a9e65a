"""Weights as the products in Triton want them: tiles of 128 outputs by 128 inputs, each in one stretch of memory.

::

    4 bits   words [N/128][K/128][128 outputs][32] int16: nibble j of word h is input 32 j + h of the tile, so that a word's four
             planes are four slices of consecutive inputs, and activations are read in their natural order
    8 bits   words [N/128][K/128][128 outputs][64] int16: word h has inputs h and 32 + h of the tile's first half, or of its
             second half from word 32 on; the lower input in the lower byte. Two planes, as above
    params   [groups][parts][N] int32: the scale (16 bits) and the addend of dequant.py (16 bits, above it); with scales of 32
             bits the scale and, as a second part, the addend. A group is a tile, a half or a quarter of one, or all inputs

    FP8      words as for 8 bits, uint16; params the scale in 32 bits alone, times 2^8 for float16 (dequant.py)

For activations rounded to int8 (eight.py), where groups are whole tiles, codes are signed, the middle code is 0::

    4 bits   words [N/128][K/128][128 outputs][64] uint8: input h of the tile in the lower nibble, input 64 + h in the upper one
    8 bits   words [N/128][K/128][128 outputs][128] int8
    params   as above, with the middle code less the zero point, an int16, for the addend

Outputs and inputs are padded to whole tiles with scales of zero. What has no such form (float32 activations, groups that do not
fit tiles) is kept dequantized, as a dense weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from kernels.parts import Weight
from kernels.triton.dequant import BASE, UNIT
from kernels.triton.kv import capability
from kernels.tune import AMPERE
from quant.tensor import QuantTensor

TILE = 128  # outputs, and inputs
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
SCALES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True, eq=False)
class TritonWeight:
    """``bits`` 4 or 8; 16: ``words`` is a dense [outputs, K] weight, in the dtype of the activations."""

    bits: int
    words: Tensor
    params: Tensor | None
    scale_dtype: torch.dtype | None
    slices: int  # groups in a tile; 1: a tile's inputs share a scale
    bias: Tensor | None  # float32 [outputs]
    perm: Tensor | None  # int64 [K]
    gated: bool  # outputs are [gate; up]
    outputs: int  # of the product itself
    K: int
    rounds: str | None = None  # activations are rounded to int8, with a scale for a "token" or for a "tile"'s inputs of one
    asymmetric: bool = False  # where activations are rounded: there are zero points
    fp8_rows: bool = False  # activations of many rows may be rounded to FP8, as the weight is
    gelu: bool = False  # of the gate, in place of silu

    @property
    def N(self) -> int:
        return self.outputs // 2 if self.gated else self.outputs

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernels that dequantize it take as constants."""
        assert self.params is not None and self.scale_dtype is not None
        return {
            "BITS": self.bits,
            "SLICES": self.slices,
            "WHOLE": self.params.shape[0] == 1,
            "PARTS": self.params.shape[1],
            "SCALE": SCALES[self.scale_dtype],
        }

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.words, self.params, self.bias, self.perm) if t is not None)


def pack(
    weight: QuantTensor | Tensor,
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    gated: bool = False,
    gelu: bool = False,
    activation: str = "auto",
) -> TritonWeight:
    """Lay out a weight for activations of ``dtype``, where the weight lies.

    Activations are rounded to int8 where the checkpoint asks for that, a scale a token, or ``activation`` is "int8", with one for
    128 inputs; both where groups are whole tiles. Where the checkpoint asks for FP8, those of many rows are rounded on cards that
    multiply it, unless ``activation`` is "bf16".
    """
    bias = None if bias is None else bias.float()
    if not isinstance(weight, QuantTensor):
        N, K = weight.shape
        return TritonWeight(16, weight.to(dtype).contiguous(), None, None, 1, bias, None, gated, N, K, gelu=gelu)
    rounds = rounding(weight, dtype, activation)
    if rounds is None and not fits_tiles(weight, dtype):
        # Rounded to the dtype of the scales first, as the tools that publish checkpoints do.
        dense = weight.dequantize(weight.scales.dtype).to(dtype)
        return TritonWeight(16, dense, None, None, 1, bias, None, gated, weight.N, weight.K, gelu=gelu)
    down, across = -weight.N % TILE, -weight.K % TILE
    codes = weight.packed.view(torch.uint8) if weight.kind == "fp8" else weight.unpack()
    codes = pad(codes if rounds is None else codes ^ 1 << weight.bits - 1, (0, across, 0, down))  # as signed numbers if rounded
    blocks = codes.view(codes.shape[0] // TILE, TILE, codes.shape[1] // TILE, TILE).transpose(1, 2)
    slices = 1 if weight.groups == 1 else max(1, TILE // weight.group_size)
    groups = 1 if weight.groups == 1 else blocks.shape[1] * slices
    words = as_words(blocks, weight.bits, rounds)
    if weight.kind == "fp8":
        words, params = words.view(torch.uint16), fp8_params(weight, dtype, groups, down)
    else:
        params = make_params(weight, make_addends(weight, dtype, rounds), groups, down)
    return TritonWeight(
        bits=weight.bits,
        words=words,
        params=params,
        scale_dtype=torch.float32 if weight.kind == "fp8" else weight.scales.dtype,
        slices=slices,
        bias=bias,
        perm=weight.perm,
        gated=gated,
        outputs=weight.N,
        K=weight.K,
        rounds=rounds,
        asymmetric=weight.zeros is not None,
        fp8_rows=weight.activation == "fp8-token" and weight.kind == "fp8" and activation != "bf16" and slices == 1,
        gelu=gelu,
    )


def ungated(weight: Weight) -> TritonWeight:
    assert isinstance(weight, TritonWeight)
    return replace(weight, gated=False)


def rounding(weight: QuantTensor, dtype: torch.dtype, activation: str) -> str | None:
    """What shares a scale of activations in int8, as in TritonWeight; None where they are not rounded."""
    if weight.kind != "int" or dtype not in NAMES or not (weight.groups == 1 or weight.group_size % TILE == 0):
        return None
    if 0 < capability(weight.packed.device) < AMPERE:
        return None  # the compiler has no products of integers there
    if weight.activation == "int8-token":
        return "token"
    return "tile" if activation == "int8" and fits_tiles(weight, dtype) else None


def fits_tiles(weight: QuantTensor, dtype: torch.dtype) -> bool:
    """Whether the products in tiles can take this weight."""
    fits = weight.groups == 1 or weight.group_size % TILE == 0 or weight.group_size in (32, 64)
    return dtype in NAMES and fits


def as_words(blocks: Tensor, bits: int, rounds: str | None) -> Tensor:
    """uint8 [..., 128 outputs, 128 inputs] of codes -> words of these tiles, as above."""
    if bits == 8 and rounds is not None:
        return blocks.contiguous().view(torch.int8)
    if bits == 8:
        return blocks.unflatten(-1, (2, 2, TILE // 4)).transpose(-1, -2).contiguous().view(torch.int16).flatten(-3)
    if rounds is not None:
        low, high = blocks.unflatten(-1, (2, TILE // 2)).unbind(-2)
        return (low | high << 4).contiguous()
    a, b, c, d = blocks.unflatten(-1, (4, TILE // 4)).unbind(-2)
    return torch.stack([a | b << 4, c | d << 4], dim=-1).view(torch.int16).squeeze(-1).contiguous()


def make_addends(weight: QuantTensor, dtype: torch.dtype, rounds: str | None) -> Tensor:
    """int16 [G, N], added to codes: bits of a float of ``dtype``; a number, to a signed code, where activations are rounded."""
    zeros = weight.explicit_zeros()
    if rounds is not None:
        return 2 ** (weight.bits - 1) - zeros.to(torch.int16)
    if dtype == torch.bfloat16:
        return (zeros.float() / -UNIT.value).to(dtype).view(torch.int16)
    return (-(zeros.float() + BASE.value)).to(dtype).view(torch.int16)


def fp8_params(weight: QuantTensor, dtype: torch.dtype, groups: int, down: int) -> Tensor:
    """int32 [groups, 1, N]: float32 scales. Kernels know no NaN in codes: where there is one, the scale is."""
    nan = pad(weight.packed.view(torch.uint8) & 0x7F == 0x7F, (0, weight.groups * weight.group_size - weight.K))
    nan = nan.unflatten(1, (weight.groups, weight.group_size)).any(2).t()
    scales = (weight.scales.float() * (256 if dtype == torch.float16 else 1)).masked_fill(nan, torch.nan)
    return spread(scales, weight, groups, down).view(torch.int32).unsqueeze(1)


def spread(values: Tensor, weight: QuantTensor, groups: int, down: int) -> Tensor:
    """[G, N] -> [groups, N in whole tiles]: larger groups than tiles repeated, zeros where there are no weights."""
    repeat = max(1, weight.group_size // TILE) if groups > 1 else 1
    values = values.repeat_interleave(repeat, dim=0)[:groups]
    return pad(values, (0, down, 0, groups - values.shape[0])).contiguous()


def make_params(weight: QuantTensor, addends: Tensor, groups: int, down: int) -> Tensor:
    """int32 [groups, parts, N]; scales of what only fills up tiles are zero."""
    scales, high = spread(weight.scales, weight, groups, down), spread(addends, weight, groups, down).to(torch.int32)
    if weight.scales.dtype == torch.float32:
        return torch.stack([scales.view(torch.int32), high], dim=1)
    low = scales.view(torch.int16).to(torch.int32) & 0xFFFF
    return (high << 16 | low).unsqueeze(1)
