"""Weights in FP8 widened in registers: the assembly, by the meaning of its instructions, and what products with it compile to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import reference
from kernels.triton import dequant, rounded
from kernels.triton.kv import capability
from kernels.triton.matmul import Card, matmul
from kernels.triton.weights import pack
from kernels.tune import AMPERE, Launch, choices
from tests.kernels.triton.aot import Compilation, compile_all
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.ptx import halves, run
from tests.kernels.triton.tensors import draw, poison
from tests.kernels.triton.test_dequant import words
from tests.kernels.triton.test_matmul import LIMIT
from tests.kernels.triton.test_matmul_compilations import STACK, compilation
from tests.kernels.weights import random_weight

__all__ = ["poison"]
CARD = Card(2, 89)

HALF = {torch.float16: "FP16", torch.bfloat16: "BF16"}


@pytest.mark.parametrize("dtype", HALF)
def test_every_number(dtype: torch.dtype) -> None:
    """Bit for bit, the sign of zero too; NaN are not asked for."""
    found = run(getattr(dequant, f"_FP8_{HALF[dtype]}").value, outputs=2, inputs=[words()])
    for j, plane in enumerate(found):
        codes = torch.stack([words() >> 8 * j & 255, words() >> 16 + 8 * j & 255], -1).to(torch.uint8)
        wanted = codes.view(torch.float8_e4m3fn).float() * (2.0**-8 if dtype == torch.float16 else 1.0)
        number = codes & 0x7F != 0x7F
        assert torch.equal(halves(plane, dtype)[number].view(torch.int16), wanted[number].to(dtype).view(torch.int16))


@pytest.mark.skipif(0 < capability(torch.device(DEVICE)) < 89, reason="this card does not multiply FP8")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("group", [None, 128])
def test_activations_of_many_rows(dtype: torch.dtype, group: int | None) -> None:
    """Rounded to FP8 for each token where the checkpoint asks for it and the card multiplies it; few rows stay as they are."""
    for rows, N, K, gated in ((65, 130, 256, False), (70, 132, 200, True)):
        weight = random_weight(N, K, bits=0, group_size=group, activation="fp8-token", act_order=gated)
        options = {"dtype": dtype, "bias": torch.randn(N).to(DEVICE), "gated": gated}
        packed = pack(weight.on(torch.device(DEVICE)), **options)  # type: ignore[arg-type]
        x, residual = draw(rows, K, dtype=dtype), draw(rows, packed.N, dtype=dtype)
        scale = x.float().cpu().abs().amax(1, keepdim=True) * (1 / 448)
        codes = (x.float().cpu() * (1 / scale)).to(torch.float8_e4m3fn).float() * scale
        there = reference.pack(weight.dequantize(), dtype=torch.float32, bias=options["bias"].cpu(), gated=gated)  # type: ignore[attr-defined]
        wanted = reference.matmul(codes, there, residual=residual.float().cpu())
        found = matmul(x, packed, residual=residual, card=CARD).float().cpu()
        off = (found - wanted).abs() / wanted.abs().max()
        assert off.mean() < LIMIT[dtype] / 4 and off.max() < 0.02  # of a card a code in a thousand may be the next one
        exact = reference.matmul(x.float().cpu(), there, residual=residual.float().cpu())
        assert (found - exact).abs().mean() > 4 * (found - wanted).abs().mean() or dtype == torch.bfloat16
        for card, count in ((Card(2, 80), rows), (CARD, 64)):  # neither has FP8 in it
            plain = matmul(x[:count], packed, residual=residual[:count], card=card).float().cpu()
            assert (plain - exact[:count]).abs().max() < LIMIT[dtype] * exact.abs().max()
        kept = pack(weight.on(torch.device(DEVICE)), **options, activation="bf16")  # type: ignore[arg-type]
        held = matmul(x, kept, residual=residual, card=CARD).float().cpu()  # of more rows than ``plain``: in tiles of its own
        assert (held - exact).abs().max() < LIMIT[dtype] * exact.abs().max()


def many_rows(launch: Launch, whole: bool, gated: bool) -> Compilation:
    types = {"x": "*fp8e4nv", "x_scales": "*fp32", "words": "*fp8e4nv", "scaling": "*i32", "bias": "*fp32", "residual": "*bf16"}
    types |= {"out": "*bf16"} | dict.fromkeys(("M", "N", "padded", "tiles"), "i32")
    constants = {
        "WHOLE": whole,
        "BIAS": True,
        "RESIDUAL": True,
        "BM": launch.block_m,
        "BN": launch.block_n,
        "GROUP": launch.group,
    }
    constants |= {"GATED": gated, "GELU": False, "ASM": True}
    odd, targets = ("M", "tiles"), (89, 90, 120)
    return Compilation("kernels.triton.fp8:product", types, constants, launch.warps, launch.stages, odd=odd, targets=targets)


@pytest.mark.compiles
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("whole", [True, False])
def test_products_of_fp8_for_every_card_that_has_them(whole: bool) -> None:
    launches = [rounded.choose(rows=rows, outputs=4096, inputs=4096, whole=whole) for rows in (65, 256, 2048)]
    for report in compile_all([many_rows(launch, whole, launch.block_n == 128) for launch in launches]):
        assert report.fits and report.stack == 0, report
        assert report.count("QMMA", "QGMMA") > 0 and report.count("HMMA", "F2F", "LDS.U8", "PRMT") == 0


def fp8(dtype: str, launch: Launch, *, whole: bool = False, targets: tuple[int, ...]) -> Compilation:
    """As for 8 bits, with words of FP8 and scales of 32 bits, one for 128 inputs unless ``whole``."""
    one = compilation(8, dtype, replace(launch, half=False), targets=targets)
    return replace(
        one,
        types=one.types | {"words": "*u16"},
        constants=one.constants | {"SCALE": "tl.float32", "WHOLE": whole},
    )


@pytest.mark.compiles
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_launch_fits_every_card() -> None:
    launches = {75: list(choices(75)), 86: list(choices()), 89: list(choices(89)), 90: list(choices(90)), 120: list(choices(120))}
    wanted = [
        fp8("fp16" if target == 75 else "bf16", launch, targets=(target,)) for target, some in launches.items() for launch in some
    ]
    for report in compile_all(wanted, loops=False):
        assert report.fits and report.stack <= STACK, report


@pytest.mark.compiles
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_instructions_for_a_weight() -> None:
    """Of the smallest tile, as reached with Triton 3.9. Bytes become floats by shifts and masks, without conversions."""
    small = next(launch for launch in choices(AMPERE) if launch.block_m == 16 and launch.split > 1)
    limits = {("fp16", True): 2.45, ("fp16", False): 2.65, ("bf16", True): 2.95, ("bf16", False): 3.15}
    wanted = [fp8(dtype, small, whole=whole, targets=(89,)) for dtype, whole in limits]
    for limit, report in zip(limits.values(), compile_all(wanted), strict=True):
        assert report.per_weight(small.block_n * 128 // (small.warps * 32)) <= limit and report.stack == 0, report
        assert report.count("HMMA") > 0 and report.count("F2FP", "I2F", "F2F", "LDS.U8", "STS.U") == 0
        assert report.count("STS") <= 1  # a group's scales, for the columns of the sum
        assert any(name.startswith("LDGSTS") and name.endswith("128") for name in report.loop)
