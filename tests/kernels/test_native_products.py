"""Products of the native extension against the reference, under every instruction set that runs here."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import gelu as gelu_tanh
from torch.nn.functional import silu

from kernels import reference
from kernels.cpu import backend
from kernels.cpu.native_ops import NativeOps
from kernels.cpu.native_weights import NativeWeight
from kernels.ops import Clamp, Norm
from quant.errors import CheckpointError
from quant.tensor import QuantTensor
from tests.kernels.native import instruction_sets, integer_product, native_ops
from tests.kernels.weights import random_fp4, random_nvfp4, random_weight

if backend.native() is None:
    pytest.skip("the native extension is not built", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# N, K, group size: whole panels, odd ones, segments shorter and longer than 128, a last group that is short
SHAPES = (
    (64, 128, 128),
    (7, 5, None),
    (130, 256, 32),
    (96, 384, 64),
    (71, 129, 128),
    (200, 300, 100),
    (66, 1000, None),
    (64, 36, 9),
    (1, 1, None),
    (192, 520, 256),
)
ROWS = (1, 2, 3, 4, 5, 6, 7, 12, 13, 16, 17, 31, 33, 40)


@pytest.fixture(params=instruction_sets())
def ops(request: pytest.FixtureRequest) -> NativeOps:
    return native_ops(request.param)


def tolerance(dtype: torch.dtype) -> float:
    """Of results rounded once to ``dtype``, relative to the largest."""
    return {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert bool(found.isfinite().all())
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def cases(count: int, seed: int) -> list[tuple[tuple[int, int, int | None], int]]:
    """Random pairs of a shape and a number of rows, every shape in turn."""
    rng = random.Random(seed)
    return [(SHAPES[i % len(SHAPES)], rng.choice(ROWS)) for i in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_products_are_exact(ops: NativeOps, bits: int, asymmetric: bool, dtype: torch.dtype) -> None:
    for (N, K, group), rows in cases(20, bits + asymmetric):
        scales = random.choice(DTYPES)
        weight = random_weight(
            N, K, bits=bits, group_size=group, asymmetric=asymmetric, act_order=N % 3 == 0, scale_dtype=scales, seed=N * K + rows
        )
        x, bias = torch.randn(rows, K).to(dtype), torch.randn(N)
        found = ops.matmul(x, ops.pack(weight, dtype=dtype, bias=bias, activation="int8"))
        # A value halfway between two codes may go either way: float16 has few enough bits for that to be common.
        limit = tolerance(dtype) + (4e-3 if dtype == torch.float16 else 1e-4)
        assert relative_error(found, integer_product(x, weight) + bias) < limit, (N, K, group, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8, 0], ids=["4 bits", "8 bits", "fp8"])
def test_exact_products(ops: NativeOps, bits: int, dtype: torch.dtype) -> None:
    for (N, K, group), rows in cases(20, bits):
        asymmetric = bits > 0 and rows % 2 == 0
        weight = random_weight(N, K, bits=bits, group_size=group, asymmetric=asymmetric, act_order=N % 3 == 0, seed=N * K + rows)
        x, bias = torch.randn(rows, K).to(dtype), torch.randn(N)
        found = ops.matmul(x, ops.pack(weight, dtype=dtype, bias=bias, activation="bf16" if dtype != torch.float32 else "auto"))
        expected = reference.matmul(x.float(), reference.pack(weight, dtype=torch.float32, bias=bias))
        assert relative_error(found, expected) < 2 * tolerance(dtype), (N, K, group, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_products(ops: NativeOps, dtype: torch.dtype) -> None:
    for (N, K, _), rows in cases(20, 3):
        weight, x, bias = torch.randn(N, K), torch.randn(rows, K).to(dtype), torch.randn(N)
        found = ops.matmul(x, ops.pack(weight, dtype=dtype, bias=bias))
        expected = x.double() @ weight.to(dtype).double().t() + bias.double()
        assert relative_error(found, expected) < 2 * tolerance(dtype), (N, K, rows)


def test_float32_is_not_rounded_by_default(ops: NativeOps) -> None:
    weight, x = random_weight(64, 256, group_size=128), torch.randn(3, 256)
    expected = reference.matmul(x, reference.pack(weight, dtype=torch.float32))
    assert relative_error(ops.matmul(x, ops.pack(weight, dtype=torch.float32)), expected) < 2e-6
    assert relative_error(ops.matmul(x, ops.pack(weight, dtype=torch.float32, activation="int8")), expected) > 1e-4


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 128), (4, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_that_the_checkpoint_wants_rounded(ops: NativeOps, bits: int, group: int | None, dtype: torch.dtype) -> None:
    weight = random_weight(70, 300, bits=bits, group_size=group, activation="int8-token", seed=5)
    for rows, activation in itertools.product((1, 9), ("auto", "bf16")):
        x = torch.randn(rows, 300).to(dtype)
        found = ops.matmul(x, ops.pack(weight, dtype=dtype, activation=activation))
        expected = reference.matmul(x.float(), reference.pack(weight, dtype=dtype))
        assert relative_error(found, expected) < 4 * tolerance(dtype) + 1e-3


@pytest.mark.parametrize("kind", ["int8", "bf16", "dense"])
@pytest.mark.parametrize("rows", [1, 6, 20])
@pytest.mark.parametrize("gelu", [False, True])
def test_norm_gate_and_residual(ops: NativeOps, rows: int, kind: str, gelu: bool) -> None:
    for N, K in ((128, 256), (74, 96), (2, 40)):
        weight = torch.randn(N, K) if kind == "dense" else random_weight(N, K, group_size=32, asymmetric=True, seed=N)
        dtype = torch.float32 if kind == "dense" else torch.bfloat16
        x, bias, norm = torch.randn(rows, K).to(dtype) * 3, torch.randn(N), Norm(torch.rand(K).to(dtype), 1e-5, float(gelu))
        residual = torch.randn(rows, N // 2).to(dtype)
        packed = ops.pack(weight, dtype=dtype, bias=bias, gated=True, gelu=gelu, activation=kind if kind != "dense" else "auto")
        assert packed.N == N // 2
        dense = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
        wide = x.double()
        wide = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + norm.eps) * (norm.weight.double() + norm.offset)
        both = wide @ dense.double().t() + bias
        gate = gelu_tanh(both[:, : N // 2], approximate="tanh") if gelu else silu(both[:, : N // 2])
        expected = gate * both[:, N // 2 :] + residual.float()
        found = ops.matmul(x, packed, norm=norm, residual=residual.clone())
        assert relative_error(found, expected) < {"int8": 0.04, "bf16": 0.012, "dense": 4e-6}[kind], (N, K)


@pytest.mark.parametrize("make", [random_fp4, random_nvfp4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_with_4_bit_floats(ops: NativeOps, dtype: torch.dtype, make: Callable[..., QuantTensor]) -> None:
    """With activations rounded to int8, and exactly: nothing of such a weight is rounded in any type.

    Of 16 inputs one is the largest, and a code on the other side of a tie weighs more: among so many scales there may be one.
    """
    tie = 1e-4 if make is random_fp4 else 1e-3
    for (N, K, group), rows in cases(20 if make is random_fp4 else 10, 7):
        group = group or K if make is random_fp4 else min(K, 16)
        weight = make(N, K, group_size=group, act_order=N % 3 == 0, seed=N * K + rows)
        x, bias = torch.randn(rows, K).to(dtype), torch.randn(N)
        found = ops.matmul(x, ops.pack(weight, dtype=dtype, bias=bias, activation="int8"))
        limit = tolerance(dtype) + (4e-3 if dtype == torch.float16 else tie)
        assert relative_error(found, integer_product(x, weight) + bias) < limit, (N, K, group, rows)
        exact = ops.matmul(x, ops.pack(weight, dtype=dtype, bias=bias, activation="bf16"))
        expected = x.double() @ weight.dequantize().double().t() + bias
        assert relative_error(exact, expected) < 2 * tolerance(dtype), (N, K, group, rows)


def test_every_4_bit_float(ops: NativeOps) -> None:
    """All codes, with the smallest scales and the largest that are allowed, by themselves."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    packed = (codes[0::2] | codes[1::2] << 4).repeat(5, 1)
    scales = torch.tensor([[2, 64, 127, 251, 252]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    weight = QuantTensor(packed, scales, None, None, 4, 32, 32, 5)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    expected = torch.cat((values, -values)).repeat(2).unsqueeze(1) * torch.tensor([2.0**-125, 2.0**-63, 1, 2.0**124, 2.0**125])
    for rows in (32, 5):
        found = ops.matmul(torch.eye(32)[:rows], ops.pack(weight, dtype=torch.float32))
        assert torch.equal(found, expected[:rows])
    assert torch.equal(weight.dequantize().t(), expected)


def test_every_4_bit_float_with_every_scale_in_e4m3(ops: NativeOps) -> None:
    """A single input at a time: the code times the scale is exact in every type, and the factor rounds once."""
    codes = torch.arange(16, dtype=torch.uint8)
    packed, scales = (
        (codes[0::2] | codes[1::2] << 4).repeat(127, 1),
        torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn),
    )
    factors = torch.rand(127)
    weight = QuantTensor(packed, scales.unsqueeze(0), None, None, 4, 16, 16, 127, factors=factors)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    expected = torch.cat((values, -values)).unsqueeze(1) * scales.float() * factors
    for dtype, rows in ((torch.float32, 16), (torch.bfloat16, 16), (torch.float16, 3)):
        packed_weight, out = ops.pack(weight, dtype=dtype, activation="bf16"), torch.full((rows, 127), float("nan"))
        assert torch.equal(ops.matmul(torch.eye(16, dtype=dtype)[:rows], packed_weight, out=out), expected[:rows]), dtype


@pytest.mark.parametrize("kind", ["int8", "bf16", "dense"])
@pytest.mark.parametrize("rows", [1, 20])
def test_a_gate_that_is_clamped(ops: NativeOps, rows: int, kind: str) -> None:
    """Beyond the limit on all sides; a NaN stays one where nothing is rounded."""
    N, K, clamp = 74, 96, Clamp(1.25, 1.7)
    weight = torch.randn(N, K) if kind == "dense" else random_fp4(N, K)
    dtype = torch.float32 if kind == "dense" else torch.bfloat16
    x, bias = torch.randn(rows, K).to(dtype) * 3, torch.randn(N)
    packed = ops.pack(weight, dtype=dtype, bias=bias, gated=True, clamp=clamp, activation=kind if kind != "dense" else "auto")
    dense = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
    gate, up = (x.double() @ dense.double().t() + bias).chunk(2, dim=1)
    assert (gate > 1.25).any() and (gate < -1.25).any() and (up > 1.25).any() and (up < -1.25).any()
    gate, up = gate.clamp(max=1.25), up.clamp(-1.25, 1.25)
    expected = gate / (1 + torch.exp(-1.7 * gate)) * (up + 1)
    assert relative_error(ops.matmul(x, packed), expected) < {"int8": 0.08, "bf16": 0.012, "dense": 2e-5}[kind]
    if kind == "int8":
        return  # no code stands for NaN
    x[0, 3] = float("nan")
    assert bool(ops.matmul(x, packed)[0].isnan().all())


def test_wide_results_of_half_precision(ops: NativeOps) -> None:
    weight, x = random_weight(100, 64, group_size=64), torch.randn(3, 64).bfloat16()
    packed = ops.pack(weight, dtype=torch.bfloat16, activation="int8")
    out = torch.full((3, 100), float("nan"))
    found = ops.matmul(x, packed, out=out)
    assert found is out
    assert relative_error(found, integer_product(x, weight)) < 1e-4
    assert relative_error(ops.matmul(x, packed), found) > 1e-5
    for wrong in (torch.empty(2, 100), torch.empty(3, 99), torch.empty(100, 3).t()):
        with pytest.raises(ValueError, match="contiguous"):
            ops.matmul(x, packed, out=wrong)


def test_rows_of_a_wider_tensor_are_read_where_they_are(ops: NativeOps) -> None:
    weight, wide = random_weight(64, 64, group_size=64), torch.randn(9, 200)
    packed = ops.pack(weight, dtype=torch.float32)
    assert torch.equal(ops.matmul(wide[:, 50:114], packed), ops.matmul(wide[:, 50:114].contiguous(), packed))


def test_more_rows_than_a_block(ops: NativeOps) -> None:
    weight = random_weight(70, 128, group_size=64, asymmetric=True)
    x = torch.randn(1100, 128).bfloat16()
    packed = ops.pack(weight, dtype=torch.bfloat16)
    assert relative_error(ops.matmul(x, packed), integer_product(x, weight)) < tolerance(torch.bfloat16) + 1e-4
    some = ops.matmul(x[510:520], packed)
    assert relative_error(some, ops.matmul(x, packed)[510:520]) < 2 * tolerance(torch.bfloat16)


def test_nothing(ops: NativeOps) -> None:
    packed = ops.pack(random_weight(10, 64, group_size=64), dtype=torch.float32)
    assert ops.matmul(torch.empty(0, 64), packed).shape == (0, 10)


def test_rows_of_zeros_and_of_huge_values(ops: NativeOps) -> None:
    weight = random_weight(64, 128, group_size=128)
    packed = ops.pack(weight, dtype=torch.bfloat16, activation="int8")
    assert torch.equal(ops.matmul(torch.zeros(2, 128, dtype=torch.bfloat16), packed), torch.zeros(2, 64, dtype=torch.bfloat16))
    huge = torch.randn(2, 128).bfloat16() * 1e30
    assert relative_error(ops.matmul(huge, packed), integer_product(huge, weight)) < 2 * tolerance(torch.bfloat16)


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 16])
def test_any_number_of_threads(threads: int) -> None:
    ops = NativeOps(backend.available()[0], threads)
    for rows in (1, 6, 50):
        weight, x = random_weight(200, 256, group_size=64, asymmetric=True), torch.randn(rows, 256).bfloat16()
        found = ops.matmul(x, ops.pack(weight, dtype=torch.bfloat16))
        assert relative_error(found, integer_product(x, weight)) < tolerance(torch.bfloat16) + 1e-4


