"""The kernels as they are compiled for cards, their PTX executed by tests/emulator: a choice of this folder's own tests.

What the interpreter cannot see runs here: assembly, the order in which numbers are packed, layouts, asynchronous copies, Triton's
launcher, and every address. All tests that need no compilation of their own can be run so: ``APPLIANCE_EMULATE=90 scripts/test
tests/kernels/triton/test_attention.py``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests import warm
from tests.kernels.triton.conftest import INTERPRETED

ROOT = Path(__file__).parents[3]
# Ampere, the first card that multiplies FP8, Hopper with its products of four warps, and the newest.
CHOICE = {
    80: {
        "matmul": "before_and_after or (zero_points and 4-128-True)",
        "eight": "before_and_after",
        "attention": "borders and None-64",
        "rope": "test_heads",
        "store": "quantized_caches and 48",
        "norm": "add_rms_norm or rounding",
        "sampling": "cuts_that_nobody",
        "copy": "staging or order",
    },
    89: {"fp8": "every_number or activations", "attention": "test_caches and e4m3"},
    90: {"matmul": "before_and_after", "many": "with_a_gate", "attention": "test_head_sizes and 128 and not e5m2"},
    120: {"matmul": "before_and_after and 4-", "attention": "test_head_sizes and 128-None"},
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not INTERPRETED, reason="these tests run on a card already")
@pytest.mark.parametrize("card", CHOICE)
def test_compiled_code(card: int) -> None:
    """All of a card in one process: to start one takes as long as many of these tests."""
    files = {f"test_{file}.py": chosen for file, chosen in CHOICE[card].items()}
    chosen = " or ".join(f"({file} and ({which}))" for file, which in files.items())
    told = run(card, *(f"tests/kernels/triton/{file}" for file in files), "-vv", "-k", chosen)
    assert all(re.search(rf"{file}::.* PASSED", told) for file in files), told


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not INTERPRETED, reason="tests/runtime/test_cuda.py runs the engine on a card")
@pytest.mark.parametrize(("file", "chosen"), [("emulated_engine", "auto"), ("offload", "test")])
def test_whole_engine(file: str, chosen: str) -> None:
    """Other caches than the plain one take two minutes each: by hand."""
    run(90, f"tests/runtime/test_{file}.py", "-k", chosen)


def run(card: int, *tests: str) -> str:
    """pytest, in a process whose kernels are compiled for that card."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["APPLIANCE_EMULATE"] = str(card)
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    done = warm.run(*arguments, env=environment, cwd=ROOT, imported=warm.COMPILER)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, "nothing was chosen"
    return done.stdout
