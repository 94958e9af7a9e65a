"""Products compiled for cards that are not here: they fit, nothing spills, the loop over weights is as short as it was made."""

from __future__ import annotations

import pytest

from kernels.tune import Launch, choices
from tests.kernels.triton.aot import TARGETS, Compilation, Report, compile_all

STACK = 32  # bytes: a value or two put aside before the loop of the largest tile on sm_120; the small tiles have none
INTEGERS = ("M", "N", "K", "padded", "tiles", "x_stride")


def compilation(bits: int, dtype: str, launch: Launch, *, slices: int = 1, targets: tuple[int, ...] = TARGETS) -> Compilation:
    """Split over the inputs where the launch is: float32 out, no epilogue."""
    split = launch.split > 1
    words, out = "*i16" if bits == 4 else "*u8", "*fp32" if split else f"*{dtype}"
    types = {"x": f"*{dtype}", "words": words, "params": "*i32", "bias": "*fp32", "residual": f"*{dtype}", "out": out}
    constants = {
        "BITS": bits,
        "SLICES": slices,
        "WHOLE": bits == 8,
        "PARTS": 1,
        "SCALE": "tl.float16",
        "EVEN": True,
        "BIAS": not split,
        "RESIDUAL": not split,
        "BM": launch.block_m,
        "BN": launch.block_n,
        "ASM": True,
    }
    return Compilation(
        "kernels.triton.tiled:product",
        types | dict.fromkeys(INTEGERS, "i32"),
        constants,
        launch.warps,
        launch.stages,
        odd=("M", "tiles"),
        targets=targets,
    )


def weights(launch: Launch) -> int:
    """That one thread handles in a turn of the loop."""
    return launch.block_n * 128 // (launch.warps * 32)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_launch_fits_every_card(bits: int) -> None:
    """Without spills of weight. Cards between those compiled here take the same code with as much memory or more."""
    launches = {75: list(choices(75)), 86: list(choices()), 90: list(choices()), 120: list(choices())}
    assert all(len(some) >= 4 for some in launches.values())
    wanted = [
        compilation(bits, "fp16" if target == 75 else "bf16", launch, targets=(target,))
        for target, some in launches.items()
        for launch in some
    ]
    for report in compile_all(wanted):
        assert report.fits and report.stack <= STACK, report


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_instructions_for_a_weight() -> None:
    """Of the smallest tile, which reads weights as fast as memory gives them: on the cards where that is many at a time."""
    small = next(launch for launch in choices() if launch.block_m == 16 and launch.split > 1)
    # What was reached with Triton 3.9; a card of 4.3 TB/s has room for about 3.5 (bytes in bfloat16 take 3.8).
    limits = {(4, "fp16", 1): 2.4, (4, "bf16", 1): 2.75, (4, "fp16", 2): 2.75, (8, "fp16", 1): 3.0}
    wanted = [compilation(bits, dtype, small, slices=slices, targets=(89,)) for bits, dtype, slices in limits]
    for limit, report in zip(limits.values(), compile_all(wanted), strict=True):
        assert report.per_weight(weights(small)) <= limit, report
        check_loop(report)


def check_loop(report: Report) -> None:
    """Weights come by asynchronous copies of 16 bytes and go to the product without conversions or detours through memory."""
    assert report.count("LDGSTS") > 0 and report.count("HMMA") > 0
    assert report.count("I2F", "LDS.U8", "STS") == 0
    assert any(name.startswith("LDGSTS") and name.endswith("128") for name in report.loop)
