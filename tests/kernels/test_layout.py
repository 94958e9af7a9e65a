"""The planner's arithmetic against what the packers really make."""

from __future__ import annotations

import random

import pytest
import torch

from kernels import reference
from kernels.cpu import weights
from kernels.layout import weight_nbytes
from tests.kernels.weights import random_weight

DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("case", range(80))
def test_nbytes(case: int) -> None:
    rng = random.Random(case)
    N, K = rng.choice([1, 63, 64, 65, 128, 200]), rng.choice([32, 64, 65, 96, 256, 300, 512])
    group = rng.choice([None, 16, 32, 64, 100, 128, 256])
    group = K if group is None else min(group, K)
    bits, dtype = rng.choice([0, 4, 8]), rng.choice(DTYPES)
    asymmetric, act_order = bits > 0 and rng.random() < 0.5, rng.random() < 0.5
    activation = rng.choice([None, "int8-token", "fp8-token"])
    weight = random_weight(
        N, K, bits=bits, group_size=group, asymmetric=asymmetric, act_order=act_order, activation=activation, seed=case
    )
    for device, module in (("cpu", weights), ("cuda", reference)):
        predicted = weight_nbytes(
            device=device,
            dtype=dtype,
            kind=weight.kind,
            bits=weight.bits,
            N=N,
            K=K,
            group_size=group,
            asymmetric=asymmetric,
            act_order=act_order,
            activation=activation,
        )
        assert module.pack(weight, dtype=getattr(torch, dtype)).nbytes == predicted, device


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_and_bias(dtype: str) -> None:
    predicted = weight_nbytes(
        device="cpu", dtype=dtype, kind="dense", bits=16, N=5, K=7, group_size=7, asymmetric=False, act_order=False
    )
    kind = getattr(torch, dtype)
    assert weights.pack(torch.randn(5, 7), dtype=kind).nbytes == predicted
    assert weights.pack(torch.randn(5, 7), dtype=kind, bias=torch.randn(5)).nbytes == predicted + 5 * kind.itemsize
