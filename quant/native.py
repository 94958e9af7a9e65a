"""What takes seconds of loading in torch's operators, in C++ where the kernels for CPUs are built: the same to the bit."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from kernels.cpu import backend

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Type in kernels/cpu/native/types.h


def extension() -> ModuleType | None:
    """None where torch's operators compute everything."""
    return None if backend.name() == backend.TORCH else backend.native()


def turn_awq(words: Tensor) -> Tensor | None:
    """AutoAWQ's int32 [K, N/8] -> uint8 [N, 4 ceil(K / 8)] (see quant/formats/awq.py), or None without the extension."""
    if (module := extension()) is None:
        return None
    (K, width), words = words.shape, words.contiguous()
    out = torch.empty(8 * width, 4 * -(-K // 8), dtype=torch.uint8)
    module.turn_awq(words.data_ptr(), K, width, out.data_ptr())
    return out


def round_rows(weight: Tensor, bits: int, group: int, packed: Tensor, scales: Tensor, zeros: Tensor | None) -> bool:
    """Fill codes, scales [groups, N] and zeros of ``weight`` [N, K] (see quant/rows.py); False without the extension."""
    module, number = extension(), FLOATS.get(weight.dtype)
    if module is None or number is None:
        return False
    (N, K), weight = weight.shape, weight.contiguous()
    to = packed.data_ptr(), scales.data_ptr(), 0 if zeros is None else zeros.data_ptr()
    module.round_rows(backend.name(), weight.data_ptr(), number, N, K, group, bits, *to)
    return True