def test_every_fp8_value(ops: NativeOps) -> None:
    values = torch.arange(256, dtype=torch.uint8)[(torch.arange(256) & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    weight = QuantTensor(values.view(1, -1).repeat(3, 1), torch.ones(1, 3), None, None, 8, 254, 254, 3)
    found = ops.matmul(torch.eye(254), ops.pack(weight, dtype=torch.float32))
    assert torch.equal(found[:, 1], values.float())


def test_nan_in_fp8_is_refused(ops: NativeOps) -> None:
    weight = random_weight(4, 8, bits=0)
    weight.packed.view(torch.uint8)[1, 2] = 0x7F
    with pytest.raises(CheckpointError, match="NaN"):
        ops.pack(weight, dtype=torch.float32)


def test_a_weight_of_other_operators_is_refused(ops: NativeOps) -> None:
    theirs = reference.pack(torch.ones(2, 2), dtype=torch.float32)
    with pytest.raises(TypeError, match="other operators"):
        ops.matmul(torch.ones(1, 2), theirs)


def test_one_copy_is_kept(ops: NativeOps) -> None:
    weight = random_weight(128, 256, group_size=128, asymmetric=True)
    packed = ops.pack(weight, dtype=torch.bfloat16, bias=torch.zeros(128))
    assert isinstance(packed, NativeWeight)
    assert packed.nbytes == 128 * 256 // 2 + 2 * 128 * (2 + 1) + 4 * 128
