"""The values that a quantized weight can have, and rounding to them: what all methods share, and by itself the method "rtn"."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.formats.common import widen
from quant.tensor import QuantTensor

SMALLEST = 1e-5  # of scales, as AutoAWQ and AutoGPTQ have it: a group of zeros must not divide by one


@dataclass(frozen=True)
class Grid:
    """``bits`` 2 to 8; ``group_size`` inputs share a scale and a zero point, -1: all of an output."""

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype = torch.float16  # that scales are published in: codes are made for the rounded ones
    least_zero: int = 0  # the smallest zero point that the format can say

    @property
    def top(self) -> int:
        """The largest code; the smallest is 0."""
        return 2**self.bits - 1

    def size(self, K: int) -> int:
        """Inputs in a group of a weight of K inputs."""
        return K if self.group_size == -1 or self.group_size > K else self.group_size

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """(scales, zero points) float32 for groups whose smallest and largest values are these; 0 is always among the values.

        Symmetric: scale = 2 * largest magnitude / (2 ** bits - 1), zero point 2 ** (bits - 1), as AutoGPTQ and
        compressed-tensors have it. Else scale = (high - low) / (2 ** bits - 1), zero point = round(-low / scale).
        """
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scales = self._published((high - low) / self.top)
        if self.symmetric:
            return scales, torch.full_like(scales, 2 ** (self.bits - 1))
        return scales, (-low / scales).round_().clamp_(self.least_zero, self.top)

    def _published(self, scales: Tensor) -> Tensor:
        """As they will be read: rounded, and never 0."""
        return scales.clamp(min=SMALLEST).to(self.scale_dtype).float()

    def codes(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """Float32 whole numbers 0 .. top, nearest to ``weight``; scales and zeros broadcast."""
        return (weight / scales).round_().add_(zeros).clamp_(0, self.top)

    def rounded(self, weight: Tensor, shrink: Tensor | float = 1.0) -> Tensor:
        """``weight`` float32 [N, K] as it would be read back, when each group's extremes are first shrunk by ``shrink``.

        ``shrink`` broadcasts with [N, G].
        """
        parts = self.parts(weight)
        scales, zeros = (one.unsqueeze(2) for one in self.fit(parts.amin(2) * shrink, parts.amax(2) * shrink))
        return ((self.codes(parts, scales, zeros) - zeros) * scales).flatten(1)[:, : weight.shape[1]]

    def parts(self, weight: Tensor) -> Tensor:
        """[N, K] -> [N, G, group size], filled up with zeros."""
        size = self.size(weight.shape[1])
        return pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))


@dataclass(frozen=True)
class Quantized:
    """What a method makes of a weight: w[n, perm[j]] = (codes[n, j] - zeros[j // group_size, n]) * scales[j // group_size, n]."""

    codes: Tensor  # uint8 [N, K], below 2 ** bits
    scales: Tensor  # [G, N], in the dtype in which they are published
    zeros: Tensor  # uint8 [G, N]
    grid: Grid
    perm: Tensor | None = None  # int64 [K]

    def cpu(self) -> Quantized:
        """The same in the host's memory."""
        perm = None if self.perm is None else self.perm.cpu()
        return replace(self, codes=self.codes.cpu(), scales=self.scales.cpu(), zeros=self.zeros.cpu(), perm=perm)

    def tensor(self) -> QuantTensor:
        """In the canonical form, as it will be loaded."""
        K = self.codes.shape[1]
        values, wide = widen(self.codes, None if self.grid.symmetric else self.zeros, self.grid.bits)
        zeros = None if self.grid.symmetric else self.zeros
        return QuantTensor.from_values(
            values, scales=self.scales, zeros=zeros, perm=self.perm, bits=wide, group_size=self.grid.size(K)
        )

    def dequantize(self) -> Tensor:
        """Float32 [N, K], in the order of the original columns."""
        return self.tensor().dequantize()


def round_to_nearest(weight: Tensor, grid: Grid, shrink: Tensor | float = 1.0) -> Quantized:
    """A weight [N, K] of any float dtype, each value to the nearest that its group's extremes allow.

    ``shrink``, broadcasting with [N, G], moves the extremes inwards first: what lies beyond is cut off.
    """
    weight = weight.float()
    parts = grid.parts(weight)
    scales, zeros = grid.fit(parts.amin(2) * shrink, parts.amax(2) * shrink)
    codes = grid.codes(parts, scales.unsqueeze(2), zeros.unsqueeze(2)).flatten(1)[:, : weight.shape[1]]
    return Quantized(
        codes.to(torch.uint8).contiguous(),
        scales.t().to(grid.scale_dtype).contiguous(),
        zeros.t().to(torch.uint8).contiguous(),
        grid,
    )
