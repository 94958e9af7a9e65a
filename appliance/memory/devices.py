"""How much memory the machine has, and how much of it may be taken: control groups respected, no torch."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from appliance.memory.sizes import parse_bytes
from quant.errors import InputError

MIB = 1024**2
_UNSAID = re.compile(r"\[?(N/A|Not Found|Not Supported|Insufficient Permissions|Unknown Error)\b")  # of odd or cautious drivers
_UNLIMITED = 2**60  # version 1 of control groups writes "no limit" as a huge number

DRIVER = """
import os
from ctypes import CDLL, byref, c_int, c_size_t, create_string_buffer
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
cuda, card, total, name, version = CDLL("libcuda.so.1"), c_int(), c_size_t(), create_string_buffer(256), (c_int(), c_int())
calls = [cuda.cuInit(0), cuda.cuDeviceGet(byref(card), 0), cuda.cuDeviceGetName(name, 256, card)]
calls += [cuda.cuDeviceTotalMem_v2(byref(total), card)]
calls += [cuda.cuDeviceGetAttribute(byref(part), kind, card) for part, kind in zip(version, (75, 76))]
assert not any(calls), calls
print(name.value.decode(), f"{version[0].value}.{version[1].value}", total.value >> 20, "[N/A]", sep=", ")
"""  # 75, 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR (cuda.h)
ANSWER_S = 5.0  # that an answer of nvidia-smi counts: as long as a start plans; what is free changes
_answers: dict[tuple[object, ...], tuple[float, str | None]] = {}  # by program and arguments: when, and what


@dataclass(frozen=True)
class Holder:
    """Another process on the card."""

    pid: int
    name: str
    nbytes: int | None  # None where the driver will not say


@dataclass(frozen=True)
class DeviceInfo:
    """A place for weights and KV cache. ``total`` and ``available`` are bytes."""

    kind: str  # cpu, cuda
    name: str
    total: int
    available: int
    capability: int | None = None  # of a card: 75, 80, 86, 89, 90, 100, 120; None where nothing told it
    holders: tuple[Holder, ...] = ()  # of a card: who else is on it, most memory first

    @property
    def bfloat16(self) -> bool:
        """Whether it computes in bfloat16: cards do so from sm_80 on."""
        return self.capability is None or self.capability >= 80


def this_device(kind: str) -> DeviceInfo:
    """The machine's memory ("cpu") or its first card's ("cuda"). Raises InputError where there is no such device.

    APPLIANCE_RAM in the environment says how much the machine has where that grows as it is used: some virtual ones begin small.
    """
    if kind == "cpu":
        memory = psutil.virtual_memory()
        total, available = memory.total, memory.available
        if said := os.environ.get("APPLIANCE_RAM"):
            most = parse_bytes("APPLIANCE_RAM", said, least=1)
            total, available = most, max(0, most - (total - available))
        for limit, free in cgroup_limits():
            total, available = min(total, limit), min(available, free)
        return DeviceInfo("cpu", _cpu_name(), total, available)
    if kind == "cuda":
        return _first_card()
    raise InputError(f"--device {kind!r} is not known; auto, cpu and cuda are")


def torch_cuda() -> str | None:
    """The CUDA, as 12.8, that torch was built for; None where it was built without. Torch is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda(?:\s*:[^=\n]*)?\s*=\s*'([\d.]+)'", text, re.MULTILINE)
    return found[1] if found else None


def cpu_threads(threads: int | None) -> int:
    """--threads, or the physical cores. InputError for none, or fewer."""
    if threads is not None and threads < 1:
        raise InputError(f"--threads is {threads}: at least 1 is needed")
    return threads or psutil.cpu_count(logical=False) or 1


def allowed_processors() -> int:
    """So many this process may run on, physical or not."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cgroup_limits(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> list[tuple[int, int]]:
    """(limit, what is free under it) in bytes of each control group, version 1 or 2, that this process is in.

    Beyond version 2's memory.high (systemd's MemoryHigh=) a process is slowed until it is hardly one: a limit as memory.max is.
    Page cache that the kernel would give back (inactive_file) counts as free, as it does in MemAvailable. A container often
    sees its own group as the root of the tree, so every parent of the stated path is tried, and those that are absent skipped.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            mounts, limits = [root, root / "unified"], ["memory.max", "memory.high"]
            names = "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mounts, limits = [root / "memory"], ["memory.limit_in_bytes"]  # its soft limit is none while there is room
            names = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        for mount in mounts:
            below = mount / path.lstrip("/")
            groups = [below, *(p for p in below.parents if p.is_relative_to(mount))]
            found += [pair for group in groups if (pair := _limit(group, limits, *names)) is not None]
    return found


