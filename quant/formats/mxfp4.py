"""MXFP4 (OCP's microscaling formats): 4-bit floats, E2M1, in blocks of 32 inputs that share a power of two, E8M0."""

from __future__ import annotations

import torch

from quant.errors import CheckpointError
from quant.formats.common import Source
from quant.rules import WeightScheme
from quant.tensor import QuantTensor

BLOCK = 32
LARGEST = 252  # exponents beyond: 6 * 2 ** (253 - 127) is no finite float32, and 255 stands for NaN


def load(source: Source, name: str, scheme: WeightScheme, expect: tuple[int, int] | None = None) -> QuantTensor:
    """The weight of one module: ``blocks`` uint8 [N, K / 32, 16], even inputs in low nibbles, and ``scales`` uint8 [N, K / 32].

    CheckpointError for scales that make weights which float32 cannot hold.
    """
    blocks = source.take(f"{name}.blocks", dtypes=("U8",), shape=(None, None, BLOCK // 2))
    N, groups, _ = blocks.shape
    scales = source.take(f"{name}.scales", dtypes=("U8", "F8_E8M0"), shape=(N, groups)).view(torch.uint8)
    if bool((scales > LARGEST).any()):
        raise CheckpointError(f"{name}.scales: found {int(scales.max())}, expected at most {LARGEST}: the checkpoint is damaged")
    if bool((blocks[scales == 0] & 0x77).any()):  # signs apart
        raise CheckpointError(f"{name}.scales: found 0 (2^-127) beside weights that are not 0, expected at least 1")
    packed, exponents = blocks.view(N, -1), scales.t().contiguous().view(torch.float8_e8m0fnu)
    tensor = QuantTensor(packed, exponents, None, None, 4, BLOCK, BLOCK * groups, N)
    tensor.check()
    return tensor
