"""`appliance doctor`: what this machine has, what of it will be used, what is slow, what that costs and how to mend it."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from appliance.diagnosis import system
from appliance.diagnosis.card import Installed, examine_cards
from appliance.diagnosis.findings import Finding, note, problem, slow
from appliance.diagnosis.measure import NETWORK, disk_speed, file_system, memory_speed
from appliance.memory.devices import DeviceInfo, allowed_processors, this_device, torch_cuda
from appliance.memory.proofs import OLDEST, device_kind
from appliance.memory.text import size_text
from appliance.version import __version__
from kernels.cpu import backend
from quant.errors import InputError

GB = 1e9
SLOW_DISK, LITTLE_SPACE = 0.3 * GB, 20 * 1024**3  # bytes a second, bytes

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
    torch_cuda: str | None
    triton: str | None
    processor: str
    physical_cores: int
    memory_gib: float
    memory_nodes: int
    memory_gb_per_second: float | None  # as measured; None where it was not
    huge_pages: str
    gpu: str
    driver: str | None
    device: str  # that --device auto would take
    kernels: str | None
    kernels_available: tuple[str, ...]
    kernels_built: bool
    costs: str
    models: str  # where those of the hub are kept
    disk_gb_per_second: float | None  # under the model that was named
    problems: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        return not self.problems and not any(one.severity == "problem" and one.name not in CARDS_ONLY for one in self.findings)

    def text(self) -> str:
        """One line a fact, then what is to be said of them."""
        reads = "" if self.memory_gb_per_second is None else f", read at {self.memory_gb_per_second:.0f} GB/s"
        torch = f"{self.torch} (CUDA {self.torch_cuda})" if self.torch_cuda else self.torch
        lines = {
            "appliance": self.appliance,
            "python": self.python,
            "torch": torch or "not installed",
            "triton": self.triton or "not installed (needed for GPUs only)",
            "processor": f"{self.processor}, {self.physical_cores} physical cores, {self.memory_gib:.1f} GiB of memory{reads}",
            "memory nodes": str(self.memory_nodes),
            "huge pages": self.huge_pages,
            "gpu": self.gpu + (f"; driver {self.driver}" if self.driver else ""),
            "device": f"{self.device}, unless --device says otherwise",
            "kernels": f"{self.kernels or 'none'} (this machine can run {', '.join(self.kernels_available)})",
            "models": self.models,
        }
        shown = [f"{name:13} {value}" for name, value in lines.items()]
        if self.costs:
            shown.insert(-1, f"{'':13} {self.costs}")
        if not self.kernels_built:
            hint = "the native extension is not built: install a C++ compiler (apt install g++) and install again"
            shown.insert(-1, f"{'':13} {hint}")
        if self.memory_gb_per_second:
            shown.append(f"{'speed':13} {self._speed()}")
        shown += [f"problem       {problem}" for problem in self.problems]
        if self.findings:
            shown += ["", *(line for one in self.findings for line in one.lines())]
        return "\n".join([*shown, "" if not self.healthy else "ready to serve"]).rstrip()

    def _speed(self) -> str:
        assert self.memory_gb_per_second is not None
        rate = self.memory_gb_per_second / 4
        told = f"memory lets a model whose weights take 4 GB give about {rate:.1f} tokens a second on the CPU, to one sequence"
        if any(one.name == "cpu_busy" for one in self.findings):
            told += " (as busy as the machine is now)"
        return told if self.disk_gb_per_second is None else f"{told}; its disk reads {self.disk_gb_per_second:.1f} GB/s"


CARDS_ONLY = {"driver", "driver_old", "triton", "compute_mode"}  # the CPU works all the same


def examine(model: str | None = None, port: int | None = None, *, measure: bool = False, root: Path = system.ROOT) -> Report:
    """Look at this machine, without importing torch. Well under a second; two more with ``measure``.

    ``model``: a directory whose disk is looked at; ``port``: that the server is to have; ``root``: a machine's files, for tests.
    """
    problems, findings = [], []
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
    installed = Installed.look()
    if installed.torch is None:
        problems.append("torch is not installed: pip install torch")
    if kernels is not None and kernels != available[0]:
        what = f"APPLIANCE_CPU_ISA is {kernels}, and this processor could {available[0]}"
        findings.append(slow("isa_chosen", what, COSTS[kernels] or "slower", "unset APPLIANCE_CPU_ISA"))
    cores, total = psutil.cpu_count(logical=False) or 1, psutil.virtual_memory().total
    driver, of_cards = examine_cards(installed)
    findings += system.processors(root, cores, allowed_processors(), available)
    findings += [*system.memory(root, total), *system.limits(*resource.getrlimit(resource.RLIMIT_NOFILE)), *of_cards]
    findings += [*(port_taken(port) if port is not None else ()), *disk(hub_cache())]
    speed = memory_speed(cores) / GB if measure else None
    reads = None
    if model is not None:
        reads, of_disk = model_disk(Path(model), measure=measure, root=root)
        findings += of_disk
    return Report(
        appliance=__version__,
        python=platform.python_version(),
        torch=installed.torch,
        torch_cuda=installed.torch_cuda,
        triton=installed.triton,
        processor=processor_name(),
        physical_cores=cores,
        memory_gib=round(total / 1024**3, 1),
        memory_nodes=system.memory_nodes(root),
        memory_gb_per_second=speed and round(speed, 1),
        huge_pages=system.huge_pages(root),
        gpu=card(),
        driver=driver,
        device=device_kind("auto"),
        kernels=kernels,
        kernels_available=available,
        kernels_built=built,
        costs=COSTS.get(kernels or "", ""),
        models=models_text(hub_cache()),
        disk_gb_per_second=reads and round(reads / GB, 2),
        problems=tuple(problems),
        findings=tuple(sorted(findings, key=lambda one: ("problem", "slow", "note").index(one.severity))),
    )


def card() -> str:
    """The first card, and which --device takes it."""
    try:
        found = this_device("cuda")
    except InputError as error:
        return "none found" if shutil.which("nvidia-smi") is None else str(error).removeprefix("--device cuda: ")
    kind = "" if found.capability is None else f"sm_{found.capability}, "
    wide = "" if found.bfloat16 else "; no bfloat16: activations in float16"
    return f"{found.name}, {kind}{size_text(found.available)} of {size_text(found.total)} free; {_taken_by(found)}{wide}"


def _taken_by(found: DeviceInfo) -> str:
    if torch_cuda() is None:
        return "not used: the torch that is installed is none for cards"
    if found.capability is not None and found.capability < OLDEST:
        return f"not used: the kernels are made for sm_{OLDEST} and later"
    return "used, unless --device is cpu" if device_kind("auto") == "cuda" else "used with --device cuda"


def processor_name() -> str:
    """From /proc/cpuinfo where that has one, else what Python knows."""
    lines = system.read("/proc/cpuinfo").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def port_taken(port: int) -> Iterator[Finding]:
    """Whether somebody listens where the server is to."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError as error:
            what = f"127.0.0.1 port {port} cannot be had ({error.strerror})"
            yield note(
                "port", what, "`appliance serve` would say so and end", "stop what listens there, or --port 0 for a free one"
            )


