"""Products compiled for cards that are not here: they fit, nothing spills, the loop over weights is as short as it was made."""

from __future__ import annotations

import pytest

from kernels.tune import Launch, choices
from tests.kernels.triton.aot import TARGETS, Compilation, compile_all

STACK = 32  # bytes: a value or two put aside before the loop of the largest tile on sm_120; the small tiles have none
INTEGERS = ("M", "N", "K", "padded", "tiles", "x_stride")


def compilation(
    bits: int,
    dtype: str,
    launch: Launch,
    *,
    slices: int = 1,
    gated: bool = False,
    gelu: bool = False,
    targets: tuple[int, ...] = TARGETS,
) -> Compilation:
    """Split over the inputs where the launch is: float32 out, no epilogue."""
    if launch.slab:
        return expansion(bits, dtype, launch, slices, targets)
    split = launch.split > 1
    words, out = "*i16", "*fp32" if split else f"*{dtype}"
    x = "fp16" if launch.half else dtype
    types = {"x": f"*{x}", "words": words, "scaling": "*i32", "bias": "*fp32", "residual": f"*{dtype}", "out": out}
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
    if launch.group:
        constants |= {
            "GROUP": launch.group,
            "HALF": launch.half,
            "GATED": gated,
            "GELU": gelu,
            "ADDEND": "tl.float16" if dtype == "fp16" else "tl.bfloat16",
        }
        types, constants = (types | {"back": "*fp32"}, constants) if launch.half else (types, constants | {"back": None})
    return Compilation(
        "kernels.triton.many:product" if launch.group else "kernels.triton.tiled:product",
        types | dict.fromkeys(INTEGERS, "i32"),
        constants,
        launch.warps,
        launch.stages,
        odd=("M", "tiles"),
        targets=targets,
    )


def expansion(bits: int, dtype: str, launch: Launch, slices: int, targets: tuple[int, ...]) -> Compilation:
    constants = {"BITS": bits, "SLICES": slices, "WHOLE": bits == 8, "PARTS": 1, "SCALE": "tl.float16"}
    constants |= {"BN": 128, "ASM": True}
    types = {"words": "*i16", "scaling": "*i32", "slab": f"*{dtype}"}
    types |= dict.fromkeys(("first", "end", "K", "padded", "tiles", "stride"), "i32")
    odd = ("first", "end", "tiles")
    return Compilation("kernels.triton.slab:_expand", types, constants, launch.warps, 1, odd=odd, targets=targets)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_launch_fits_every_card(bits: int) -> None:
    """Without spills of weight. What is for one row test_gate_compilations.py compiles."""
    kind = f"w{bits} fp16"
    launches = {target: list(choices(target, kind)) for target in TARGETS}
    assert all(len(some) >= 4 for some in launches.values())
    wanted = [
        compilation(bits, "fp16" if target == 75 else "bf16", launch, targets=(target,))
        for target, some in launches.items()
        for launch in some
        if target == 75 or launch.block_m > 16
    ]
    for report in compile_all(wanted, loops=False):
        assert report.fits and report.stack <= STACK, report


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_large_tiles() -> None:
    """Enough instructions besides those of the tensor cores to keep these busy; on a card with wgmma they are that."""
    wanted = [
        compilation(bits, "bf16", launch, gated=gated, gelu=gated and bits == 8, targets=(target,))
        for bits in (4, 8)
        for gated in (False, True)
        for target in (89, 90)
        for launch in choices(target)
        if launch.group and launch.block_m * launch.block_n >= 64 * 128
    ]
    assert len(wanted) >= 12
    for one, report in zip(wanted, compile_all(wanted), strict=True):
        assert report.stack == 0 and report.count("I2F", "LDS.U8") == 0, report
        assert report.count("HGMMA") > 0 if report.target == 90 else report.count("STS") == 0, report
        of_tensor_cores = one.constants["BM"] * one.constants["BN"] * 128 // one.num_warps // (16 * 8 * 16)  # HMMA
        assert sum(report.loop.values()) < 9 * of_tensor_cores, report
        if report.target == 89:
            assert report.count("HMMA.16816.F16" if one.constants["HALF"] else "HMMA.16816.F32") == of_tensor_cores, report


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("bits", "slices", "dtype", "limit"), [(4, 4, "fp16", 3.8), (4, 4, "bf16", 4.7), (4, 2, "bf16", 4.2)])
def test_small_groups_of_many_rows(bits: int, slices: int, dtype: str, limit: float) -> None:
    """On sm_90, where four warps have all registers: nothing spills, two programs fit, and no group has sums of its own.

    ``limit``: instructions a weight; scales are float16, which bfloat16 takes in two steps.
    """
    chosen = dict.fromkeys(one for one in choices(90, f"w{bits} {dtype}") if one.block_m == 64 and one.block_n == 128)
    wanted = [compilation(bits, dtype, one, slices=slices, targets=(90,)) for one in chosen if one.split > 1 or one.group]
    assert len(wanted) == 2
    for one, report in zip(wanted, compile_all(wanted), strict=True):
        assert report.fits and report.stack == 0 and report.occupancy.blocks >= 2, report
        assert report.count("HGMMA") and report.count("FFMA", "LDL", "STL") == 0, report
        assert report.per_weight(one.constants["BN"] * 128 // (32 * one.num_warps)) <= limit, report
