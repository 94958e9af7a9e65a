"""The two commands' set-up, with a stand-in for Python and pip: no network, no real environment."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
TOOLS = "bash cat cksum cp dirname env find mkdir rm sleep chmod"
INPUTS = ("pyproject.toml", "constraints.txt", "CMakeLists.txt", "kernels/cpu/native/vec.h")  # of an installation

STAND_IN = f"""#!/usr/bin/env bash
echo "$*" >>"$LOG"
case "$1 $2" in
"-m venv")
    trap 'echo Traceback; exit 1' INT  # as Python does
    sleep "${{VENV_TAKES:-0}}"
    mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
"-m pip")
    sleep "${{PIP_TAKES:-0}}"
    case ${{PIP_DOES:-}} in fail) exit 1 ;; die) kill -9 $$ ;; esac
    printf '#!/bin/sh\\nprintf "<%%s>" "$@"\\nexit 7\\n' >"$(dirname "$0")/appliance"
    chmod +x "$(dirname "$0")/appliance" ;;
"-c import kernels.cpu._native") exit "${{NO_KERNELS:-0}}" ;;
"-m pytest") shift 2; printf "<%s>" "$@" ;;
*) exec "{sys.executable}" "$@" ;;
esac
"""


class Checkout:
    """A folder (with a space in its name) that holds the scripts, and a PATH on which the only Python is the stand-in."""

    def __init__(self, tmp: Path) -> None:
        self.root, self.tools, self.log = tmp / "a checkout", tmp / "bin", tmp / "log"
        self.tools.mkdir()
        for name in ("scripts/run", "scripts/test", "scripts/setup.sh", *INPUTS):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        for tool in TOOLS.split():
            (self.tools / tool).symlink_to(str(shutil.which(tool)))
        self.python("python3.12", STAND_IN)

    def python(self, name: str, text: str) -> None:
        path = self.tools / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def start(self, script: str, *args: str, **env: str) -> subprocess.Popen[str]:
        environment = {"PATH": str(self.tools), "HOME": str(self.root.parent), "LOG": str(self.log), **env}
        command = [str(self.root / "scripts" / script), *args]
        return subprocess.Popen(
            command, cwd="/", env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )

    def run(self, script: str, *args: str, **env: str) -> tuple[int, str, str]:
        process = self.start(script, *args, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def calls(self, module: str) -> list[str]:
        """The stand-in's calls of ``-m module`` so far."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if line.startswith(f"-m {module} ")]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_first_run_installs_then_passes_arguments_and_status_on(checkout: Checkout) -> None:
    status, out, err = checkout.run("run", "serve", "two words", "", "*")
    assert (status, out) == (7, "<serve><two words><><*>")
    assert "making .venv with python3.12" in err and "pip install -c constraints.txt -e ." in err
    assert [call.split(" -c ")[1] for call in checkout.calls("pip")] == ["constraints.txt -e ."]
    assert checkout.run("run", "plan") == (7, "<plan>", ""), "a second start says and installs nothing"
    assert len(checkout.calls("pip")) == len(checkout.calls("venv")) == 1


def test_what_was_installed_for_tests_serves_to_run_but_not_the_reverse(checkout: Checkout) -> None:
    checkout.run("run")
    checkout.run("test")
    assert [call.split(" -c constraints.txt ")[1] for call in checkout.calls("pip")] == ["-e .", "-r .venv/dev.txt"]
    told = (checkout.root / ".venv" / "dev.txt").read_text().splitlines()
    assert told == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    (checkout.root / "constraints.txt").write_text("torch==0\n")
    checkout.run("test")
    checkout.run("run")
    assert [call.split(" -c constraints.txt ")[1] for call in checkout.calls("pip")][2:] == ["-e .[dev]"]
    assert len(checkout.calls("venv")) == 1


def test_says_once_that_the_kernels_could_not_be_built(checkout: Checkout) -> None:
    status, _, err = checkout.run("run", NO_KERNELS="1")
    assert status == 7 and "the native CPU kernels were not built" in err and "apt install g++" in err
    assert checkout.run("run", NO_KERNELS="1")[2] == ""


@pytest.mark.parametrize("name", INPUTS)
def test_a_change_of_what_is_wanted_installs_again(checkout: Checkout, name: str) -> None:
    checkout.run("run")
    path = checkout.root / name
    path.write_text(path.read_text() + "\n# changed\n")
    assert checkout.run("run")[0] == 7
    assert len(checkout.calls("pip")) == 2 and len(checkout.calls("venv")) == 1


def test_a_moved_folder_installs_again(checkout: Checkout) -> None:
    checkout.run("run")
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    assert checkout.run("run")[0] == 7
    assert len(checkout.calls("pip")) == 2


