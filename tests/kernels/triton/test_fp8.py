"""Weights in FP8 widened in registers: the assembly, by the meaning of its instructions, and what products with it compile to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.triton import dequant
from kernels.tune import AMPERE, Launch, choices
from tests.kernels.triton.aot import Compilation, compile_all
from tests.kernels.triton.ptx import halves, run
from tests.kernels.triton.test_dequant import words
from tests.kernels.triton.test_matmul_compilations import STACK, compilation, weights

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


def fp8(dtype: str, launch: Launch, *, whole: bool = False, targets: tuple[int, ...]) -> Compilation:
    """As for 8 bits, with words of FP8 and scales of 32 bits, one for 128 inputs unless ``whole``."""
    one = compilation(8, dtype, launch, targets=targets)
    return replace(
        one,
        types=one.types | {"words": "*u16"},
        constants=one.constants | {"SCALE": "tl.float32", "WHOLE": whole},
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_launch_fits_every_card() -> None:
    launches = {75: list(choices(75)), 86: list(choices()), 89: list(choices(89)), 90: list(choices(90)), 120: list(choices(120))}
    wanted = [
        fp8("fp16" if target == 75 else "bf16", launch, targets=(target,)) for target, some in launches.items() for launch in some
    ]
    for report in compile_all(wanted):
        assert report.fits and report.stack <= STACK, report


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_instructions_for_a_weight() -> None:
    """Of the smallest tile, as reached with Triton 3.9. Bytes become floats by shifts and masks, without conversions."""
    small = next(launch for launch in choices(AMPERE) if launch.block_m == 16 and launch.split > 1)
    limits = {("fp16", True): 2.45, ("fp16", False): 2.65, ("bf16", True): 2.95, ("bf16", False): 3.15}
    wanted = [fp8(dtype, small, whole=whole, targets=(89,)) for dtype, whole in limits]
    for limit, report in zip(limits.values(), compile_all(wanted), strict=True):
        assert report.per_weight(weights(small)) <= limit and report.stack == 0, report
        assert report.count("HMMA") > 0 and report.count("F2FP", "I2F", "F2F", "LDS.U8", "STS.U") == 0
        assert report.count("STS") <= 1  # a group's scales, for the columns of the sum
        assert any(name.startswith("LDGSTS") and name.endswith("128") for name in report.loop)
