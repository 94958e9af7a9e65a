"""4-bit products of others, with random weights: torch's ``_weight_int4pack_mm``, and gemlite where it is installed.

Each gives (a function from x to a call for Bench.time, weights for that call), no weights where there is no such product here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[Any], Tensor]
Product = tuple[Callable[[Tensor], Call], list[Any]]


def tinygemm(N: int, K: int, group: int, count: int, device: torch.device) -> Product:
    """In bfloat16, whatever x is."""

    def times(x: Tensor) -> Call:
        x = x.to(torch.bfloat16)
        return lambda weight: torch.ops.aten._weight_int4pack_mm(x, weight[0], group, weight[1])

    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=device)
    scales = torch.rand(K // group, N, 2, device=device).to(torch.bfloat16)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        times(torch.zeros(1, K, device=device))((packed, scales))
        return times, [(packed.clone(), scales.clone()) for _ in range(count)]
    except Exception as error:  # whatever version it is: a comparison less
        print(f"no tinygemm: {type(error).__name__}: {error}", flush=True)
        return times, []


def gemlite(N: int, K: int, group: int, dtype: torch.dtype, count: int, device: torch.device) -> Product:
    """In its own choice of kernels, not tuned for this card."""

    def times(x: Tensor) -> Call:
        return lambda weight: weight(x)

    try:
        core = importlib.import_module("gemlite.core")
        kind = core.DType.FP16 if dtype == torch.float16 else core.DType.BF16
        codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device=device)
        scales, zeros = (torch.rand(N, K // group, device=device).to(dtype) for _ in range(2))
        packed = []
        for _ in range(count):
            one = core.GemLiteLinear(4, group_size=group, in_features=K, out_features=N, input_dtype=kind, output_dtype=kind)
            one.pack(codes, scales, zeros, None)
            packed.append(one)
        times(torch.zeros(1, K, dtype=dtype, device=device))(packed[0])
        return times, packed
    except ImportError:
        return times, []
    except Exception as error:  # whatever version it is: a comparison less
        print(f"no gemlite: {type(error).__name__}: {error}", flush=True)
        return times, []
