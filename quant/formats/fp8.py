"""FP8 (e4m3) weights [N, K] with scales per weight, per output, per group (MXFP8: of 32) or per block, and quant_method fp8's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant.errors import CheckpointError
from quant.formats.common import Source, group_columns, skip_input_scales
from quant.rules import WeightScheme
from quant.tensor import QuantTensor

SCALES = ("F16", "BF16", "F32", "F8_E8M0", "U8")  # the last one as E8M0, too


def load(source: Source, name: str, scheme: WeightScheme, expect: tuple[int, int] | None = None) -> QuantTensor:
    """The weight of one module; its scale is ``weight_scale_inv`` (blocks of DeepSeek and Qwen) or ``weight_scale``."""
    weight = source.take(f"{name}.weight", dtypes=("F8_E4M3",), shape=expect or (None, None))
    skip_input_scales(source, name)
    if scheme.symmetric:
        source.skip(f"{name}.weight_zero_point")
    N, K = weight.shape
    full = f"{name}.weight_scale_inv" if source.info(f"{name}.weight_scale_inv") else f"{name}.weight_scale"
    scale = source.take(full, dtypes=SCALES)
    if scale.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        scale = scale.view(torch.float8_e8m0fnu).float().bfloat16()  # a power of two
    if scheme.block and scale.dim() == 4:  # as ModelOpt reduced the weight: [blocks, 1, blocks, 1]
        scale = scale.flatten(2).flatten(0, 1)
    scales, size = expand_scales(full, scale, scheme, N, K)
    tensor = QuantTensor(weight, scales, None, None, 8, size, K, N, scheme.activation)
    tensor.check()
    return tensor


def expand_scales(name: str, scale: Tensor, scheme: WeightScheme, N: int, K: int) -> tuple[Tensor, int]:
    """(scales [G, N], group size) from one number, [N], [N, 1], [N, G] or, for blocks, [ceil(N / rows), ceil(K / columns)].

    Integer zero points have the same shapes and go through here as well.
    """
    if scheme.block:
        rows, columns = scheme.block
        blocks = (math.ceil(N / rows), math.ceil(K / columns))
        if tuple(scale.shape) != blocks:
            raise CheckpointError(f"{name}: found {list(scale.shape)}, expected {list(blocks)} for blocks of {rows} x {columns}")
        return scale.repeat_interleave(rows, dim=0)[:N].t().contiguous(), min(columns, K)
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(N, 1)
    elif scale.dim() == 1:
        scale = scale.unsqueeze(1)
    if scale.dim() != 2 or scale.shape[0] != N:
        raise CheckpointError(f"{name}: found {list(scale.shape)}, expected one number, [{N}, 1] or [{N}, groups]")
    return scale.t().contiguous(), group_columns(name, scheme.group_size, K, scale.shape[1])
