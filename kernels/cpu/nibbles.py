"""4-bit codes in blocks: one copy that torch's int4 kernel multiplies directly and that is quick to expand for large products.

codes [N / B, K, B / 2]: byte i of a (block, k) holds output ``i`` of the block in its low nibble and output ``B / 2 + i`` in its
high one. That is what torch packs for its int4 kernel (B = 64 with AVX-512, 32 with AVX2); a probe at first use checks it, layout
and arithmetic, on known values. Where it fails, the blocks stay and the kernel is not called.

An 8-bit weight is two 4-bit planes one after another along K: q = 16 * high + low.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kernels.layout import BLOCK_N, padded
from quant.tensor import QuantTensor

LOW = 0x0F0F0F0F0F0F0F0F  # the low nibbles of eight bytes
PACK_ROWS = 4096  # outputs packed at a time: bounds the memory that loading takes


def pack_blocks(codes: Tensor, block: int) -> Tensor:
    """uint8 [N, K] below 16, N a multiple of ``block`` -> uint8 [N / block, K, block / 2]."""
    halves = codes.view(codes.shape[0] // block, 2, block // 2, codes.shape[1])
    return (halves[:, 0] | (halves[:, 1] << 4)).transpose(1, 2).contiguous()


@cache
def int4_block() -> int | None:
    """The block size of torch's int4 kernel on this machine, or None where it is missing or does something else."""
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (2 * BLOCK_N, 64), generator=rng, dtype=torch.uint8)
    x = torch.randint(-4, 5, (3, 64), generator=rng).bfloat16()
    affine = torch.randint(1, 3, (2, 2 * BLOCK_N, 2), generator=rng).bfloat16()
    scale, offset = (affine[..., i].float().t().repeat_interleave(32, dim=1) for i in (0, 1))
    exact = x.float() @ ((codes.float() - 8) * scale + offset).t()
    try:
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        for block in (64, 32):
            ours = pack_blocks(codes, block).view(codes.shape[0], -1)
            if torch.equal(ours, theirs) and torch.equal(int4_product(x, ours, 32, affine), exact.bfloat16()):
                return block
    except (AttributeError, NotImplementedError, RuntimeError):
        return None  # a build without the kernel: products go through expanded weights
    return None


def int4_product(x: Tensor, codes: Tensor, unit: int, affine: Tensor) -> Tensor:
    """bfloat16 x [T, K] times the packed weight -> [T, N]; w = (code - 8) * scale + offset, pairs in affine [K / unit, N, 2]."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, unit, affine)


def pack_codes(weight: QuantTensor, block: int, columns: int) -> Tensor:
    """The codes of ``weight`` as [Npad / block, planes * columns, block / 2], zeros beyond its N and K; high plane first."""
    planes, rows = weight.bits // 4, padded(weight.N, BLOCK_N)
    out = torch.empty(rows // block, planes * columns, block // 2, dtype=torch.uint8)
    for first in range(0, rows, PACK_ROWS):
        last = min(first + PACK_ROWS, rows)
        codes = weight.select_rows(torch.arange(first, min(last, weight.N))).unpack()
        codes = torch.nn.functional.pad(codes, (0, columns - weight.K, 0, last - first - codes.shape[0]))
        for plane in range(planes):
            part = codes if planes == 1 else (codes >> 4, codes & 15)[plane]
            out[first // block : last // block, plane * columns : (plane + 1) * columns] = pack_blocks(part, block)
    return out


def pack_affine(weight: QuantTensor, unit: int, dtype: torch.dtype) -> Tensor:
    """(scale, offset) of every (plane, unit, output): dtype [planes * units, Npad, 2], so that w = (nibble - 8) * scale + offset.

    For 8 bits the high plane carries 16 * scale and no offset: (16 h + l - z) s = (h - 8) 16 s + (l - 8) s + (136 - z) s.
    """
    rows = padded(weight.N, BLOCK_N)
    scale = weight.scales.to(dtype).float()
    middle = 8 if weight.bits == 4 else 136
    zeros = 2 ** (weight.bits - 1) if weight.zeros is None else weight.zeros.float()
    pairs = torch.stack((scale, (middle - zeros) * scale), dim=-1)
    if weight.bits == 8:
        pairs = torch.stack((torch.stack((scale * 16, torch.zeros_like(scale)), dim=-1), pairs))
    else:
        pairs = pairs.unsqueeze(0)
    pairs = pairs.repeat_interleave(weight.group_size // unit, dim=1)[:, : -(-weight.K // unit)]
    pairs = torch.nn.functional.pad(pairs, (0, 0, 0, rows - weight.N))
    return pairs.flatten(0, 1).to(dtype).contiguous()


class Expander:
    """Expands N-slabs of a blocked weight into one workspace of fixed size, transposed: [columns, slab]."""

    def __init__(self, codes: Tensor, affine: Tensor, *, planes: int, unit: int, slab: int, rounding: torch.dtype | None) -> None:
        self.codes, self.affine, self.planes, self.unit, self.rounding = codes, affine, planes, unit, rounding
        self.columns, self.half = codes.shape[1] // planes, codes.shape[2]
        self.wide = torch.empty(self.columns * slab, dtype=affine.dtype)
        self.bytes = torch.empty(self.columns * slab, dtype=torch.uint8)

    def expand(self, first: int, last: int) -> Tensor:
        """Weights of outputs first .. last - 1 (whole blocks), computed with one rounding: [columns, last - first]."""
        block, columns = 2 * self.half, self.columns
        slab = last - first
        # Eight codes at a time: [planes * columns, blocks, B / 16] words to [columns, blocks, 2 halves, B / 16] words.
        words = self.codes.view(torch.int64)[first // block : last // block].transpose(0, 1)
        values = self.bytes[: columns * slab]
        out = values.view(torch.int64).view(columns, slab // block, 2, self.half // 8)
        torch.bitwise_and(words[-columns:], LOW, out=out[:, :, 0])
        torch.bitwise_and(words[-columns:] >> 4, LOW, out=out[:, :, 1])
        affine = self.affine[:, first:last]
        if self.planes == 2:
            out[:, :, 0] |= (words[:columns] & LOW) << 4
            out[:, :, 1] |= words[:columns] & ~LOW
            affine = affine[affine.shape[0] // 2 :]
        signed = values.sub_(8 if self.planes == 1 else 128).view(torch.int8)  # wraps around: code - middle
        wide = self.wide[: columns * slab].view(columns // self.unit, self.unit, slab)
        wide.copy_(signed.view(wide.shape))
        scale, offset = affine[:, None, :, 0].contiguous(), affine[:, None, :, 1].contiguous()
        if self.planes == 2:
            offset -= 8 * scale  # the pairs are about the nibble's middle, the bytes about 128
        torch.addcmul(offset, wide, scale, out=wide)
        if self.rounding is not None:
            wide.copy_(wide.to(self.rounding))
        return wide.view(columns, slab)
