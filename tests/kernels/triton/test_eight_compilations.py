"""Products of integers compiled for cards that are not here: they fit, nothing spills, the loop is as short as it was made."""

from __future__ import annotations

import pytest

from kernels.triton.rounded import choose
from kernels.tune import Launch
from tests.kernels.triton.aot import OLDER, OLDEST, Compilation, Report, compile_all

INTEGERS = ("M", "N", "x_rows", "padded", "tiles")


def compilation(
    bits: int, token: bool, zeros: bool, whole: bool, launch: Launch, targets: tuple[int, ...], gated: bool = False
) -> Compilation:
    """Split over the inputs where the launch is: float32 out, no epilogue."""
    split = launch.split > 1
    types = {"x": "*i8", "x_scales": "*fp32", "x_sums": "*fp32", "words": "*u8" if bits == 4 else "*i8", "scaling": "*i32"}
    types |= {"bias": "*fp32", "residual": "*fp16", "out": "*fp32" if split else "*fp16"}
    constants = {
        "BITS": bits,
        "TOKEN": token,
        "ZEROS": zeros,
        "WHOLE": whole,
        "PARTS": 1,
        "SCALE": "tl.float16",
        "BIAS": not split,
        "RESIDUAL": not split,
        "BM": launch.block_m,
        "BN": launch.block_n,
        "GROUP": launch.group,
        "GATED": gated,
        "GELU": False,
        "ASM": True,
    }
    return Compilation(
        "kernels.triton.eight:product",
        types | dict.fromkeys(INTEGERS, "i32"),
        constants,
        launch.warps,
        launch.stages,
        odd=("M", "tiles"),
        targets=targets,
    )


def launches(whole: bool) -> list[Launch]:
    """Every kernel that ``choose`` can ask for, split or not where few rows can be either."""
    sizes = [(rows, outputs) for rows in (1, 17, 33, 65, 129) for outputs in (128, 128 * 64, 128 * 1024)]
    found = [choose(rows=rows, outputs=outputs, inputs=4096, whole=whole) for rows, outputs in sizes]
    return list({(one.block_m, one.block_n, one.split > 1): one for one in found}.values())


def weights(launch: Launch) -> int:
    """That one thread handles in a turn of the loop."""
    return launch.block_n * 128 // (launch.warps * 32)


def check_loop(report: Report) -> None:
    """Operands come by asynchronous copies of 16 bytes and go to the product as they are, or after a shift and a mask."""
    assert report.count("LDGSTS") > 0 and report.count("IMMA") > 0
    assert report.count("LDS.U8", "LDS.S8", "LDG.E.U8", "LDG.E.S8", "PRMT", "I2F.S8") <= 1
    assert any(name.startswith("LDGSTS") and name.endswith("128") for name in report.loop)


KINDS = {  # of weights and activations: bits, a scale for a token, zero points, one group
    "w8 token": (8, True, False, True),
    "w8 token zeros": (8, True, True, True),
    "w8 tile groups": (8, False, False, False),
    "w4 tile": (4, False, False, False),
    "w4 tile zeros": (4, False, True, False),
    "w4 token zeros": (4, True, True, False),
    "w4 tile zeros whole": (4, False, True, True),
}
CARDS = (80, 86, 89, 90, 120)  # the compiler has no products of integers for sm_75, where weights are packed for 16 bits


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["w8 token", "w8 tile groups", "w4 tile zeros"])
def test_every_launch_fits_every_card(kind: str) -> None:
    """And nothing spills. What the other kinds need is less."""
    bits, token, zeros, whole = KINDS[kind]
    some = launches(whole and token)
    assert len(some) >= 5
    wanted = [compilation(bits, token, zeros, whole, launch, CARDS) for launch in some]
    wanted += [compilation(bits, token, zeros, whole, some[-1], CARDS, gated=True)]
    for report in compile_all(wanted, loops=False):
        assert report.fits and report.stack == 0, report


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_instructions_for_a_weight() -> None:
    """Of the smallest tile, which reads weights as fast as memory gives them. Limits are what was reached with Triton 3.9."""
    small = next(launch for launch in launches(False) if launch.block_m == 16 and launch.split > 1)
    limits = {
        "w8 token": 0.9,
        "w8 token zeros": 1.0,
        "w8 tile groups": 1.6,
        "w4 tile": 1.65 if OLDER else 1.6,
        "w4 tile zeros": 1.9 if OLDEST else 1.8,
        "w4 token zeros": 1.75 if OLDEST else 1.7,
        "w4 tile zeros whole": 1.5,
    }
    reports = compile_all([compilation(*KINDS[kind], small, (89,)) for kind in limits])
    for limit, report in zip(limits.values(), reports, strict=True):
        assert report.stack == 0 and report.registers <= 128, report
        assert report.per_weight(weights(small)) <= limit, report
        check_loop(report)


@pytest.mark.slow
def test_rounding() -> None:
    """Rows are read and codes written 16 bytes at a time; a row that is one chunk is read once and stays in registers."""
    types = {"x": "*bf16", "scales": "*fp32", "sums": "*fp32"} | dict.fromkeys(("rows", "K", "tiles", "x_stride"), "i32")
    kinds = [  # TOKEN, SUMS, FP8, CHUNK, ONCE
        (True, False, False, 32, True),
        (True, True, False, 128, True),
        (True, True, False, 128, False),
        (False, True, False, 8, False),
        (True, False, True, 128, True),
    ]
    wanted, targets = [], (89, 120)
    for kind in kinds:
        constants = dict(zip(("TOKEN", "SUMS", "FP8", "CHUNK", "ONCE"), kind, strict=True)) | {"PART": 1.0}
        codes = {"codes": "*u8" if constants["FP8"] else "*i8"}
        warps = max(4, min(16, kind[3] // 4))
        one = Compilation("kernels.triton.quantize:_quantize", types | codes, constants, warps, odd=("tiles",), targets=targets)
        wanted.append(one)
    reports = iter(compile_all(wanted))
    for kind in kinds:
        for _ in targets:
            report = next(reports)
            assert report.fits and report.stack == 0 and report.registers <= 64, report
            assert report.count("STG.E.128", "STG.E.64") > 0 and (not kind[4] or report.count("LDG") == 0), report
