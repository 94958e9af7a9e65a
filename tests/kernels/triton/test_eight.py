"""Activations rounded to int8 and their products with weights of 4 and 8 bits, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.ops import Norm
from kernels.triton import rounded
from kernels.triton.kv import capability
from kernels.triton.matmul import Card, matmul, partial_sums
from kernels.triton.quantize import padded_rows, quantize
from kernels.triton.weights import TritonWeight, pack
from kernels.tune import AMPERE, Launch
from quant.tensor import QuantTensor
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.tensors import draw, poison
from tests.kernels.weights import random_weight

__all__ = ["poison"]
pytestmark = pytest.mark.skipif(0 < capability(torch.device(DEVICE)) < AMPERE, reason="nothing is rounded on this card")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LIMIT = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}  # rounding of the result
CARD = Card(2, 80)  # so small that few products are split


def rounded_by_hand(x: Tensor, *, token: bool) -> Tensor:
    """x [M, K] as int8 holds it, a scale for a row or for each 128 inputs."""
    tiles = [x] if token else list(x.split(128, dim=1))
    return torch.cat([reference.quantize_activations(tile.float(), "int8-token") for tile in tiles], dim=1)


def on_device(weight: QuantTensor, **options: object) -> TritonWeight:
    return pack(weight.on(torch.device(DEVICE)), **options)  # type: ignore[arg-type]


def close(found: Tensor, x: Tensor, weight: QuantTensor, token: bool, dtype: torch.dtype, **options: object) -> None:
    """Against a product in float32 of the rounded activations. A half may be rounded to either side: a step of one input."""
    wide = x.float().cpu() if weight.perm is None else x.float().cpu()[:, weight.perm]
    plain = weight if weight.perm is None else weight.without_perm()
    bias = options.pop("bias", None)
    packed = reference.pack(plain.dequantize(), dtype=torch.float32, bias=bias, gated=bool(options.pop("gated", False)))  # type: ignore[arg-type]
    wanted = reference.matmul(rounded_by_hand(wide, token=token), packed, **options)  # type: ignore[arg-type]
    assert found.shape == wanted.shape and found.dtype == dtype
    error = (found.float().cpu() - wanted).abs().max() / wanted.abs().max()
    assert error < LIMIT[dtype] + 3e-3, float(error)


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize(dtype: torch.dtype, token: bool) -> None:
    for M, K in ((1, 1), (3, 127), (2, 128), (1, 1100), (2, 4200), (1, 17000), (0, 64)):
        wide = draw(M, K + 5, dtype=dtype, scale=3)
        x = wide[:, 2 : K + 2]
        if M == 3:
            x[1] = 0
        codes, scales, sums = quantize(x, token=token, sums=True)
        tiles = -(-K // 128)
        assert codes.shape == (M, tiles * 128) and scales.shape == ((M,) if token else (tiles, padded_rows(M)))
        assert not codes[:, K:].any()
        assert sums is not None
        each = scales.expand(tiles, M) if token else scales[:, :M]
        values = codes.unflatten(1, (tiles, 128)).float() * each.t().unsqueeze(2)
        assert ((values.flatten(1)[:, :K] - x.float()).abs() <= 0.501 * each.t().repeat_interleave(128, 1)[:, :K] + 1e-12).all()
        wanted = codes.unflatten(1, (tiles, 128)).float().sum(2) if token else values.sum(2)
        torch.testing.assert_close(sums[:, :M], wanted.t(), rtol=1e-5, atol=1e-5)
        if M:
            assert codes.abs().amax() == 127 and quantize(x, token=token).sums is None


@pytest.mark.parametrize(
    ("bits", "group", "asymmetric", "token"),
    [
        (8, None, False, True),
        (8, None, False, False),
        (8, 128, True, True),
        (8, None, True, True),
        (4, 128, False, False),
        (4, 128, True, False),
        (4, 256, True, True),
        (4, None, True, True),
        (4, None, True, False),
        (4, None, False, True),
    ],
)
def test_bits_groups_and_zero_points(bits: int, group: int | None, asymmetric: bool, token: bool) -> None:
    for i, (rows, N, K) in enumerate(((1, 130, 256), (5, 64, 200), (18, 100, 384))):
        dtype = DTYPES[i % 2]
        asked = "int8-token" if token else None
        weight = random_weight(N, K, bits=bits, group_size=group if group and group < K else None, asymmetric=asymmetric,
                               activation=asked, seed=rows, scale_dtype=DTYPES[i])  # fmt: skip
        packed = on_device(weight, dtype=dtype, activation="auto" if token else "int8")
        assert packed.rounds == ("token" if token else "tile")
        x = draw(rows, K, dtype=dtype)
        for card in (CARD, Card(128, 80)):
            close(matmul(x, packed, card=card), x, weight, token, dtype)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("bits", "asymmetric", "token"), [(8, False, True), (4, True, False), (4, True, True)])
def test_what_happens_before_and_after(bits: int, asymmetric: bool, token: bool, gated: bool) -> None:
    """Order of the inputs, norm, bias, silu(gate) * up, residual, a result in float32, the same with and without splits."""
    dtype, N, K = torch.float16, 132, 256
    outputs = N // 2 if gated else N
    for rows, act_order in ((1, True), (40, False), (1, False)):
        weight = random_weight(N, K, bits=bits, group_size=None if bits == 8 else 128, asymmetric=asymmetric, act_order=act_order,
                               activation="int8-token" if token else None)  # fmt: skip
        bias, residual = torch.randn(N), torch.randn(rows, outputs).to(dtype)
        packed = on_device(weight, dtype=dtype, bias=bias.to(DEVICE), gated=gated, activation="int8")
        x, norm = draw(rows, K, dtype=dtype, scale=2), Norm((1 + torch.randn(K) / 4).to(dtype), 1e-5)
        normed = reference.rms_norm(x.cpu(), norm.weight, eps=norm.eps)
        given = {"norm": Norm(norm.weight.to(DEVICE), norm.eps), "residual": residual.to(DEVICE)}
        wanted = {"bias": bias, "gated": gated, "residual": residual.float()}
        close(matmul(x, packed, **given), normed, weight, token, dtype, **wanted)  # type: ignore[arg-type]
        out = torch.full((rows, outputs), float("nan"), device=DEVICE)
        assert matmul(x, packed, **given, out=out, card=CARD) is out  # type: ignore[arg-type]
        close(out, normed, weight, token, torch.float32, **wanted)


def test_partial_sums_and_many_rows() -> None:
    weight = random_weight(200, 512, bits=8, activation="int8-token")
    packed = on_device(weight, dtype=torch.float16)
    x = draw(150, 512, dtype=torch.float16)
    parts = partial_sums(x[:3], packed)
    assert parts is not None and parts.shape == (2, 3, 200)
    close(parts.sum(0).half(), x[:3], weight, True, torch.float16)
    assert partial_sums(x, packed) is None
    close(matmul(x, packed), x, weight, True, torch.float16)
    assert matmul(x[:0], packed).shape == (0, 200)


def test_what_is_rounded() -> None:
    """What a checkpoint asks for, and int8 by choice where groups are whole tiles; never by itself."""
    auto = on_device(random_weight(64, 256, group_size=128), dtype=torch.float16)
    assert auto.rounds is None and auto.words.dtype == torch.int16
    for group, rounds in ((32, None), (64, None), (128, "tile"), (None, "tile")):
        weight = random_weight(64, 256, group_size=group)
        assert on_device(weight, dtype=torch.bfloat16, activation="int8").rounds == rounds
        assert on_device(weight, dtype=torch.bfloat16, activation="bf16").rounds is None
    for asked in (None, "int8-token"):
        assert on_device(random_weight(64, 256, activation=asked), dtype=torch.float32, activation="int8").bits == 16
    assert on_device(random_weight(64, 96, bits=0), dtype=torch.float16, activation="int8").rounds is None


def test_launches() -> None:
    """Few rows fill the card by splits, many by themselves; the same for a row more or less of a step."""

    def choose(rows: int, outputs: int = 4096, inputs: int = 4096, whole: bool = True) -> Launch:
        return rounded.choose(rows=rows, outputs=outputs, inputs=inputs, whole=whole)

    assert choose(1) == choose(16) and choose(1).split == 8 and choose(1, 128, 128).split == 1
    assert choose(64).split == 4 and choose(64, 28672).split == 1 == choose(65).split  # 256 rows of parts are planned
    assert [choose(rows, 28672).block_m for rows in (16, 17, 33, 65)] == [16, 32, 64, 128]
    assert [choose(rows, 28672, whole=False).block_m for rows in (16, 17, 33, 65)] == [16, 32, 64, 64]
    tiles = [(one.block_m, one.block_n) for one in map(choose, (65, 256, 512))]
    assert tiles == [(64, 64), (64, 128), (128, 128)]  # the largest that fill the card
