"""The report of what kernels compile to: its arithmetic of occupancy, and that docs/gpu-kernels.md has every kernel there is."""

from __future__ import annotations

import json
import re
import struct
import subprocess
from collections import defaultdict
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

from tests.kernels.triton import aot
from tests.kernels.triton.aot import hot_loop
from tests.kernels.triton.cards import CARDS, occupancy
from tests.kernels.triton.launches import kernel_names, recorded

DOCUMENT = Path(__file__).parents[3] / "docs" / "gpu-kernels.md"


@pytest.mark.parametrize(
    ("target", "used", "blocks", "share", "limit"),
    [
        # The CUDA Best Practices Guide's example: 37 registers, blocks of 128 and of 320 threads, 64 warps a multiprocessor.
        (80, {"registers": 37, "shared": 0, "warps": 4}, 12, 0.75, "registers"),
        (80, {"registers": 37, "shared": 0, "warps": 10}, 4, 0.625, "registers"),
        (80, {"registers": 32, "shared": 0, "warps": 8}, 8, 1.0, "registers"),
        (89, {"registers": 255, "shared": 0, "warps": 8}, 1, 8 / 48, "registers"),  # 65536 / (256 * 256)
        (89, {"registers": 32, "shared": 0, "warps": 1}, 24, 0.5, "blocks"),
        (86, {"registers": 32, "shared": 0, "warps": 1}, 16, 16 / 48, "blocks"),
        (75, {"registers": 64, "shared": 32768, "warps": 4}, 2, 0.25, "shared memory"),  # nothing is taken by the system there
        (89, {"registers": 64, "shared": 50 * 1024, "warps": 4}, 1, 4 / 48, "shared memory"),  # 51 KB twice are more than 100
        (90, {"registers": 64, "shared": 56 * 1024, "warps": 4}, 4, 0.25, "shared memory"),  # 57 KB four times are 228
        (90, {"registers": 16, "shared": 0, "warps": 16}, 4, 1.0, "warps"),
        (89, {"registers": 64, "shared": 100 * 1024, "warps": 4}, 0, 0.0, "shared memory"),  # more than a block may have
    ],
)
def test_occupancy(target: int, used: dict[str, int], blocks: int, share: float, limit: str) -> None:
    found = occupancy(target, **used)
    assert (found.blocks, found.warps, found.limit) == (blocks, blocks * used["warps"], limit)
    assert found.share == pytest.approx(share)


def test_hot_loop() -> None:
    """The longest of two loops, predicated instructions too; everything where no branch goes back."""
    lines = [
        "MOV R1, R2",
        "@P0 LDG.E R3, [R4]",
        "@!P1 BRA 0x10",
        "HMMA.16816.F32 R8, R2",
        "NOP",
        "@UP0 BRA 0x10",
        "BRA 0x60",
        "EXIT",
    ]
    code = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    assert hot_loop(code) == ({"LDG.E": 1, "BRA": 2, "HMMA.16816.F32": 1}, True)
    straight = code.replace("BRA 0x10", "BRA 0x70")
    assert hot_loop(straight) == ({"MOV": 1, "LDG.E": 1, "BRA": 3, "HMMA.16816.F32": 1, "EXIT": 1}, False)


def test_instructions_of_a_kernel() -> None:
    """The bytes of its section of code, whatever else is in the file and wherever the table of sections is."""
    names, code, more = b"\0.shstrtab\0.text.kernel\0.text\0", bytes(range(64)), b"no code"
    parts = [(0, 0, b""), (1, 3, names), (24, 1, more), (11, 1, code)]  # name, type, content
    at, table, body = 0x40, b"", b""
    for name, kind, content in parts:
        table += struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, at + len(body), len(content), 0, 0, 1, 0)
        body += content
    header = bytearray(0x40)
    struct.pack_into("<Q", header, 0x28, at + len(body))
    struct.pack_into("<HHH", header, 0x3A, 64, len(parts), 1)
    assert aot.instructions(bytes(header) + body + table) == code


def test_nobody_compiles_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler whose tests were killed is not left behind with minutes of work."""
    asked = json.dumps([[asdict(aot.Compilation("no.module:kernel", {}, targets=(80,)))], False])
    assert "No module named" in aot.answer(asked)
    monkeypatch.setattr(aot.os, "getppid", lambda: 1)
    with pytest.raises(SystemExit):
        aot.answer(asked)


def test_an_answer_that_would_come_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test's time is over its compiler ends: what that still says would pass for the answer to the next test."""

    class Over:
        def readline(self) -> str:
            raise TimeoutError

    made = [subprocess.Popen(["cat"], stdin=subprocess.PIPE, text=True)]
    made[0].stdout = Over()  # type: ignore[assignment]
    monkeypatch.setattr(aot, "compiler", cache(made.pop))
    process = aot.compiler()
    with pytest.raises(TimeoutError):
        aot.compile_all([])
    assert process.returncode is not None and not aot.compiler.cache_info().currsize


def test_every_kernel_is_in_the_document() -> None:
    """Else run scripts/gpu_kernels (minutes), after adding to tests/kernels/triton/launches.py what is new."""
    launched = defaultdict(set)
    for one in recorded(89, 90):  # together they launch everything
        launched[one.kernel.removeprefix("kernels.triton.")].add((one.case, str(one.targets[0])))
    assert set(launched) == {name.removeprefix("kernels.triton.") for name in kernel_names()}, "a case for launches.py is needed"
    sections = dict(re.findall(r"^### (\S+)\n(.*?)(?=^###|\Z)", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL))
    assert set(sections) == set(launched)
    for kernel, rows in sections.items():
        found = set(re.findall(r"^\| (.+?)(?: #\d+)? \| sm_(\d+) \|", rows, re.MULTILINE))
        assert {(title, target) for title, target in found if target in ("89", "90")} == launched[kernel], kernel
    every = set(re.findall(r"\| sm_(\d+) \| \d+ \|", DOCUMENT.read_text()))
    assert every == {str(target) for target in CARDS}