def hub_cache() -> Path:
    """Where models of the hub are kept, by the variables that huggingface_hub knows."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def models_text(cache: Path) -> str:
    number = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    offline = "; HF_HUB_OFFLINE is set: nothing is downloaded" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    return f"{number} of the hub in {cache}, {size_text(_free(cache))} free there{offline}"


def _free(folder: Path) -> int:
    """Bytes free on the disk that the folder is on, or would be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def disk(cache: Path) -> Iterator[Finding]:
    if (free := _free(cache)) < LITTLE_SPACE:
        what = f"{size_text(free)} are free where models of the hub are kept"
        yield note(
            "disk_space", what, "a download of a larger model ends early", f"make room, or HF_HOME on another disk ({cache})"
        )


def model_disk(model: Path, *, measure: bool, root: Path = system.ROOT) -> tuple[float | None, list[Finding]]:
    """(bytes a second of its largest file, what is to be said)."""
    files = sorted(model.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    if not files:
        remedy = "name a directory with a Hugging Face checkpoint"
        return None, [problem("model", f"{model} has no .safetensors file", "there is nothing to serve", remedy)]
    found = []
    kind = file_system(model.resolve(), system.read("/proc/mounts", root))
    if kind in NETWORK:
        what = f"{model} is on another machine ({kind})"
        found.append(slow("disk_network", what, "each start reads it over the network", "copy it to a disk of this machine"))
    speed = disk_speed(files[-1].resolve()) if measure else None
    if speed is not None and speed < SLOW_DISK:
        size = sum(file.stat().st_size for file in files)
        what = f"the disk under {model} reads {speed / 1e6:.0f} MB/s"
        found.append(slow("disk_slow", what, f"a first start takes {size / speed:.0f} s longer", "copy it to a faster disk"))
    return speed, found


def doctor(model: str | None, port: int, *, json: bool) -> int:
    """Print the report; 0 when the engine can run, 1 when not."""
    from json import dumps

    report = examine(model, port, measure=True)
    print(dumps(asdict(report), indent=1) if json else report.text())
    return 0 if report.healthy else 1
