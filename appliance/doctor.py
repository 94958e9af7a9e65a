"""`appliance doctor`: what this machine has, what of it will be used, and what it costs to lack the rest."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from appliance.memory.devices import this_device
from appliance.memory.text import size_text
from appliance.version import __version__
from kernels.cpu import backend
from quant.errors import InputError

# Prompt tokens a second of a 1B model on the same two cores, relative to avx512_bf16 (docs/benchmarks): what lacking a set costs.
COSTS = {
    "amx": "",
    "avx512_bf16": "no AMX: prompts take the vector units, several times slower than tiles",
    "avx512_vnni": "no AVX-512 BF16: exact products (--activation-dtype bf16) and attention run in float32, at half the rate",
    "avx_vnni": "no AVX-512: prompts and many sequences at about half the rate, one sequence as fast as memory allows",
    "avx2": "no VNNI: prompts and many sequences at about a third of the rate, one sequence as fast as memory allows",
    "portable": "no instruction set that the kernels know: everything many times slower",
    backend.TORCH: "the native kernels are not in use: torch's operators compute, several times slower",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """Facts for people and, with --json, for scripts. ``problems`` are what keeps the engine from running."""

    appliance: str
    python: str
    torch: str | None
    triton: str | None
    processor: str
    physical_cores: int
    memory_gib: float
    memory_nodes: int
    huge_pages: str
    gpu: str
    kernels: str | None
    kernels_available: tuple[str, ...]
    kernels_built: bool
    costs: str
    problems: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        return not self.problems

    def text(self) -> str:
        """One line a fact."""
        lines = {
            "appliance": self.appliance,
            "python": self.python,
            "torch": self.torch or "not installed",
            "triton": self.triton or "not installed (needed for GPUs only)",
            "processor": f"{self.processor}, {self.physical_cores} physical cores, {self.memory_gib:.1f} GiB of memory",
            "memory nodes": str(self.memory_nodes),
            "huge pages": self.huge_pages,
            "gpu": self.gpu,
            "kernels": f"{self.kernels or 'none'} (this machine can run {', '.join(self.kernels_available)})",
        }
        shown = [f"{name:13} {value}" for name, value in lines.items()]
        if self.costs:
            shown.append(f"{'':13} {self.costs}")
        if not self.kernels_built:
            shown.append(f"{'':13} the native extension is not built: install a C++ compiler (apt install g++) and install again")
        shown += [f"problem       {problem}" for problem in self.problems]
        return "\n".join([*shown, "" if self.problems else "ready to serve"]).rstrip()


def examine() -> Report:
    """Look at this machine; well under a second, without importing torch."""
    problems = []
    try:
        kernels: str | None = backend.name()
    except InputError as error:
        kernels = None
        problems.append(str(error))
    try:
        available, built = backend.available(), backend.native() is not None
    except (ImportError, InputError) as error:
        available, built = (backend.TORCH,), False
        problems.append(f"the native extension does not load: {error}")
    torch = version("torch")
    if torch is None:
        problems.append("torch is not installed: pip install torch")
    return Report(
        appliance=__version__,
        python=platform.python_version(),
        torch=torch,
        triton=version("triton"),
        processor=processor_name(),
        physical_cores=psutil.cpu_count(logical=False) or 1,
        memory_gib=round(psutil.virtual_memory().total / 1024**3, 1),
        memory_nodes=max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))),
        huge_pages=huge_pages(),
        gpu=card(),
        kernels=kernels,
        kernels_available=available,
        kernels_built=built,
        costs=COSTS.get(kernels or "", ""),
        problems=tuple(problems),
    )


def card() -> str:
    """What --device cuda would take."""
    if shutil.which("nvidia-smi") is None:
        return "none found"
    try:
        found = this_device("cuda")
    except InputError as error:
        return str(error).removeprefix("--device cuda: ")
    kind = "" if found.capability is None else f"sm_{found.capability}, "
    wide = "" if found.bfloat16 else "; no bfloat16: activations in float16"
    return f"{found.name}, {kind}{size_text(found.available)} of {size_text(found.total)} free; used with --device cuda{wide}"


def version(package: str) -> str | None:
    """Of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    """From /proc/cpuinfo where that has one, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def huge_pages() -> str:
    """Whether the system gives large pages on request: weights and cache ask for them."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    chosen = text.partition("[")[2].partition("]")[0]
    return f"{chosen}: reading weights is slower without them" if chosen == "never" else chosen


def doctor(json: bool) -> int:
    """Print the report; 0 when the engine can run, 1 when not."""
    from json import dumps

    report = examine()
    print(dumps(asdict(report), indent=1) if json else report.text())
    return 0 if report.healthy else 1
