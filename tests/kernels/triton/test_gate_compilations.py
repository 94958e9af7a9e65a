"""Loops over weights on every card with asynchronous copies: what their speed rests on, read from the machine code.

Launches are those of an 8B model, recorded from the operators. Instructions for a weight are what Triton 3.9 reaches, rounded up;
a card of 4.3 TB/s has room for about 3.5, an RTX 4090 for about 20.
"""

from __future__ import annotations

import pytest

from tests.kernels.triton.aot import OLDER, Compilation, Report, compile_all
from tests.kernels.triton.launches import recorded

TARGETS = (80, 86, 89, 90, 120)
LIMITS = {  # for a weight, one row; fp16, bf16
    "layer, 4 bits, groups of 128": (2.1, 2.0),
    "layer, 4 bits, groups of 32": (2.8, 2.65),
    "layer, 8 bits, groups of 128": (2.1, 2.1),
    "head, 8 bits, one scale an output": (1.8, 1.8),
}


def items(one: Compilation) -> int:
    """Weights that a thread handles in a turn."""
    return int(one.constants["BN"]) * 128 // (32 * one.num_warps)


EXPERTS = {  # by architecture: what differs from one to the next
    75: ("fp16, 1 row", False), 80: ("bf16, 1 row", True), 86: ("bf16, 1 row", False),
    89: ("bf16, 2048 rows", True), 90: ("bf16, 2048 rows", True), 120: ("bf16, 2048 rows", False),
}  # fmt: skip


@pytest.fixture(scope="module")
def launches() -> list[Compilation]:
    return recorded(*EXPERTS)


@pytest.fixture(scope="module")
def compiled(launches: list[Compilation]) -> dict[tuple[str, int], tuple[Compilation, Report]]:
    """By title and architecture: products of one row, and on two cards of 32 and 64."""
    titles = {f"{kind}, {dtype}, 1 row" for kind in LIMITS for dtype in ("fp16", "bf16")}
    more = {f"{kind}, fp16, {rows} rows" for kind in LIMITS for rows in (32, 64)}
    wanted = [
        one
        for one in launches
        if one.kernel.endswith("tiled:product")
        and one.targets[0] in TARGETS
        and (one.case in titles or (one.targets[0] in (89, 90) and one.case in more))
    ]
    return {(one.case, one.targets[0]): (one, report) for one, report in zip(wanted, compile_all(wanted), strict=True)}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", LIMITS)
def test_loops_over_weights(kind: str, compiled: dict[tuple[str, int], tuple[Compilation, Report]]) -> None:
    """Weights arrive by copies of 16 bytes under way, reach the product by LDSM as they are, and never by single bytes."""
    for dtype, limit in zip(("fp16", "bf16"), LIMITS[kind], strict=True):
        for target in TARGETS:
            title = f"{kind}, {dtype}, 1 row"
            one, report = compiled[title, target]
            registers, stack = (160, 8 if OLDER else 0) if "of 32" in kind else (128, 0)
            assert report.fits and report.turns and report.stack <= stack and report.registers <= registers, report
            assert report.per_weight(items(one)) <= limit, report
            copied = sum(n for name, n in report.loop.items() if name.startswith("LDGSTS") and name.endswith("128"))
            whole, rows = items(one) * one.constants["BITS"] // 128, one.constants["BM"]  # 16 bytes of a thread's weights
            assert copied >= whole and report.count("LDSM") == whole + rows // 2, report
            assert report.count("HMMA") == items(one) * rows // 64, report
            assert report.count("I2F", "LDS.U8", "LDS.S8", "LDG.E.U8", "LDG.E.S8", "LDL", "STL") == 0, report
            assert report.count("LDG.E", "STS") == 0, report


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_more_rows(compiled: dict[tuple[str, int], tuple[Compilation, Report]]) -> None:
    """Weights stay in registers, except where products take them from shared memory: with wgmma, from 64 rows on.

    Scales of groups are loaded where they are used if eight warps share 128 of them: the compiler copies no less than 4 bytes.
    """
    found = {case: report for case, (_, report) in compiled.items() if case[0].endswith("rows")}
    assert len(found) == 10
    for (title, target), report in found.items():
        assert report.fits and report.stack == 0 and report.count("LDGSTS"), report
        assert report.count("I2F", "LDS.U8", "LDG.E.U8") == 0, report
        if target == 90 and title.endswith("64 rows"):
            assert report.count("HGMMA") and not report.count("HMMA"), report
        else:
            assert report.count("HMMA") and report.count("LDSM") and report.count("STS") == 0, report


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_products_of_experts(launches: list[Compilation]) -> None:
    """Of Qwen3-30B-A3B: their loop is that of other products. docs/gpu-kernels.md has all, and Mixtral's."""
    wanted = [
        one
        for target, (title, gated) in EXPERTS.items()
        for one in launches
        if one.kernel.endswith("experts:product") and one.case == f"128 experts, 4 bits, {title}"
        if one.targets[0] == target and one.constants["GATED"] == gated
    ]
    assert len(wanted) == len(EXPERTS)
    for one, report in zip(wanted, compile_all(wanted), strict=True):
        assert report.fits and report.turns and report.stack <= (8 if OLDER else 0), report
        if report.target in TARGETS:
            assert report.per_weight(items(one)) <= (2.2 if "1 row" in one.case else 4.7), report
            assert report.count("HMMA", "HGMMA") and report.count("LDGSTS"), report
            assert report.count("I2F", "LDS.U8", "LDG.E.U8", "LDL", "STL") == 0, report
