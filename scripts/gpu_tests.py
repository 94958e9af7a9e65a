"""The tests that a card runs, each file in a process of its own, several at a time: most of their time is compilation."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu_children import ROOT, Child

TESTS = {"kernels": ["tests/kernels/triton/test_*.py"], "engine": ["tests/runtime/test_cuda.py", "tests/runtime/test_startup.py"]}
WITHOUT_A_CARD = ("compilations", "kernel_report", "emulated", "elsewhere", "card_engine")
"""Tests that need none, and run in every change's checks."""
LONG = {"test_attention.py": 8, "test_cuda.py": 4, "test_norm.py": 3}
LONG |= {f"test_{name}.py": 2 for name in ("eight", "many", "matmul", "rope", "stack")}
"""Files in so many parts, begun before the others: those that compile about a hundred kernels or more."""
ALONE = {"test_startup.py": "on_a_card"}  # that take all of the card's memory; these files need hypothesis
AT_ONCE = max(2, min(12, 3 * (os.cpu_count() or 4) // 4))
# No test here needs one of the plugins that happen to be there; torch's own threads would only be in each other's way.
QUIET = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
HANGS_S = 120  # after which a test's stacks are printed
WHY = 6  # tests in which a process ended that are run once more, each alone, to see why
FINE = (0, 1, 5)  # exit codes of pytest: all passed, some failed, there were none
Report = dict[str, Any]
Seen = Callable[[Report, str], None]


def found(part: str) -> list[Path]:
    paths = sorted(path for pattern in TESTS[part] for path in ROOT.glob(pattern))
    return [path for path in paths if not any(name in path.name for name in WITHOUT_A_CARD)]


def pytest_command(path: Path, test: str = "") -> list[str]:
    """Without hypothesis, which no test here draws from, also without what all tests of the project share and needs it."""
    settings = ["-c", str(ROOT / "scripts" / "gpu_pytest.ini"), "--rootdir", str(ROOT), "-q", "--maxfail=30"]
    settings += [
        "-p",
        "gpu_plugin",
        "-o",
        f"faulthandler_timeout={HANGS_S}",
        *(["-k", ALONE[path.name]] if path.name in ALONE else []),
    ]
    marked = "not compiles"
    if importlib.util.find_spec("hypothesis") is None:
        settings += ["--confcutdir", str(path.parent)]
        marked += " and not realdata"
    return [sys.executable, "-m", "pytest", *settings, "-m", marked, f"{path}::{test}" if test else str(path)]


def children(part: str, folder: Path) -> list[Child]:
    """Those that take longest first, those that run alone last."""
    made = []
    paths = [path for path in found(part) if path.name not in ALONE or importlib.util.find_spec("hypothesis") is not None]
    for path in sorted(paths, key=lambda path: (path.name in ALONE, path.name not in LONG)):
        parts = LONG.get(path.name, 1)
        for i in range(parts):
            name = path.name if parts == 1 else f"{path.name} {i + 1}/{parts}"
            made.append(Child(name, pytest_command(path), folder, fine=FINE, **QUIET, GPU_SHARD=f"{i}/{parts}"))
    return made


def reasons(part: str, folder: Path, child: Child) -> Iterator[Child]:
    """The tests in which a process ended, each alone with a launch at a time (so that the kernel that is to blame is in the
    stack), and, where that is installed, under compute-sanitizer, which names what is read or written beside its memory.
    """
    path = next(path for path in found(part) if child.name.startswith(path.name))
    one_by_one = {**QUIET, "CUDA_LAUNCH_BLOCKING": "1"}
    if part == "kernels":  # nothing is recorded there
        one_by_one["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    checker = shutil.which("compute-sanitizer")
    for test in dict.fromkeys(child.ended_at):
        command = pytest_command(path, test.partition("::")[2])
        yield Child(f"one launch at a time: {test}", command, folder, fine=range(-64, 256), **one_by_one)
        if checker is not None:
            checked = [checker, "--tool", "memcheck", "--print-limit", "20", *command]
            yield Child(f"compute-sanitizer: {test}", checked, folder, fine=range(-64, 256), **one_by_one)


class Results:
    """What came of tests so far."""

    def __init__(self, part: str, folder: Path, names: list[str]) -> None:
        """``names``: of all processes that are to be."""
        self.part, self.folder, self.names, self.begun = part, folder, names, time.monotonic()
        self.told: dict[str, str] = {}
        self.wrong: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.again: dict[str, str] = {}
        self.slow: dict[str, float] = {}
        self.compiled: list[tuple[float, str]] = []
        self.log = ""
        self._waiting: list[Child] = []  # to be run once all else is over

    def add(self, child: Child) -> None:
        """One that is over."""
        lines, notes = child.output.splitlines(), child.notes
        told = "; ".join([*child.faults, *lines[-1:]])
        self.slow |= {note["slow"]: note["seconds"] for note in notes if "slow" in note}
        self.compiled += [(note["seconds"], note["compiled"]) for note in notes if "compiled" in note]
        self.failed |= {note["failed"]: note["why"] for note in notes if "failed" in note}
        self.told[child.name] = told
        bad = bool(child.faults) or child.code not in (0, 5)
        if bad:
            self.wrong[child.name] = told
            self.log += f"=== {child.name}\n{child.output}\n"
            self._waiting += reasons(self.part, self.folder, child)
        print(f"{child.name}: {told}", *(lines[-40:-1] if bad else ()), sep="\n  ", flush=True)

    def look_again(self) -> list[Child]:
        tests = list(dict.fromkeys(child.name.partition(": ")[2] for child in self._waiting))[:WHY]
        return [child for child in self._waiting if child.name.partition(": ")[2] in tests]

    def explain(self, child: Child) -> None:
        """One of ``look_again`` that is over."""
        self.again[child.name] = "; ".join([*child.faults, *child.output.splitlines()[-1:]])
        self.log += f"=== {child.name}\n{child.output}\n"

    @property
    def report(self) -> Report:
        seconds, longest = sum(took for took, _ in self.compiled), sorted(self.compiled, reverse=True)[:5]
        return {
            "exit_code": int(bool(self.wrong)),
            "summary": f"{len(self.told.keys() - self.wrong)} of {len(self.names)} processes pass",
            "wrong": self.wrong,
            "failed": self.failed,
            "again": self.again,
            "files": dict(sorted((dict.fromkeys(self.names, "not over yet") | self.wrong | self.told).items())),
            "compiled": {"kernels": len(self.compiled), "seconds": round(seconds), "longest": longest},
            "slow": dict(sorted(self.slow.items(), key=lambda one: -one[1])),
            "seconds": round(time.monotonic() - self.begun),
        }


def run(part: str, folder: Path, deadline: float, seen: Seen = lambda report, log: None) -> tuple[Report, str]:
    """(what came of them, the output of those that failed), which ``seen`` is told whenever there is more.

    ``folder`` is for their files.
    """
    waiting = children(part, folder)
    results = Results(part, folder, [child.name for child in waiting])

    def tell(done: Callable[[Child], None], child: Child) -> None:
        done(child)
        seen(results.report, results.log)

    for child in all_of(waiting, deadline, lambda child: tell(results.add, child)):
        results.wrong[child.name] = "not begun"
    for child in all_of(results.look_again(), deadline, lambda child: tell(results.explain, child)):
        results.again[child.name] = "not begun"
    return results.report, results.log


def all_of(waiting: list[Child], deadline: float, done: Callable[[Child], None]) -> list[Child]:
    """Run them, several at a time, and say of each when it is over; what there was no time for comes back."""
    waiting, running = list(waiting), list[Child]()
    while running or (waiting and time.monotonic() <= deadline):
        while waiting and time.monotonic() <= deadline and len(running) < (1 if waiting[0].name in ALONE else AT_ONCE):
            running.append(waiting.pop(0))
            running[-1].start()
        for child in [child for child in running if child.over(deadline)]:
            running.remove(child)
            done(child)
        time.sleep(0.1)
    return waiting