def test_a_killed_pip_has_the_environment_made_anew(checkout: Checkout) -> None:
    status, _, err = checkout.run("run", PIP_DOES="die")
    assert status == 1 and "the installation failed (pip's exit status is 137)" in err
    (checkout.root / ".venv" / "half a package").mkdir()
    status, out, _ = checkout.run("run", "x")
    assert (status, out) == (7, "<x>") and len(checkout.calls("venv")) == 2
    assert not (checkout.root / ".venv" / "half a package").exists()


def test_a_killed_script_has_the_environment_made_anew(checkout: Checkout) -> None:
    process = checkout.start("run", PIP_TAKES="1")
    while not checkout.calls("pip"):
        assert process.poll() is None
    process.kill()
    process.communicate()
    status, out, _ = checkout.run("run", "x")
    assert (status, out) == (7, "<x>") and len(checkout.calls("venv")) == 2


@pytest.mark.parametrize("module", ["venv", "pip"])
def test_a_stopped_set_up_says_how_to_go_on(checkout: Checkout, module: str) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that ignores ^C from the start cannot hear it
    try:
        process = checkout.start("run", **{f"{module.upper()}_TAKES": "30"})
    finally:
        signal.signal(signal.SIGINT, before)
    while not checkout.calls(module):
        assert process.poll() is None
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # what ^C does
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err.endswith("scripts/run: stopped; run this again to go on\n")
    assert "Traceback" not in err and "failed" not in err
    status, out, _ = checkout.run("run", "x")
    assert (status, out) == (7, "<x>") and len(checkout.calls("venv")) == 2


def test_a_pip_that_refused_is_asked_again_in_the_same_environment(checkout: Checkout) -> None:
    status, _, err = checkout.run("run", PIP_DOES="fail")
    assert status == 1 and "pip's exit status is 1); run this again when the cause is mended" in err
    assert checkout.run("run")[0] == 7
    assert len(checkout.calls("venv")) == 1


def test_an_environment_without_its_python_is_made_anew(checkout: Checkout) -> None:
    checkout.run("run")
    (checkout.root / ".venv" / "bin" / "python").unlink()
    assert checkout.run("run")[0] == 7
    assert len(checkout.calls("venv")) == 2


def test_two_at_once_install_once(checkout: Checkout) -> None:
    both = [checkout.start("run", "a", PIP_TAKES="1"), checkout.start("run", "b", PIP_TAKES="1")]
    assert [process.communicate(timeout=60)[0] for process in both] == ["<a>", "<b>"]
    assert len(checkout.calls("pip")) == len(checkout.calls("venv")) == 1


def test_says_which_pythons_will_not_do(checkout: Checkout) -> None:
    (checkout.tools / "python3.12").unlink()
    status, _, err = checkout.run("run")
    assert status == 1 and "Python 3.11 or newer is needed" in err and "Found, but of no use" not in err
    checkout.python("python3", "#!/bin/sh\necho is 3.9\n")
    checkout.python("python", "#!/bin/sh\nexit 127\n")
    status, _, err = checkout.run("run")
    assert status == 1 and "python3 is 3.9\n" in err and "python does not run" in err


def test_a_python_may_be_named(checkout: Checkout) -> None:
    named = (checkout.tools / "python3.12").rename(checkout.root.parent / "my python")
    assert checkout.run("run", PYTHON=str(named))[0] == 7


CALLS = [((), False), (("-q", "-x"), False), (("tests/a.py::b",), True), (("-k", "a or b"), True), (("-n0",), True)]


@pytest.mark.parametrize(("args", "alone"), CALLS)
def test_tests_run_side_by_side_unless_chosen(checkout: Checkout, args: tuple[str, ...], alone: bool) -> None:
    status, out, _ = checkout.run("test", *args)
    given = "".join(f"<{argument}>" for argument in args)
    assert status == 0 and out.endswith(given)
    assert ("<--dist><loadfile>" in out) == (len(os.sched_getaffinity(0)) > 1 and not alone)


def test_constraints_pin_every_dependency_and_nothing_that_torchs_builds_pin_themselves() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {Requirement(text).name for text in project["dependencies"] + project["optional-dependencies"]["dev"]}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert {canonicalize_name(name) for name in wanted} <= set(pins)
    assert all(pins.values()) and not [version for version in pins.values() if "+" in version]
    others = pins.keys() - wanted  # nvidia-ml-py is wanted by this project itself
    theirs = [name for name in others if name == "triton" or name.startswith(("nvidia-", "cuda-"))]
    assert not theirs, "the CUDA build has its own"
