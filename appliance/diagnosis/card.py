"""NVIDIA cards: what the driver says of each, and whether torch and Triton fit it. No torch."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml  # type: ignore[import-untyped]

from appliance.diagnosis.findings import Finding, note, problem, slow
from appliance.memory.devices import torch_cuda
from appliance.memory.text import size_text

# Bits of NVML's "clocks event reasons": (why, what to do)
SLOWING = {
    0x4: ("its power limit", "raise it (nvidia-smi -pl WATTS), or leave it: answers hardly notice"),
    0x8: ("the hardware itself (heat or power)", "see to its cooling and power cables"),
    0x20: ("its temperature", "see to its cooling"),
    0x40: ("its temperature", "see to its cooling"),
    0x80: ("the power supply's brake", "see to its power supply"),
}
PROHIBITED = 2  # NVML_COMPUTEMODE_PROHIBITED


@dataclass(frozen=True)
class Installed:
    """Versions as they are installed; None where nothing is."""

    torch: str | None
    torch_cuda: str | None  # that torch was built for, as 12.8; None for a build without CUDA
    triton: str | None
    triton_wanted: str | None  # by torch
    uncompiled: str | None = None  # what Triton lacks to compile its launchers

    @classmethod
    def look(cls) -> Installed:
        """From metadata and torch's version.py, without importing either."""
        torch = _version("torch")
        wanted = [re.match(r"triton\s*==\s*([\w.+]+)", line) for line in _requires("torch")]
        cuda, wanted_triton = torch_cuda() if torch else None, next((m[1] for m in wanted if m), None)
        return cls(torch, cuda, _version("triton"), wanted_triton, uncompiled())


def uncompiled() -> str | None:
    """What is absent of what Triton compiles a launcher in C with, for each kernel: a compiler and Python's headers."""
    if not os.environ.get("CC") and not shutil.which("gcc") and not shutil.which("clang"):
        return "a C compiler (gcc)"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton asks on Debian
    include = sysconfig.get_paths(scheme)["include"]
    return None if Path(include, "Python.h").is_file() else f"Python's headers ({include}/Python.h)"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requires(package: str) -> list[str]:
    try:
        return importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def examine_cards(installed: Installed) -> tuple[str | None, list[Finding]]:
    """(driver's version, what is to be said). (None, []) where there is no driver."""
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        driver, cuda = str(pynvml.nvmlSystemGetDriverVersion()), int(pynvml.nvmlSystemGetCudaDriverVersion())
    except pynvml.NVMLError as error:
        return None, _no_driver(error)
    found = list(_versions(installed, driver, (cuda // 1000, cuda % 1000 // 10))) if handles else []
    for index, handle in enumerate(handles):
        found += _card(f"{_ask(pynvml.nvmlDeviceGetName, handle) or 'card'} ({index})", handle)
    return driver, found


def _no_driver(error: Any) -> list[Finding]:
    """Nothing to say of a machine without a card; of one whose driver does not answer there is."""
    if error.value in (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED):
        return []
    mismatch = error.value == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    remedy = "reboot: the driver was updated while it ran" if mismatch else "look at `nvidia-smi` and `dmesg`"
    return [problem("driver", f"the NVIDIA driver does not answer ({error})", "cards cannot be used", remedy)]


def _versions(installed: Installed, driver: str, newest: tuple[int, int]) -> Iterator[Finding]:
    """``newest``: the CUDA version that the driver knows. Later minor versions of the same major one run as well."""
    if installed.torch is not None and installed.torch_cuda is None:
        what = f"torch {installed.torch} is a build without CUDA"
        yield slow("torch_cpu", what, "cards cannot be used", "install torch anew from PyTorch's index of CUDA builds")
    elif installed.torch_cuda is not None:
        major = int(installed.torch_cuda.split(".")[0])
        if major > newest[0]:
            known = f"driver {driver} knows {newest[0]}.{newest[1]} at most"
            what = f"torch {installed.torch} is for CUDA {installed.torch_cuda}, {known}"
            remedy = f"update the driver, or install a build of torch for CUDA {newest[0]}"
            yield problem("driver_old", what, "cards cannot be used", remedy)
        if installed.triton is None:
            yield problem("triton", "Triton is not installed", "cards cannot be used", "pip install triton")
        if installed.triton is not None and installed.uncompiled is not None:
            what = f"Triton lacks {installed.uncompiled}"
            yield problem("compiler", what, "cards cannot be used", "apt install gcc python3-dev, or the like")
        if installed.triton is not None and installed.triton_wanted not in (None, installed.triton):
            what = f"Triton is {installed.triton}, torch {installed.torch} was made with {installed.triton_wanted}"
            yield note("triton_version", what, "untested together", f"pip install triton=={installed.triton_wanted}")


def _ask(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


def _card(name: str, handle: Any) -> Iterator[Finding]:
    if _ask(pynvml.nvmlDeviceGetComputeMode, handle) == PROHIBITED:
        yield problem("compute_mode", f"{name} is closed to computing", "it cannot be used", "nvidia-smi -c DEFAULT")
    width, widest = _ask(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle), _ask(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle)
    if width and widest and width < widest:
        costs = f"loading, swapping and --cpu-offload-gb at {width}/{widest} of the speed; answers without them as fast"
        yield slow("pcie_width", f"{name} has {width} of {widest} PCIe lanes", costs, "put it into another slot, or seat it anew")
    speed, fastest = (
        _ask(pynvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
        _ask(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
    )
    if speed and fastest and speed < fastest:
        costs = "loading and swapping slower, unless it is only at rest: idle links slow down"
        yield note(
            "pcie_speed", f"{name} talks PCIe {speed}, and could {fastest}", costs, "look again under load; else see the BIOS"
        )
    limit = _ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    usual = _ask(pynvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)
    if limit and usual and limit < 0.95 * usual:
        what = f"{name} may draw {limit / 1000:.0f} of {usual / 1000:.0f} W"
        yield slow("power_limit", what, "prompts slower, answers hardly", f"nvidia-smi -pl {usual // 1000}")
    reasons = _ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle) or 0
    for why, remedy in dict.fromkeys(text for bit, text in SLOWING.items() if reasons & bit):
        yield slow("throttled", f"{name} is slowed down by {why}", "lower clocks", remedy)
    if _ask(pynvml.nvmlDeviceGetPersistenceMode, handle) == 0:
        yield note(
            "persistence", f"{name} is put to sleep when nobody uses it", "a start takes a second or two more", "nvidia-smi -pm 1"
        )
    yield from _memory(name, handle)


def _memory(name: str, handle: Any) -> Iterator[Finding]:
    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    held = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
    if memory and held:
        pids = ", ".join(str(one.pid) for one in held[:5])
        what = f"{size_text(memory.used)} of {name} are in use, by {len(held)} processes ({pids})"
        yield note("card_used", what, "the plan takes what is left", "end them where they are not needed")
