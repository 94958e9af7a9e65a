"""Processes that are forks of a warm one are what Python itself would have begun, as far as tests look at them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm

TOLD = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), sys.stdin.read(), os.environ.get("SAID"), __name__]))
print("words", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("how", ["-c", "-m", "file"])
def test_it_is_what_python_begins(how: str, tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(TOLD)
    args = {"-c": ("-c", TOLD), "-m": ("-m", "told"), "file": ("told.py",)}[how]
    given = warm.plain() | {"SAID": "so", "PYTHONDONTWRITEBYTECODE": "1"}
    found = warm.run(*args, "a", "b c", cwd=tmp_path, input="däta", env=given, imported=("json",))
    command = [sys.executable, *args, "a", "b c"]
    expected = subprocess.run(command, cwd=tmp_path, input="däta", env=given, capture_output=True, text=True, check=False)
    assert (
        (found.returncode, found.stdout, found.stderr) == (3, expected.stdout, "words\n") == (3, expected.stdout, expected.stderr)
    )


def test_one_does_not_see_another(tmp_path: Path) -> None:
    """Nor what ended badly; its template has nothing of ours, and what it has been told to import."""
    code = "import os, sys; sys.seen = getattr(sys, 'seen', 0) + int(os.environ.setdefault('SEEN', '1')); print(sys.seen, "
    code += "'appliance' in sys.modules, 'fractions' in sys.modules)"
    imported = ("fractions",)
    assert [warm.run("-c", code, cwd=tmp_path, imported=imported).stdout for _ in range(2)] == ["1 False True\n"] * 2
    killed = warm.run("-c", "import os; os.kill(os.getpid(), 9)", cwd=tmp_path, imported=imported)
    wrong = warm.run("-c", "print('before', flush=True); 1 / 0", cwd=tmp_path, imported=imported)
    said = warm.run("-c", "import sys; sys.exit('no')", cwd=tmp_path, imported=imported)
    assert killed.returncode == -9 and (wrong.returncode, wrong.stdout) == (1, "before\n") and "ZeroDivisionError" in wrong.stderr
    assert (said.returncode, said.stderr) == (1, "no\n")


def test_the_path_is_its_own(tmp_path: Path) -> None:
    for name in ("sitecustomize", "there"):
        (tmp_path / f"{name}.py").write_text("import sys\nsys.customized = True\n")
    code = "import sys, there; print(sys.customized)"
    given = warm.plain() | {"PYTHONPATH": str(tmp_path)}
    assert warm.run("-c", code, cwd=Path("/"), env=given, imported=("json",)).stdout == "True\n"
    assert "No module named 'there'" in warm.run("-c", code, cwd=Path("/"), imported=("json",)).stderr
    same = warm.run("-c", "import sys; print(sys.path)", cwd=tmp_path, imported=("json",))
    plain = subprocess.run(
        [sys.executable, "-c", "import sys; print(sys.path)"], env=warm.plain(), capture_output=True, text=True
    )
    assert same.stdout == plain.stdout
