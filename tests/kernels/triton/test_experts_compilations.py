"""Products of experts compiled for cards that are not here: they fit, nothing spills, and their loop is that of other products.

Shapes are those of Qwen3-30B-A3B. docs/gpu-kernels.md has more of them, and Mixtral's.
"""

from __future__ import annotations

import pytest

from tests.kernels.triton.aot import OLDER, compile_all
from tests.kernels.triton.launches import recorded
from tests.kernels.triton.test_gate_compilations import items

CHOICE = {75: {"fp16, 1 row": 2}, 80: {"bf16, 1 row": 1}, 86: {"bf16, 1 row": 1}, 120: {"bf16, 1 row": 1}}  # which, and how many
CHOICE |= {89: {"bf16, 1 row": 2, "bf16, 2048 rows": 2}, 90: {"bf16, 2048 rows": 1}}
LIMIT = {"1 row": 2.2, "2048 rows": 4.7}  # instructions for a weight


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_products_of_experts() -> None:
    every = [one for one in recorded(*CHOICE) if one.kernel.endswith("experts:product")]
    wanted = []
    for target, titles in CHOICE.items():
        for title, count in titles.items():
            found = [one for one in every if one.case == f"128 experts, 4 bits, {title}" and one.targets[0] == target]
            assert [one.constants["GATED"] for one in found] == [True, False], title
            wanted += found[:count]
    for one, report in zip(wanted, compile_all(wanted), strict=True):
        assert report.fits and report.turns and report.stack <= (8 if OLDER else 0), report
        if report.target > 75:  # where there are matrix instructions and asynchronous copies
            assert report.per_weight(items(one)) <= LIMIT[one.case.rpartition(", ")[2]], report
            assert report.count("HMMA", "HGMMA") and report.count("LDGSTS") and not report.count("I2F", "LDS.U8", "LDL", "STL"), (
                report
            )
