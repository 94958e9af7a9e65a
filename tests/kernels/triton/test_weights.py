"""The planner's arithmetic against what is really packed."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.layout import bias_nbytes, weight_nbytes
from kernels.triton.weights import pack
from tests.kernels.weights import random_weight


@pytest.mark.parametrize("case", range(60))
def test_nbytes(case: int) -> None:
    rng = random.Random(case)
    N, K = rng.choice([2, 64, 128, 200]), rng.choice([32, 64, 96, 256, 300, 512])
    group = min(K, rng.choice([K, 16, 32, 64, 100, 128, 256]))
    bits, dtype = rng.choice([0, 4, 8]), rng.choice(["float32", "bfloat16", "float16"])
    asymmetric, act_order = bits > 0 and rng.random() < 0.5, rng.random() < 0.5
    scale_dtype, bias = rng.choice([torch.float16, torch.bfloat16, torch.float32]), rng.random() < 0.5
    weight = random_weight(
        N, K, bits=bits, group_size=group, asymmetric=asymmetric, act_order=act_order, scale_dtype=scale_dtype, seed=case
    )
    predicted = weight_nbytes(
        ops="triton",
        dtype=dtype,
        kind=weight.kind,
        bits=weight.bits,
        N=N,
        K=K,
        group_size=group,
        asymmetric=asymmetric,
        act_order=act_order,
        scale_bytes=scale_dtype.itemsize,
    )
    predicted += bias_nbytes(ops="triton", dtype=dtype, N=N) if bias else 0
    assert pack(weight, dtype=getattr(torch, dtype), bias=torch.zeros(N) if bias else None).nbytes == predicted
