from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from appliance import doctor
from appliance.diagnosis import system
from appliance.diagnosis.card import Installed, examine_cards, uncompiled
from appliance.diagnosis.findings import SEVERITIES, Finding
from appliance.diagnosis.measure import file_system, memory_speed
from appliance.memory import devices, proofs
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
    monkeypatch.setenv("APPLIANCE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(proofs, "torch_cuda", lambda: "12.8")
    monkeypatch.setattr(doctor, "torch_cuda", lambda: "12.8")
    told = "NVIDIA T4, sm_75, 14.65 GiB of 15.00 GiB free; used with --device cuda; no bfloat16: activations in float16"
    assert doctor.card() == told
    proofs.remember(proofs.SEPARATOR.join([proofs.card_key(devices.this_device("cuda")), "float16"]))
    assert doctor.card() == told.replace("used with --device cuda", "used, unless --device is cpu")
    assert doctor.examine().device == "cuda"
    monkeypatch.setattr(doctor, "torch_cuda", lambda: None)
    assert "; not used: the torch that is installed is none for cards;" in doctor.card()
    monkeypatch.setattr(doctor, "torch_cuda", lambda: "12.8")
    script.write_text("#!/bin/sh\necho NVIDIA V100, 7.0, 15360, 15000\n")
    assert "; not used: the kernels are made for sm_75 and later;" in doctor.card()
    script.write_text("#!/bin/sh\necho No devices were found; exit 6\n")
    assert doctor.card().startswith("no NVIDIA card answers on this machine (nvidia-smi failed)")
    monkeypatch.setenv("PATH", "")
    assert doctor.card() == "none found"


def test_an_extension_that_does_not_load_is_a_problem(tmp_path: Path) -> None:
    done = run(APPLIANCE_NATIVE=str(tmp_path / "absent.so"))
    assert done.returncode == 1 and "which is not an extension file" in done.stdout


def machine(root: Path, **files: str) -> Path:
    """A machine's files: ``proc_loadavg`` is /proc/loadavg, where __ stands for _."""
    for name, text in files.items():
        path = root / name.replace("__", "\0").replace("_", "/").replace("\0", "_")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


FREQUENCY = "sys_devices_system_cpu_cpu0_cpufreq_"
FINE = {
    "proc_cpuinfo": "model name : Fast\nflags\t\t: avx2 amx_tile amx_int8\n",
    "proc_loadavg": "0.10 0.10 0.10 1/100 1",
    "proc_stat": "cpu  100 0 100 800 0 0 0 10 0 0\n",
    "proc_meminfo": "MemTotal: 67108864 kB\nMemAvailable: 60000000 kB\nSwapTotal: 8388608 kB\nSwapFree: 8388608 kB\n",
    "proc_self_cgroup": "0::/unit\n",
    "sys_kernel_mm_transparent__hugepage_enabled": "always [madvise] never",
    f"{FREQUENCY}scaling__governor": "performance",
}
AMX = ("amx", "avx512_bf16", "torch")


def said(
    root: Path, *, cores: int = 8, allowed: int = 16, isa: tuple[str, ...] = AMX, total: int = 64 << 30
) -> dict[str, Finding]:
    found = [*system.processors(root, cores, allowed, isa), *system.memory(root, total)]
    assert all(one.what and one.costs and one.remedy and one.severity in SEVERITIES for one in found)
    assert len({one.name for one in found}) == len(found)
    return {one.name: one for one in found}


def test_a_machine_that_is_as_it_should_be(tmp_path: Path) -> None:
    assert said(machine(tmp_path, **FINE)) == {}
    assert said(tmp_path / "nothing") == {}, "where there are no such files there is nothing to say"


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("huge_pages", {"sys_kernel_mm_transparent__hugepage_enabled": "always madvise [never]"}, "echo madvise >"),
        ("cpu_governor", {f"{FREQUENCY}scaling__governor": "powersave"}, "cpupower frequency-set -g performance"),
        ("cpu_preference", {f"{FREQUENCY}energy__performance__preference": "power"}, "balance_performance"),
        ("cpu_clock", {f"{FREQUENCY}scaling__max__freq": "2000000", f"{FREQUENCY}cpuinfo__max__freq": "4200000"}, "-u 4200MHz"),
        ("cpu_busy", {"proc_loadavg": "6.50 1 1 1/1 1"}, "6.5 threads"),
        ("cpu_steal", {"proc_stat": "cpu  100 0 100 600 0 0 0 200 0 0\n"}, "20 % of the time"),
        ("swap", {"proc_meminfo": "MemAvailable: 60000000 kB\nSwapTotal: 8388608 kB\nSwapFree: 4194304 kB\n"}, "4.00 GiB"),
        ("memory_low", {"proc_meminfo": "MemAvailable: 1048576 kB\n"}, "only 1.00 GiB"),
        ("numa", {"sys_devices_system_node_node0_x": "", "sys_devices_system_node_node1_x": ""}, "numactl --interleave=all"),
        ("cpu_quota", {"sys_fs_cgroup_unit_cpu.max": "250000 100000"}, "--threads 2"),
        ("cpu_quota", {"sys_fs_cgroup_cpu.max": "100000 100000", "sys_fs_cgroup_unit_cpu.max": "max 100000"}, "--threads 1"),
        (
            "cpu_quota",
            {
                "proc_self_cgroup": "4:cpu,cpuacct:/box\n",
                "sys_fs_cgroup_cpu,cpuacct_box_cpu.cfs__quota__us": "300000",
                "sys_fs_cgroup_cpu,cpuacct_box_cpu.cfs__period__us": "100000",
            },
            "3.0 of 8 cores",
        ),
        (
            "memory_limit",
            {
                "sys_fs_cgroup_unit_memory.max": str(8 << 30),
                "sys_fs_cgroup_unit_memory.current": "0",
                "sys_fs_cgroup_unit_memory.stat": "inactive_file 0\n",
            },
            "8.00 GiB of 64.00 GiB",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_remedy(tmp_path: Path, name: str, files: dict[str, str], words: str) -> None:
    found = said(machine(tmp_path, **{**FINE, **files}))
    assert list(found) == [name]
    assert words in f"{found[name].what} {found[name].remedy}"


def test_a_governor_that_follows_the_load_is_no_fault(tmp_path: Path) -> None:
    files = {f"{FREQUENCY}scaling__governor": "powersave", f"{FREQUENCY}scaling__driver": "intel_pstate"}
    assert said(machine(tmp_path, **{**FINE, **files})) == {}


def test_processors_that_may_not_be_used(tmp_path: Path) -> None:
    machine(tmp_path, **FINE)
    assert said(tmp_path, isa=("avx512_bf16", "torch"))["amx_unused"].severity == "slow"
    assert "--threads 4" in said(tmp_path, allowed=4)["cpu_affinity"].remedy
    assert said(tmp_path, isa=("torch",)) == {}, "without native kernels it is not AMX that is missing"


def test_open_files() -> None:
    assert not [*system.limits(1024, 1 << 20), *system.limits(1024, -1)]
    (one,) = system.limits(1024, 1024)
    assert "1024 open files" in one.what and "LimitNOFILE" in one.remedy


CUDA = Installed("2.13.0+cu129", "12.9", "3.9.0", "3.9.0")


class Driver:
    """NVIDIA's library, with one card at work as it should be; what is named otherwise is otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **other: Any) -> None:
        answers: dict[str, Any] = {
            "Init": None,
            "DeviceGetCount": 1,
            "DeviceGetHandleByIndex": 0,
            "SystemGetDriverVersion": "570.10",
            "SystemGetCudaDriverVersion": 12080,
            "DeviceGetName": "NVIDIA L4",
            "DeviceGetComputeMode": 0,
            "DeviceGetCurrPcieLinkWidth": 16,
            "DeviceGetMaxPcieLinkWidth": 16,
            "DeviceGetCurrPcieLinkGeneration": 4,
            "DeviceGetMaxPcieLinkGeneration": 4,
            "DeviceGetEnforcedPowerLimit": 72000,
            "DeviceGetPowerManagementDefaultLimit": 72000,
            "DeviceGetCurrentClocksEventReasons": 0x1,
            "DeviceGetPersistenceMode": 1,
            "DeviceGetMemoryInfo": SimpleNamespace(used=3 << 30, total=23 << 30),
            "DeviceGetComputeRunningProcesses": [],
        }
        for name, answer in {**answers, **other}.items():
            monkeypatch.setattr(pynvml, f"nvml{name}", self.says(answer))

    @staticmethod
    def says(answer: Any) -> Any:
        def ask(*_: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        return ask


def test_a_card_that_is_as_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch)
    assert examine_cards(CUDA) == ("570.10", [])
    no = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    Driver(
        monkeypatch, **dict.fromkeys(("DeviceGetCurrPcieLinkWidth", "DeviceGetEnforcedPowerLimit", "DeviceGetComputeMode"), no)
    )
    assert examine_cards(CUDA)[1] == [], "what a card does not say is no fault"


@pytest.mark.parametrize(
    ("other", "name", "words"),
    [
        ({"DeviceGetCurrPcieLinkWidth": 4}, "pcie_width", "4 of 16 PCIe lanes"),
        ({"DeviceGetCurrPcieLinkGeneration": 1}, "pcie_speed", "PCIe 1, and could 4"),
        ({"DeviceGetEnforcedPowerLimit": 40000}, "power_limit", "nvidia-smi -pl 72"),
        ({"DeviceGetCurrentClocksEventReasons": 0x20 | 0x40}, "throttled", "its temperature"),
        ({"DeviceGetPersistenceMode": 0}, "persistence", "nvidia-smi -pm 1"),
        ({"DeviceGetComputeMode": 2}, "compute_mode", "-c DEFAULT"),
        ({"DeviceGetComputeRunningProcesses": [SimpleNamespace(pid=4711)]}, "card_used", "4711"),
        ({"SystemGetCudaDriverVersion": 11040}, "driver_old", "knows 11.4 at most"),
        ({"Init": pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)}, "driver", "reboot"),
        ({"Init": pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)}, "driver", "nvidia-smi"),
    ],
)
def test_what_is_wrong_with_a_card(monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], name: str, words: str) -> None:
    Driver(monkeypatch, **other)
    (one,) = examine_cards(CUDA)[1]
    assert one.name == name and words in f"{one.what} {one.remedy}" and one.costs


@pytest.mark.parametrize(
    ("installed", "name"),
    [
        (Installed("2.13.0+cpu", None, None, None), "torch_cpu"),
        (Installed("2.13.0", "12.9", None, "3.9.0"), "triton"),
        (Installed("2.13.0", "12.9", "3.1.0", "3.9.0"), "triton_version"),
        (Installed("2.13.0", "12.9", "3.9.0", "3.9.0", "a C compiler (gcc)"), "compiler"),
        (Installed("2.13.0+cpu", None, None, None, "a C compiler (gcc)"), "torch_cpu"),
        (Installed("2.13.0", "13.0", "3.9.0", "3.9.0"), "driver_old"),
        (Installed(None, None, None, None), None),
    ],
)
def test_versions_that_do_not_go_with_the_card(monkeypatch: pytest.MonkeyPatch, installed: Installed, name: str | None) -> None:
    Driver(monkeypatch)
    assert [one.name for one in examine_cards(installed)[1]] == ([name] if name else [])


def test_what_triton_compiles_its_launchers_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, headers = tmp_path / "gcc", tmp_path / "Python.h"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": str(tmp_path)})
    assert uncompiled() == "a C compiler (gcc)"
    compiler.touch(0o755)
    assert uncompiled() == f"Python's headers ({headers})"
    headers.touch()
    assert uncompiled() is None
    compiler.unlink()
    monkeypatch.setenv("CC", "mycc")
    assert uncompiled() is None


def test_no_card_is_nothing_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch, Init=pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    assert examine_cards(Installed("2.13.0+cpu", None, None, None)) == (None, [])


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("from typing import Optional\ncuda: Optional[str] = '12.9'\nhip: Optional[str] = None\n", "12.9"),
        ("cuda: Optional[str] = None\n", None),
        ("__version__ = '2.4'\ncuda = '12.1'\n", "12.1"),
    ],
)
def test_what_torch_was_built_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cuda: str | None) -> None:
    (tmp_path / "version.py").write_text(text)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    found = Installed.look()
    assert found.torch_cuda == cuda and found.torch == importlib.metadata.version("torch")


def test_a_broken_driver_stops_nobody_from_using_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch, Init=pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN))
    report = doctor.examine()
    assert report.healthy and report.findings[0].name == "driver" and report.text().endswith("ready to serve")


def test_a_port_that_somebody_has() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        (one,) = doctor.port_taken(port)
        assert str(port) in one.what and "--port 0" in one.remedy
    assert not list(doctor.port_taken(port))


def test_where_models_of_the_hub_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert doctor.hub_cache() == tmp_path / "home/hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--a--b").mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.models_text(doctor.hub_cache()).startswith(
        f"1 of the hub in {tmp_path}"
    ) and "nothing is downloaded" in doctor.models_text(tmp_path)
    monkeypatch.setattr(doctor, "LITTLE_SPACE", 1 << 60)
    (one,) = doctor.disk(tmp_path / "not/there/yet")
    assert one.name == "disk_space"


def test_the_disk_under_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.model_disk(tmp_path, measure=True)[1][0].name == "model"
    (tmp_path / "model.safetensors").write_bytes(bytes(32 << 20))
    speed = doctor.model_disk(tmp_path, measure=True)[0]
    assert speed and speed > 1e6
    mounts = f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n"
    fake = machine(tmp_path / "fake", proc_mounts=mounts)
    assert [one.name for one in doctor.model_disk(tmp_path, measure=False, root=fake)[1]] == ["disk_network"]
    monkeypatch.setattr(doctor, "SLOW_DISK", 1e15)
    assert "disk_slow" in [one.name for one in doctor.model_disk(tmp_path, measure=True)[1]]
    assert file_system(Path("/a b/c"), "/dev/x / ext4 rw 0 0\n/dev/y /a\\040b xfs rw 0 0\n") == "xfs"


def test_memory_is_read_as_fast_as_memory_can_be() -> None:
    assert 0.5e9 < memory_speed(1) < 2e12


def test_the_whole_report_in_text_and_json(tmp_path: Path) -> None:
    done = run(str(tmp_path), "--port", "0")
    assert done.returncode == 1 and "has no .safetensors file" in done.stdout and "ready to serve" not in done.stdout
    told = json.loads(run("--json").stdout)
    assert told["memory_gb_per_second"] > 0 and isinstance(told["findings"], list)
    assert "read at" in run("--port", "0").stdout
