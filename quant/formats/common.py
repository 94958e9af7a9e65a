"""What the readers of the published formats share."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from quant.errors import CheckpointError
from quant.headers import TensorInfo
from quant.tensor import QuantTensor

SCALES = ("F16", "BF16", "F32")
INPUT_SCALES = (
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "input_scale_ub",
    "act_scale",
    "activation_scale",
    "output_scale",
    "output_zero_point",
)


class Source(Protocol):
    """Where a module's tensors come from: quant.checkpoint.Checkpoint, or a test."""

    def info(self, name: str) -> TensorInfo | None:
        """The header of a tensor, or None where there is none."""

    def take(self, name: str, *, dtypes: tuple[str, ...], shape: tuple[int | None, ...] | None = None) -> Tensor:
        """Read a tensor; CheckpointError with found and expected where it is missing or of another dtype or shape (None: any)."""

    def skip(self, name: str) -> None:
        """Knowingly leave a tensor unread, if there is one."""


def skip_input_scales(source: Source, name: str) -> None:
    """Published activation scales are not applied; see WeightScheme.activation."""
    for suffix in INPUT_SCALES:
        source.skip(f"{name}.{suffix}")


def group_columns(name: str, group_size: int, K: int, groups: int) -> int:
    """The canonical group size (at most K) for a published one; CheckpointError where it does not make ``groups`` groups."""
    size = K if group_size == -1 or group_size > K else group_size
    if groups != math.ceil(K / size):
        raise CheckpointError(
            f"{name}: {K} inputs in groups of {group_size} make {math.ceil(K / size)} groups, but the scales have {groups}; "
            "the group_size of the config does not fit this weight"
        )
    return size


def widen(values: Tensor, zeros: Tensor | None, bits: int) -> tuple[Tensor, int]:
    """Codes of 2 to 8 bits as (codes, 4 or 8). Without zeros the mid point moves from the old width's to the new one's."""
    wide = 4 if bits <= 4 else 8
    if wide != bits and zeros is None:
        values = values + (2 ** (wide - 1) - 2 ** (bits - 1))
    return values, wide


def regroup(g_idx: Tensor, group_size: int) -> tuple[Tensor | None, int, Tensor | None]:
    """(perm, group size, rows) for the group g_idx[k] of every input column k.

    Sorting the columns by group (stably) makes groups contiguous. Where every group then has ``group_size`` columns, rows is
    None: the scales stand as they are. Groups of uneven sizes are cut into pieces as long as the greatest common divisor of the
    borders; piece i then takes row rows[i] of the published scales and zeros, which is exact for any g_idx.
    """
    K = g_idx.numel()
    if torch.equal(g_idx, torch.arange(K) // group_size):
        return None, group_size, None
    order = torch.sort(g_idx, stable=True)
    perm = None if torch.equal(order.indices, torch.arange(K)) else order.indices
    if torch.equal(order.values, torch.arange(K) // group_size):
        return perm, group_size, None
    borders = (order.values[1:] != order.values[:-1]).nonzero().flatten() + 1
    size = math.gcd(*borders.tolist()) or K
    return perm, size, order.values[::size]


def from_nibbles(
    packed: Tensor, K: int, *, scales: Tensor, zeros: Tensor | None, group_size: int, activation: str | None = None
) -> QuantTensor:
    """4-bit codes whose published bytes [N, >= ceil(K / 2)] are already the canonical ones: no unpacking."""
    packed = packed[:, : (K + 1) // 2].contiguous()
    if K % 2:
        packed[:, -1] &= 15
    tensor = QuantTensor(packed, scales, zeros, None, 4, group_size, K, packed.shape[0], activation)
    tensor.check()
    return tensor
