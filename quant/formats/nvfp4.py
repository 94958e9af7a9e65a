"""NVFP4: 4-bit floats, E2M1, in groups of 16 inputs that share a scale, E4M3, which one number of the whole weight multiplies.

compressed-tensors  weight_packed U8 [N, K / 2], weight_scale F8_E4M3 [N, K / 16], weight_global_scale F32, which divides
ModelOpt            weight U8 [N, K / 2], weight_scale F8_E4M3 [N, K / 16], weight_scale_2 F32, which multiplies
"""

from __future__ import annotations

import torch

from quant.errors import CheckpointError
from quant.formats.common import Source, skip_input_scales
from quant.rules import WeightScheme
from quant.tensor import QuantTensor

GROUP = 16
LARGEST = 0x7E  # of E4M3: 448. What is beyond stands for NaN, or is negative
MOST = 6 * 448  # of a weight, before that number is applied


def load(source: Source, name: str, scheme: WeightScheme, expect: tuple[int, int] | None = None) -> QuantTensor:
    """The weight of one module: even inputs in low nibbles, scales in the order of groups (not as cards multiply them).

    Exactly as ModelOpt has it; of compressed-tensors 1 / weight_global_scale is rounded to float32. CheckpointError for scales
    that are not positive numbers.
    """
    skip_input_scales(source, name)
    divides = source.info(f"{name}.weight_packed") is not None
    packed = source.take(f"{name}.weight_packed" if divides else f"{name}.weight", dtypes=("U8",), shape=(None, None))
    N, groups = packed.shape[0], -(-2 * packed.shape[1] // GROUP)
    scale = source.take(f"{name}.weight_scale", dtypes=("F8_E4M3",), shape=(N, groups))
    if scale.numel() and int(scale.view(torch.uint8).max()) > LARGEST:
        raise CheckpointError(f"{name}.weight_scale: some of its scales are negative, or no numbers: the checkpoint is damaged")
    full = f"{name}.weight_global_scale" if divides else f"{name}.weight_scale_2"
    whole = source.take(full, dtypes=("F32",))
    factor = 1 / whole if divides else whole
    if whole.numel() != 1 or not bool((factor > 0) & (factor * MOST).isfinite()):
        raise CheckpointError(f"{full}: found {whole.flatten()[:4].tolist()}, expected one positive number")
    scales = scale.view(torch.uint8).t().contiguous().view(torch.float8_e4m3fn)
    factors = factor.reshape(1).repeat(N)
    tensor = QuantTensor(packed, scales, None, None, 4, GROUP, 2 * packed.shape[1], N, factors=factors)
    tensor.check()
    return tensor