def _limit(group: Path, limit_names: Sequence[str], usage_name: str, reclaimable: str) -> tuple[int, int] | None:
    try:
        stated = [(group / name).read_text().strip() for name in limit_names if (group / name).exists()]
        limit = min((int(text) for text in stated if text != "max"), default=_UNLIMITED)
        if limit >= _UNLIMITED:
            return None
        usage = int((group / usage_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except FileNotFoundError:  # no such group under this mount
        return None
    return limit, max(0, limit - usage + int(stat.get(reclaimable, 0)))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or "CPU"


def _first_card() -> DeviceInfo:
    """The first of CUDA_VISIBLE_DEVICES, where that is set: CUDA counts no others. Asked of nvidia-smi, else of the driver."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    if card in ("", "-1"):
        raise InputError("--device cuda: CUDA_VISIBLE_DEVICES hides every card; unset it, or use --device cpu")
    answer = _ask("--query-gpu=name,compute_cap,memory.total,memory.free", "--format=csv,noheader,nounits", f"--id={card}")
    if answer is None:
        return _by_driver()
    if _UNSAID.match(answer.rpartition(",")[2].strip()):  # mostly of a card that is divided: CUDA has a part of it, not this
        with suppress(InputError):
            return _by_driver()
    holders = parse_holders(_ask("-q", "-d", "PIDS", f"--id={card}") or "")
    return replace(parse_card(answer), holders=tuple(one for one in holders if one.pid != os.getpid()))


def _by_driver() -> DeviceInfo:
    """The first card as CUDA's driver has it, in a process of its own, which leaves nothing of CUDA in this one.

    For containers with CUDA's library but not the tools, for tools that are not on the PATH, and for parts of a divided card, of
    which nvidia-smi tells nothing, or all but what is free of the whole. What is free is not told without a context on the card:
    all counts, the engine measures.
    """
    answer = _answer(sys.executable, "-I", "-S", "-c", DRIVER, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if answer is None:
        raise InputError(
            "--device cuda: no NVIDIA card answers on this machine (nvidia-smi failed), nor to CUDA's driver; use --device cpu"
        )
    return parse_card(answer)


def _ask(*arguments: str) -> str | None:
    """What nvidia-smi prints, or None where it fails."""
    program = shutil.which("nvidia-smi")
    return None if program is None else _answer(program, *arguments)


def _answer(program: str, *arguments: str) -> str | None:
    """What a program prints, or None where it fails. It takes part of a second: asked once for all that ask within ANSWER_S."""
    asked = program, os.stat(program).st_mtime_ns, *arguments
    at, answer = _answers.get(asked, (-math.inf, None))
    if time.monotonic() - at > ANSWER_S:
        try:
            answer = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            answer = None
        _answers[asked] = time.monotonic(), answer
    return answer


def parse_holders(answer: str) -> tuple[Holder, ...]:
    """The processes that ``nvidia-smi -q -d PIDS`` lists, computing (C) or drawing (G), most memory first.

    ``--query-compute-apps`` would leave a desktop out. What a driver hides (names of other users' processes, all memory on
    Windows) stays unknown; a process without a number is left out.
    """
    found: dict[int, Holder] = {}
    pid = None
    for line in answer.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "Process ID":
            pid = int(value) if value.isdecimal() else None
            if pid is not None:
                found[pid] = Holder(pid, "unknown", None)
        elif key in ("Name", "Process Name") and pid is not None and value and not _UNSAID.match(value):
            found[pid] = replace(found[pid], name=re.split(r"[/\\]", value.split(" --")[0])[-1] or value)
        elif key == "Used GPU Memory" and pid is not None and value.removesuffix(" MiB").isdecimal():
            found[pid] = replace(found[pid], nbytes=int(value.removesuffix(" MiB")) * MIB)
    return tuple(sorted(found.values(), key=lambda one: -(one.nbytes or 0)))


def _capability(text: str) -> int | None:
    """8.9 -> 89; None for what an odd driver says instead."""
    major, dot, minor = text.partition(".")
    return 10 * int(major) + int(minor) if dot and major.isdecimal() and minor.isdecimal() else None


def parse_card(answer: str) -> DeviceInfo:
    """The first card of nvidia-smi's answer: name, compute capability, total and free memory in MiB, separated by commas.

    Where a driver hides what is free (of a card that is divided, say) all of it counts as free: the engine measures once more.
    """
    try:
        name, capability, total, free = (part.strip() for part in answer.splitlines()[0].rsplit(",", 3))
        free = total if _UNSAID.match(free) else free
        return DeviceInfo("cuda", name, int(total) * MIB, int(free) * MIB, _capability(capability))
    except (IndexError, ValueError):
        raise InputError(
            f"--device cuda: nvidia-smi says {answer.strip()!r:.80}, which names no card; use --device cpu"
        ) from None
