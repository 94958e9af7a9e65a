"""The tests that a card runs, each file in a process of its own, several at a time: most of their time is compilation."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

from gpu_children import ROOT, Child

TESTS = {"kernels": ["tests/kernels/triton/test_*.py"], "engine": ["tests/runtime/test_cuda.py", "tests/runtime/test_startup.py"]}
WITHOUT_A_CARD = ("compilations", "kernel_report", "emulated")  # tests that need none, and run in every change's checks
LONG = {"test_attention.py": 4, "test_cuda.py": 3}  # files in so many parts, begun before the others
ALONE = {"test_startup.py": "on_a_card"}  # that take all of the card's memory; these files need hypothesis
AT_ONCE = max(2, min(12, 3 * (os.cpu_count() or 4) // 4))
QUIET = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # no test here needs one of the plugins that happen to be there
FINE = (0, 1, 5)  # exit codes of pytest: all passed, some failed, there were none
Report = dict[str, Any]


def found(part: str) -> list[Path]:
    paths = sorted(path for pattern in TESTS[part] for path in ROOT.glob(pattern))
    return [path for path in paths if not any(name in path.name for name in WITHOUT_A_CARD)]


def pytest_command(path: Path) -> list[str]:
    """Without hypothesis, which no test here draws from, also without what all tests of the project share and needs it."""
    settings = ["-c", str(ROOT / "scripts" / "gpu_pytest.ini"), "--rootdir", str(ROOT), "-q", "--maxfail=30"]
    settings += ["-p", "scripts.gpu_plugin", *(["-k", ALONE[path.name]] if path.name in ALONE else [])]
    marked = "not compiles"
    if importlib.util.find_spec("hypothesis") is None:
        settings += ["--confcutdir", str(path.parent)]
        marked += " and not realdata"
    return [sys.executable, "-m", "pytest", *settings, "-m", marked, str(path)]


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


def run(part: str, folder: Path, deadline: float) -> tuple[Report, str]:
    """(what came of them, the output of those that failed); ``folder`` is for their files."""
    begun, waiting = time.monotonic(), children(part, folder)
    running: list[Child] = []
    told: dict[str, str] = {}
    wrong: dict[str, str] = {}
    failed: dict[str, str] = {}
    logs = []
    while waiting or running:
        if time.monotonic() > deadline:
            wrong |= {child.name: "not begun" for child in waiting}
            waiting = []
        while waiting and len(running) < (1 if waiting[0].name in ALONE else AT_ONCE):
            running.append(waiting.pop(0))
            running[-1].start()
        for child in [child for child in running if child.over(deadline)]:
            running.remove(child)
            lines = child.output.splitlines()
            told[child.name] = "; ".join([*child.faults, *lines[-1:]])
            failed |= {note["failed"]: note["why"] for note in child.notes if "failed" in note}
            if child.faults or child.code not in (0, 5):
                wrong[child.name] = told[child.name]
                logs.append(f"=== {child.name}\n{child.output}\n")
            print(f"{child.name}: {told[child.name]}", *(lines[-40:-1] if child.name in wrong else ()), sep="\n  ", flush=True)
        time.sleep(0.1)
    report = {
        "exit_code": int(bool(wrong)),
        "summary": f"{len(told | wrong) - len(wrong)} of {len(told | wrong)} processes pass",
        "wrong": wrong,
        "failed": failed,
        "files": dict(sorted((wrong | told).items())),
        "seconds": round(time.monotonic() - begun),
    }
    return report, "".join(logs)
