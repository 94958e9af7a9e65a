from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from appliance import doctor
from kernels.cpu import backend


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "appliance", "doctor", *args]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, check=False)


def test_tells_the_kernels_in_use_and_what_the_machine_can_run() -> None:
    report = doctor.examine()
    assert report.healthy and report.kernels == backend.name() and report.kernels_available == backend.available()
    assert report.physical_cores >= 1 and report.memory_gib > 0 and report.torch
    assert set(doctor.COSTS) >= set(backend.available())
    text = report.text()
    assert report.kernels in text and text.endswith("ready to serve")


def test_json_and_exit_codes() -> None:
    done = run("--json", APPLIANCE_CPU_ISA="torch")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["kernels"] == "torch" and "torch's operators" in told["costs"]


def test_what_cannot_run_is_a_problem_with_a_remedy() -> None:
    done = run(APPLIANCE_CPU_ISA="mmx")
    assert done.returncode == 1 and "ready" not in done.stdout
    assert "APPLIANCE_CPU_ISA is 'mmx', but this processor runs" in done.stdout and "Traceback" not in done.stderr


def test_says_how_to_get_the_kernels_where_they_were_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "native", lambda: None)
    monkeypatch.delenv("APPLIANCE_CPU_ISA", raising=False)
    report = doctor.examine()
    assert report.healthy and report.kernels == "torch" and not report.kernels_built
    assert "install a C++ compiler" in report.text()


def test_a_card_is_told_with_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho NVIDIA T4, 7.5, 15360, 15000\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    told = "NVIDIA T4, sm_75, 14.65 GiB of 15.00 GiB free; used with --device cuda; no bfloat16: activations in float16"
    assert doctor.card() == told
    script.write_text("#!/bin/sh\necho No devices were found; exit 6\n")
    assert doctor.card().startswith("no NVIDIA card answers on this machine (nvidia-smi failed)")
    monkeypatch.setenv("PATH", "")
    assert doctor.card() == "none found"


def test_an_extension_that_does_not_load_is_a_problem(tmp_path: Path) -> None:
    done = run(APPLIANCE_NATIVE=str(tmp_path / "absent.so"))
    assert done.returncode == 1 and "which is not an extension file" in done.stdout
