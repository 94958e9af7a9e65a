"""MXFP4 (OCP's microscaling formats): 4-bit floats, E2M1, in blocks of 32 inputs that share a power of two, E8M0.

gpt-oss             blocks U8 [N, K / 32, 16], scales U8 [N, K / 32]
compressed-tensors  weight_packed U8 [N, K / 2], weight_scale U8 [N, K / 32]
"""

from __future__ import annotations

import torch

from quant.errors import CheckpointError
from quant.formats.common import Source, skip_input_scales
from quant.rules import WeightScheme
from quant.tensor import QuantTensor

BLOCK = 32
LARGEST = 252  # exponents beyond: 6 * 2 ** (253 - 127) is no finite float32, and 255 stands for NaN


def load(source: Source, name: str, scheme: WeightScheme, expect: tuple[int, int] | None = None) -> QuantTensor:
    """The weight of one module, to the bit: even inputs in low nibbles, scales in the order of blocks.

    CheckpointError for inputs that are not whole blocks, and for scales that make weights which float32 cannot hold.
    """
    skip_input_scales(source, name)
    full, scales_name = f"{name}.weight_packed", f"{name}.weight_scale"
    if source.info(full) is None:
        full, scales_name = f"{name}.blocks", f"{name}.scales"
        packed = source.take(full, dtypes=("U8",), shape=(None, None, BLOCK // 2)).flatten(1)
    else:
        packed = source.take(full, dtypes=("U8",), shape=(None, None))
    N, K = packed.shape[0], 2 * packed.shape[1]
    if K % BLOCK:
        raise CheckpointError(f"{full}: found U8{list(packed.shape)}, {K} inputs, which are not whole blocks of {BLOCK}")
    scales = source.take(scales_name, dtypes=("U8", "F8_E8M0"), shape=(N, K // BLOCK)).view(torch.uint8)
    if bool((scales > LARGEST).any()):
        raise CheckpointError(f"{scales_name}: found {int(scales.max())}, expected at most {LARGEST}: the checkpoint is damaged")
    if bool((packed.view(N, K // BLOCK, BLOCK // 2)[scales == 0] & 0x77).any()):  # signs apart
        raise CheckpointError(f"{scales_name}: found 0 (2^-127) beside weights that are not 0, expected at least 1")
    tensor = QuantTensor(packed, scales.t().contiguous().view(torch.float8_e8m0fnu), None, None, 4, BLOCK, K, N)
    tensor.check()
    return tensor
