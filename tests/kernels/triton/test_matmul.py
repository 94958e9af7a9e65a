"""Fused products with packed weights against the reference: bits, groups, zero points, scales, epilogues, awkward shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.ops import Norm
from kernels.triton.matmul import matmul
from kernels.triton.weights import TritonWeight, pack
from quant.tensor import QuantTensor
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.weights import random_weight

DTYPES = (torch.float16, torch.bfloat16)
# Rounding of the result; the interpreter cuts bfloat16 off where a card rounds.
LIMIT = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}


def expected(
    x: Tensor, weight: QuantTensor | Tensor, dtype: torch.dtype, bias: Tensor | None = None, **options: object
) -> Tensor:
    """In float32 with weights that were never rounded."""
    dense = weight if isinstance(weight, Tensor) else weight.dequantize()
    packed = reference.pack(dense, dtype=torch.float32, bias=bias, gated=bool(options.pop("gated", False)))
    return reference.matmul(x.float(), packed, **options)  # type: ignore[arg-type]


def on_device(weight: QuantTensor | Tensor, **options: object) -> TritonWeight:
    moved = weight.on(torch.device(DEVICE)) if isinstance(weight, QuantTensor) else weight.to(DEVICE)
    return pack(moved, **options)  # type: ignore[arg-type]


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == wanted.shape and found.dtype == dtype
    error = (found.float().cpu() - wanted).abs().max() / wanted.abs().max()
    assert error < LIMIT[dtype], float(error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "group", "asymmetric"),
    [
        (4, 128, True),
        (4, 128, False),
        (4, 64, True),
        (4, 32, True),
        (4, 256, False),
        (4, None, True),
        (8, 128, False),
        (8, None, False),
        (8, 32, False),
        (8, 128, True),
    ],
)
def test_bits_groups_and_zero_points(dtype: torch.dtype, bits: int, group: int | None, asymmetric: bool) -> None:
    for rows, N, K in ((1, 130, 256), (5, 64, 200), (11, 66, 128), (18, 100, 384)):
        if group == 256 and K % 256:
            continue
        weight = random_weight(N, K, bits=bits, group_size=group, asymmetric=asymmetric, seed=rows)
        packed = on_device(weight, dtype=dtype)
        assert packed.bits == bits
        x = torch.randn(rows, K).to(dtype)
        close(matmul(x.to(DEVICE), packed), expected(x, weight, dtype), dtype)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_any_type(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    weight = random_weight(96, 256, group_size=64, asymmetric=True, scale_dtype=scale_dtype)
    x = torch.randn(3, 256).to(dtype)
    close(matmul(x.to(DEVICE), on_device(weight, dtype=dtype)), expected(x, weight, dtype), dtype)


@pytest.mark.parametrize(
    ("bits", "group", "scale_dtype"), [(4, 32, torch.float16), (8, 64, torch.bfloat16), (4, 64, torch.float32)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_groups_of_many_rows(dtype: torch.dtype, bits: int, group: int, scale_dtype: torch.dtype) -> None:
    """Scales multiply weights there, whatever they are stored as: no weight is rounded twice."""
    weight = random_weight(130, 200, bits=bits, group_size=group, asymmetric=True, scale_dtype=scale_dtype)
    x, alone = torch.randn(45, 200).to(dtype), torch.tensor([3, 40, 70, 130, 198])
    x[: len(alone)] = torch.eye(200, dtype=dtype)[alone]  # these give a weight of each output
    found = matmul(x.to(DEVICE), on_device(weight, dtype=dtype))
    close(found, expected(x, weight, dtype), dtype)
    wanted = weight.dequantize().float()[:, alone].t()
    place = 2.0 ** (-10 if dtype == torch.float16 else -7)  # the interpreter cuts bfloat16 off
    assert ((found[: len(alone)].float().cpu() - wanted).abs() <= wanted.abs() * place).all()


@pytest.mark.parametrize("rows", [1, 17, 40])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["4", "8", "dense"])
def test_what_happens_before_and_after(kind: str, rows: int, gated: bool) -> None:
    """Order of the inputs, norm, bias, silu(gate) * up, residual, and a result in float32."""
    dtype, N, K = torch.float16, 132, 256
    weight: QuantTensor | Tensor = (
        torch.randn(N, K) * 0.05 if kind == "dense" else random_weight(N, K, bits=int(kind), group_size=128, act_order=True)
    )
    if isinstance(weight, Tensor):
        weight = weight.half().float()
    outputs = N // 2 if gated else N
    x, bias = (torch.randn(rows, K) * 2).to(dtype), torch.randn(N)
    norm, residual = Norm((1 + torch.randn(K) / 4).to(dtype), 1e-5), torch.randn(rows, outputs).to(dtype)
    packed = on_device(weight, dtype=dtype, bias=bias.to(DEVICE), gated=gated)
    assert outputs == packed.N and packed.K == K and packed.nbytes >= packed.words.nbytes
    normed = (norm[0].float() * x.float() * torch.rsqrt(x.float().square().mean(1, keepdim=True) + norm.eps)).to(dtype)
    wanted = expected(normed, weight, dtype, bias, gated=gated, residual=residual.float())
    given = {"norm": Norm(norm.weight.to(DEVICE), norm.eps), "residual": residual.to(DEVICE)}
    close(matmul(x.to(DEVICE), packed, **given), wanted, dtype)  # type: ignore[arg-type]
    out = torch.full((rows, outputs), float("nan"), device=DEVICE)
    assert matmul(x.to(DEVICE), packed, **given, out=out) is out  # type: ignore[arg-type]
    assert (out.cpu() - wanted).abs().max() / wanted.abs().max() < 4e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "scale_dtype"), [(None, torch.bfloat16), (128, torch.float32), (32, torch.float16)])
def test_fp8(dtype: torch.dtype, group: int | None, scale_dtype: torch.dtype) -> None:
    """Every number, subnormal ones and -0 too; a NaN makes its output NaN."""
    for rows, N, K in ((1, 130, 256), (5, 64, 200), (70, 100, 384)):
        weight = random_weight(N, K, bits=0, group_size=group, scale_dtype=scale_dtype, act_order=rows == 5)
        codes = weight.packed.view(torch.uint8)
        codes[:2] = torch.arange(2 * K).view(2, K).to(torch.uint8)
        codes[codes & 0x7F == 0x7F] = 0x80
        packed = on_device(weight, dtype=dtype)
        assert packed.bits == 8 and packed.rounds is None
        x = torch.randn(rows, K).to(dtype)
        found = matmul(x.to(DEVICE), packed)
        close(found, expected(x, weight, dtype), dtype)
        codes[3, 7] = 0xFF
        broken = matmul(x.to(DEVICE), on_device(weight, dtype=dtype))
        assert broken[:, 3].isnan().all() and torch.equal(broken[:, 4:], found[:, 4:])


def test_float32_is_right_if_slow() -> None:
    for weight in (random_weight(70, 96, group_size=32), random_weight(70, 96, bits=0)):
        x, packed = torch.randn(4, 96), on_device(weight, dtype=torch.float32)
        assert packed.bits == 16
        wanted = x.float() @ weight.dequantize(weight.scales.dtype).float().t()
        close(matmul(x.to(DEVICE), packed), wanted, torch.float32)


def test_rows_of_a_wider_tensor_and_none() -> None:
    weight = on_device(random_weight(64, 128, group_size=128), dtype=torch.float16)
    wide = torch.randn(7, 300).half().to(DEVICE)
    assert torch.equal(matmul(wide[:, 50:178], weight), matmul(wide[:, 50:178].contiguous(), weight))
    assert matmul(wide[:0, :128], weight).shape == (0, 64)
    with pytest.raises(ValueError, match="contiguous"):
        matmul(wide[:, :128], weight, out=torch.empty(7, 63, device=DEVICE))
    with pytest.raises(TypeError, match="other operators"):
        matmul(wide[:, :128], reference.pack(torch.randn(4, 128), dtype=torch.float32))
