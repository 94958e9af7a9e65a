"""``python -m pytest -p tests.amx_trap.plugin ...``: the tests meet a processor with AMX."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

from tests.amx_trap.library import Trap, load, prepare

LIBRARY = Path(os.environ["AMX_TRAP"]) if "AMX_TRAP" in os.environ else prepare(Path(tempfile.mkdtemp()))
CODE = load(LIBRARY)
TRAP = Trap(LIBRARY)  # now: it keeps standard error, which pytest is about to replace


def pytest_sessionstart() -> None:
    """After pytest's own handler of signals, and before anything asks for the instruction sets."""
    TRAP.take_over(CODE)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"tile instructions: {json.dumps(TRAP.counts() | {'unvisited': TRAP.unvisited(CODE)})}")
