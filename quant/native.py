"""What takes seconds of loading in torch's operators, in C++ where the kernels for CPUs are built: the same to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from quant import extension

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Type in kernels/cpu/native/types.h


def turn_awq(words: Tensor) -> Tensor | None:
    """AutoAWQ's int32 [K, N/8] -> uint8 [N, 4 ceil(K / 8)] (see quant/formats/awq.py), or None without the extension."""
    if (found := extension.found()) is None:
        return None
    (K, width), words = words.shape, words.contiguous()
    out = torch.empty(8 * width, 4 * -(-K // 8), dtype=torch.uint8)
    found[0].turn_awq(words.data_ptr(), K, width, out.data_ptr())
    return out


def round_rows(weight: Tensor, bits: int, group: int, packed: Tensor, scales: Tensor, zeros: Tensor | None) -> bool:
    """Fill codes, scales [groups, N] and zeros of ``weight`` [N, K] (see quant/rows.py); False without the extension."""
    found, number = extension.found(), FLOATS.get(weight.dtype)
    if found is None or number is None:
        return False
    (module, isa), (N, K), weight = found, weight.shape, weight.contiguous()
    to = packed.data_ptr(), scales.data_ptr(), 0 if zeros is None else zeros.data_ptr()
    module.round_rows(isa, weight.data_ptr(), number, N, K, group, bits, *to)
    return True
