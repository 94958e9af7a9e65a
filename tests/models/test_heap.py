"""What glibc does with memory once a model is loaded."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

ALONE = """
import psutil
from kernels.layout import KEPT_BYTES
from models.heap import prompt_release
with prompt_release():
    pass
count, size = 16, KEPT_BYTES + 16384
large, small = [], []
for _ in range(count):
    large.append(b"1" * size)
    small.append(b"1" * 1024)
before = psutil.Process().memory_info().rss
del large
print((before - psutil.Process().memory_info().rss) / (count * size))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt") or sys.platform != "linux", reason="it is glibc's")
def test_large_blocks_leave_no_holes() -> None:
    """Small ones between them stay, and hold nothing else back. In a process without holes that others have left."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and float(done.stdout) > 0.9, (done.stdout, done.stderr)
