"""Random canonical weights for tests."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from quant.tensor import QuantTensor


def random_weight(
    N: int,
    K: int,
    *,
    bits: int = 4,
    group_size: int | None = None,
    asymmetric: bool = False,
    act_order: bool = False,
    activation: str | None = None,
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> QuantTensor:
    """group_size None: one scale an output. bits 0: FP8."""
    rng = torch.Generator().manual_seed(seed)
    group = group_size or K
    groups = math.ceil(K / group)
    scales = (0.01 * (0.5 + torch.rand(groups, N, generator=rng))).to(scale_dtype)
    perm = torch.randperm(K, generator=rng) if act_order else None
    if bits == 0:
        packed = torch.randn(N, K, generator=rng).mul(50).to(torch.float8_e4m3fn)
        return QuantTensor(packed, scales, None, perm, 8, group, K, N, activation)
    values = torch.randint(0, 2**bits, (N, K), generator=rng, dtype=torch.uint8)
    middle = 2 ** (bits - 1)
    zeros = torch.randint(middle // 2, middle + middle // 2, (groups, N), generator=rng, dtype=torch.uint8)
    return QuantTensor.from_values(
        values,
        scales=scales,
        bits=bits,
        group_size=group,
        zeros=zeros if asymmetric else None,
        perm=perm,
        activation=activation,
    )


def random_fp4(N: int, K: int, *, group_size: int = 32, act_order: bool = False, seed: int = 0) -> QuantTensor:
    """4-bit floats with scales of 2^-9 to 2^-5."""
    rng = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (N, (K + 1) // 2), generator=rng, dtype=torch.uint8)
    scales = torch.randint(118, 123, (math.ceil(K / group_size), N), generator=rng, dtype=torch.uint8)
    perm = torch.randperm(K, generator=rng) if act_order else None
    return QuantTensor(packed, scales.view(torch.float8_e8m0fnu), None, perm, 4, group_size, K, N)


def random_nvfp4(N: int, K: int, *, group_size: int = 16, act_order: bool = False, seed: int = 0) -> QuantTensor:
    """The same with scales of 1 to 448, and for each output a factor of its own."""
    rng, weight = torch.Generator().manual_seed(seed + 1), random_fp4(N, K, group_size=group_size, act_order=act_order, seed=seed)
    scales = torch.randint(0x38, 0x7F, weight.scales.shape, generator=rng, dtype=torch.uint8)
    factors = 1e-4 * (1 + torch.rand(N, generator=rng))
    return replace(weight, scales=scales.view(torch.float8_e4m3fn), factors=factors)
