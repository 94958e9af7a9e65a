"""The CPU's products against the reference: every layout, activation dtype and awkward shape, few rows and many."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import reference
from kernels.cpu import torch_ops, weights
from kernels.cpu.nibbles import int4_block, pack_blocks
from kernels.ops import Clamp, Norm
from quant.errors import CheckpointError
from quant.tensor import QuantTensor
from tests.kernels.weights import random_fp4, random_nvfp4, random_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 1.5e-3}  # of the largest result
SHAPES = [  # N, K, group
    (192, 256, 64), (100, 300, 100), (70, 65, 65), (33, 96, 96), (64, 512, None), (130, 200, 128), (1, 7, 3), (256, 1024, 512),
    (48, 160, 32), (65, 64, 16),
]  # fmt: skip
ROWS = (0, 1, 3, 33, weights.FEW_ROWS + 1)


def check(weight: QuantTensor | torch.Tensor, dtype: torch.dtype, *, bias: bool = True, tolerance: float | None = None) -> None:
    """The product of both packings for few and many rows, and that neither changes its input."""
    N, K = (weight.N, weight.K) if isinstance(weight, QuantTensor) else weight.shape
    rng = torch.Generator().manual_seed(1)
    offset = torch.randn(N, generator=rng).to(dtype) if bias else None
    ours, theirs = (module.pack(weight, dtype=dtype, bias=offset) for module in (weights, reference))
    assert (ours.N, ours.K) == (N, K)
    for rows in ROWS:
        x = torch.randn(rows, K, generator=rng).to(dtype)
        kept = x.clone()
        found, expected = torch_ops.matmul(x, ours), reference.matmul(x, theirs)
        assert found.dtype == dtype and found.shape == (rows, N) and found.is_contiguous() and torch.equal(x, kept)
        if rows:
            error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
            assert error < (tolerance or TOLERANCE[dtype]), (rows, float(error))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_integers(shape: tuple[int, int, int | None], bits: int, asymmetric: bool, dtype: torch.dtype) -> None:
    N, K, group = shape
    check(random_weight(N, K, bits=bits, group_size=group, asymmetric=asymmetric, act_order=K % 3 == 1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_4_bit_floats(dtype: torch.dtype) -> None:
    for N, K, group in SHAPES:
        check(random_fp4(N, K, group_size=group or K, act_order=K % 3 == 1), dtype)
        check(random_nvfp4(N, K, group_size=min(group or K, 16), act_order=K % 3 == 1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_that_is_clamped(dtype: torch.dtype) -> None:
    weight, x, bias = random_fp4(100, 256), torch.randn(5, 256).to(dtype), torch.randn(100)
    packed = weights.pack(weight, dtype=dtype, bias=bias, gated=True, clamp=Clamp(1.5, 1.3))
    gate, up = (x.double() @ weight.dequantize().double().t() + bias.to(dtype)).chunk(2, dim=1)
    assert (gate > 1.5).any() and (up.abs() > 1.5).any()
    gate = gate.clamp(max=1.5)
    expected = gate * torch.sigmoid(1.3 * gate) * (up.clamp(-1.5, 1.5) + 1)
    assert (torch_ops.matmul(x, packed) - expected).abs().max() < 4 * TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_scales_of_every_dtype(scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    check(random_weight(64, 128, group_size=32, asymmetric=True, scale_dtype=scale_dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 256, None), (65, 33, None), (70, 100, 32)])
def test_fp8(shape: tuple[int, int, int | None], dtype: torch.dtype) -> None:
    N, K, group = shape
    check(random_weight(N, K, bits=0, group_size=group, act_order=N == 65, activation="fp8-token"), dtype)


def test_every_fp8_value_expands_exactly() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    values = values[(values & 0x7F) != 0x7F].view(1, -1)
    packed = values.view(torch.float8_e4m3fn)
    weight = QuantTensor(packed, torch.ones(1, 1), None, None, 8, 254, 254, 1)
    found = torch_ops.matmul(torch.eye(254), weights.pack(weight, dtype=torch.float32))
    assert torch.equal(found[:, 0], packed[0].float())


def test_nan_in_fp8_is_refused() -> None:
    packed = torch.full((2, 4), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="an FP8 weight holds NaN"):
        weights.pack(QuantTensor(packed, torch.ones(1, 2), None, None, 8, 4, 4, 2), dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits,group", [(8, None), (8, 32), (4, 32)])
def test_int8_activations(bits: int, group: int | None, dtype: torch.dtype) -> None:
    """Weights are multiplied unrounded here, and a code may fall on the other side of a tie: hence the tolerance."""
    weight = random_weight(66, 96, bits=bits, group_size=group, activation="int8-token", act_order=True)
    assert isinstance(weights.pack(weight, dtype=dtype), weights.Int8Weight) == (bits == 8 and group is None)
    check(weight, dtype, tolerance=1.5e-2 if dtype == torch.bfloat16 else 4e-3)


def test_int8_activations_are_really_rounded() -> None:
    weight = random_weight(32, 64, bits=8, activation="int8-token", scale_dtype=torch.float32)
    x = torch.cat([torch.full((1, 1), 100.0), torch.full((1, 63), 0.3)], dim=1)  # 0.3 is below half a step of 100 / 127
    found = torch_ops.matmul(x, weights.pack(weight, dtype=torch.float32))
    assert torch.allclose(found[0], 100.0 * weight.dequantize()[:, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (33, 7), (1, 100)])
def test_dense(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(torch.randn(*shape), dtype, bias=shape[0] != 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("gelu", [False, True])
def test_normalized_gated_and_added(rows: int, gelu: bool, dtype: torch.dtype) -> None:
    """Every step is rounded here, none but the last in the reference."""
    weight = random_weight(100, 256, group_size=64, asymmetric=True, scale_dtype=torch.float32)
    x, norm = torch.randn(rows, 256).to(dtype), Norm(torch.randn(256).to(dtype), 1e-5, float(gelu))
    offset, residual = torch.randn(100), torch.randn(rows, 50).to(dtype)
    ours, theirs = (module.pack(weight, dtype=dtype, bias=offset, gated=True, gelu=gelu) for module in (weights, reference))
    assert (ours.N, ours.K, ours.nbytes) == (50, 256, weights.pack(weight, dtype=dtype, bias=offset).nbytes)
    for wanted in (dtype, torch.float32):
        expected = reference.matmul(x, theirs, norm=norm, residual=residual, out=torch.empty(rows, 50, dtype=wanted))
        out = torch.empty(rows, 50, dtype=wanted)
        found = torch_ops.matmul(x, ours, norm=norm, residual=residual.clone(), out=out)
        assert found.data_ptr() == out.data_ptr() and found.shape == (rows, 50)
        if rows:
            error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
            assert error < 2 * TOLERANCE[dtype], float(error)


def test_a_dense_weight_in_the_right_dtype_is_not_copied() -> None:
    table = torch.randn(8, 4, dtype=torch.bfloat16)
    packed = weights.pack(table, dtype=torch.bfloat16)
    assert isinstance(packed, weights.DenseWeight) and packed.weight.data_ptr() == table.data_ptr()


def test_a_row_does_not_depend_on_its_company() -> None:
    """Within the few rows, and within the many, of float32: up to rounding."""
    packed = weights.pack(random_weight(64, 256, group_size=64), dtype=torch.float32)
    x = torch.randn(100, 256)
    whole = torch_ops.matmul(x, packed)
    assert torch.allclose(torch_ops.matmul(x[7:8], packed), whole[7:8], atol=1e-5)


def test_blocks_of_torch() -> None:
    """Where this machine's torch has the kernel, the probe finds it and few rows use it."""
    codes = torch.randint(0, 16, (64, 32), dtype=torch.uint8)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    same = [b for b in (64, 32) if torch.equal(pack_blocks(codes, b).view(64, -1), theirs)]
    packed = weights.pack(random_weight(64, 256, group_size=128), dtype=torch.bfloat16)
    assert isinstance(packed, weights.NibbleWeight)
    assert int4_block() in same or int4_block() is None
    assert (packed.few_rows == weights.FEW_ROWS) == (int4_block() is not None)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_older_processors(capability: str) -> None:
    """The same numbers on processors without AVX-512, which pack and multiply in other ways (or not at all)."""
    code = (
        "import torch; from kernels.cpu.nibbles import int4_block; from tests.kernels import test_cpu_products as t\n"
        "for dtype in t.DTYPES:\n"
        "    for bits in (4, 8):\n"
        "        t.check(t.random_weight(100, 256, bits=bits, group_size=64, asymmetric=True), dtype)\n"
        "    t.check(t.random_weight(66, 96, bits=8, activation='int8-token'), dtype, tolerance=1.5e-2)\n"
        "print('fine', torch.backends.cpu.get_cpu_capability(), int4_block())"
    )
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)
    assert done.stdout.startswith("fine"), done.stderr[-2000:]


@pytest.mark.parametrize("ours,theirs", [(weights, reference), (reference, weights)])
def test_a_weight_of_other_operators_is_refused(ours: object, theirs: object) -> None:
    packed = theirs.pack(torch.randn(2, 3), dtype=torch.float32)  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="was packed for other operators"):
        ours.matmul(torch.randn(1, 3), packed)  # type: ignore[attr-defined]
