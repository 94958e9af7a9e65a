"""The measurement of what HTTP costs runs, over the engine that pretends, as the server starts engines today."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_one_case(tmp_path: Path) -> None:
    command = ["scripts/bench_http.py", "--tokens", "200", "--pace", "5", "--streams", "2", "--cases", "completions"]
    done = subprocess.run(
        [sys.executable, *command, "--json", str(tmp_path / "found.json")], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| completions | 2 |" in done.stdout and json.loads((tmp_path / "found.json").read_text())
