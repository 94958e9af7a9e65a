"""Nothing here mixes what lies on the host with what lies on the card, which no machine without a card would notice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.triton.conftest import INTERPRETED

ROOT = Path(__file__).parents[3]
FILES = "elementwise gate norm store rope embedding ops weights matmul many eight fp8 stack stream copy transfer"
FILES += " select sampling trial"


def run(*tests: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-O", "-m", "pytest", "-q", "--assert=plain", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "no:schemathesis", "-p", "tests.kernels.triton.elsewhere", "-m", "not compiles and not realdata", *tests]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


@pytest.mark.skipif(not INTERPRETED, reason="there is a card, which says so itself")
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_whatever_a_card_is_given_lies_there() -> None:
    """All tests of these files. Results mean nothing, so that no test ends before all of its calls."""
    done = run(*(f"tests/kernels/triton/test_{name}.py" for name in FILES.split()))
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(not INTERPRETED, reason="there is a card, which says so itself")
def test_the_hosts_memory_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "test_wrong.py").write_text(
        """import torch
from tests.kernels.triton.conftest import DEVICE
from kernels.triton.elementwise import silu_mul

def test_kernel() -> None: silu_mul(torch.zeros(1, 8))
def test_torch() -> None: torch.zeros(3, device=DEVICE) + torch.zeros(3)
def test_index() -> None: torch.zeros(3, device=DEVICE)[torch.tensor([0, 2])]
def test_right() -> None: silu_mul(torch.zeros(1, 8).to(DEVICE))
"""
    )
    told = run(str(tmp_path / "test_wrong.py")).stdout
    assert "2 failed, 2 passed" in told and "_gate_mul is given the host's memory: torch.float32 [1, 8]" in told, told
    assert "some of its tensors are on the card, and some are not" in told
