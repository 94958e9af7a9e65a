"""The operating system: processors, memory, limits, read from /proc and /sys. ``root`` is another place for tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from appliance.diagnosis.findings import Finding, note, slow
from appliance.memory.devices import cgroup_limits
from appliance.memory.text import size_text

ROOT = Path("/")
GIB = 1024**3
LEAST_FILES = 4096  # open files that a server for many clients should be allowed
SELF_GOVERNED = ("intel_pstate", "amd-pstate-epp")  # their "powersave" follows the load
AMX_FLAGS = {"amx_tile", "amx_int8"}


def read(path: str, root: Path = ROOT) -> str:
    """The text of a file, "" where there is none."""
    try:
        return (root / path.lstrip("/")).read_text(errors="replace").strip()
    except OSError:
        return ""


def meminfo(root: Path = ROOT) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    rows = re.findall(r"^(\w+):\s+(\d+) kB$", read("/proc/meminfo", root), re.MULTILINE)
    return {name: 1024 * int(value) for name, value in rows}


def huge_pages(root: Path = ROOT) -> str:
    """What the system says to who asks for large pages: always, madvise, never, or unknown."""
    return read("/sys/kernel/mm/transparent_hugepage/enabled", root).partition("[")[2].partition("]")[0] or "unknown"


def memory_nodes(root: Path = ROOT) -> int:
    return max(1, len(list((root / "sys/devices/system/node").glob("node[0-9]*"))))


def cpu_flags(root: Path = ROOT) -> set[str]:
    found = re.search(r"^flags\s*:(.*)$", read("/proc/cpuinfo", root), re.MULTILINE)
    return set(found[1].split()) if found else set()


def cpu_quota(root: Path = ROOT) -> float | None:
    """Processors' worth of time that control groups leave; None for no limit. Version 2 and 1; every parent counts."""
    quotas = []
    for line in read("/proc/self/cgroup", root).splitlines():
        _, controllers, path = line.split(":", 2)
        names = {"": ("", "unified"), "cpu": ("cpu", "cpu,cpuacct")}.get(
            "cpu" if "cpu" in controllers.split(",") else controllers, ()
        )
        for mount in (root / "sys/fs/cgroup" / name for name in names):
            below = mount / path.lstrip("/")
            for group in (below, *(p for p in below.parents if p.is_relative_to(mount))):
                quotas += _quota(group)
    return min(quotas, default=None)


def _quota(group: Path) -> list[float]:
    words = read(str(group / "cpu.max"), Path("/")).split() or [
        read(str(group / "cpu.cfs_quota_us"), Path("/")),
        read(str(group / "cpu.cfs_period_us"), Path("/")),
    ]
    quota, period = (*words, "", "")[:2]
    return [int(quota) / int(period)] if quota.isdecimal() and period.isdecimal() and int(period) else []


def processors(root: Path, cores: int, allowed: int, isa: tuple[str, ...]) -> Iterator[Finding]:
    """``cores``: physical ones; ``allowed``: processors that this process may run on; ``isa``: what kernels can use."""
    flags = cpu_flags(root)
    if flags >= AMX_FLAGS and isa and isa[0] != "amx" and len(isa) > 1:
        yield slow(
            "amx_unused", "the processor has AMX, but its tiles cannot be used", "prompts several times slower", AMX_REMEDY
        )
    quota = cpu_quota(root)
    if quota is not None and quota < cores:
        few = max(1, int(quota))
        yield slow(
            "cpu_quota",
            f"a control group leaves {quota:.1f} of {cores} cores",
            "more threads than that wait for one another",
            f"start with --threads {few}, or raise the limit (docker --cpus, systemd CPUQuota=)",
        )
    if allowed < cores:
        yield slow(
            "cpu_affinity",
            f"this process may run on {allowed} processors of a machine with {cores} cores",
            "more threads than that wait for one another",
            f"start with --threads {allowed}, or allow more (taskset, AllowedCPUs=, --cpuset-cpus)",
        )
    yield from _frequency(root)
    yield from _others(root, cores)


AMX_REMEDY = "needs Linux 5.16 or newer, and a hypervisor that passes it on; update the kernel (uname -r)"


def _frequency(root: Path) -> Iterator[Finding]:
    folder = "/sys/devices/system/cpu/cpu0/cpufreq"
    governor, driver = read(f"{folder}/scaling_governor", root), read(f"{folder}/scaling_driver", root)
    if governor in ("powersave", "conservative") and not (governor == "powersave" and driver in SELF_GOVERNED):
        costs = "the clock stays low, or rises late: up to several times slower"
        yield slow("cpu_governor", f"the processors' governor is {governor}", costs, "cpupower frequency-set -g performance")
    if read(f"{folder}/energy_performance_preference", root) == "power":
        remedy = "echo balance_performance > /sys/devices/system/cpu/cpu*/cpufreq/energy_performance_preference (each)"
        yield slow("cpu_preference", "the processors are told to save power", "the clock stays low", remedy)
    least, most = read(f"{folder}/scaling_max_freq", root), read(f"{folder}/cpuinfo_max_freq", root)
    if least.isdecimal() and most.isdecimal() and int(least) < 0.95 * int(most):
        what = f"the clock is held at {int(least) / 1e6:.1f} of {int(most) / 1e6:.1f} GHz"
        yield slow("cpu_clock", what, "prompts slower by that much", f"cpupower frequency-set -u {int(most) // 1000}MHz")


def _others(root: Path, cores: int) -> Iterator[Finding]:
    load = read("/proc/loadavg", root).split()
    if load and float(load[0]) > max(1.0, 0.5 * cores):
        what = f"{float(load[0]):.1f} threads run here by themselves (load), on {cores} cores"
        yield slow(
            "cpu_busy",
            what,
            "the kernels' threads wait for each other, and so for the slowest",
            "stop them, or give fewer --threads",
        )
    times = [int(word) for word in read("/proc/stat", root).partition("\n")[0].split()[1:] if word.isdecimal()]
    if len(times) >= 8 and times[7] > 0.05 * sum(times[:8]):
        what = (
            f"{100 * times[7] / sum(times[:8]):.0f} % of the time since the start went to other machines on the same host (steal)"
        )
        yield slow("cpu_steal", what, "as much slower, and unevenly", "take a machine with processors of its own")


def memory(root: Path, total: int) -> Iterator[Finding]:
    """``total``: bytes of the machine."""
    if huge_pages(root) == "never":
        remedy = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        yield slow("huge_pages", "the system gives no large pages (never)", "reading weights misses the TLB all the time", remedy)
    known = meminfo(root)
    swapped = known.get("SwapTotal", 0) - known.get("SwapFree", 0)
    if swapped > max(GIB // 4, total // 50):
        costs = "pages of the model that come from disk make a token take seconds"
        remedy = "end what uses the memory, give a smaller --gpu-memory-utilization, or swapoff -a"
        yield slow("swap", f"{size_text(swapped)} are on the system's swap", costs, remedy)
    if (nodes := memory_nodes(root)) > 1:
        what = f"the memory is in {nodes} nodes"
        costs = "weights that lie in one node are read across the link by the other processors"
        yield slow(
            "numa", what, costs, "numactl --interleave=all appliance serve ..., or --cpunodebind=0 --membind=0 for a small model"
        )
    limits = cgroup_limits(root / "sys/fs/cgroup", root / "proc/self/cgroup")
    if limits and (limit := min(size for size, _ in limits)) < total:
        costs = "the plan keeps to it"
        yield note(
            "memory_limit",
            f"a control group leaves {size_text(limit)} of {size_text(total)}",
            costs,
            "raise the limit (--memory, MemoryMax=, MemoryHigh=)",
        )
    available = min([known.get("MemAvailable", total), *(free for _, free in limits)])
    if available < 2 * GIB:
        costs = "the plan takes half of what is available"
        yield slow("memory_low", f"only {size_text(available)} of memory are available", costs, "end what uses the rest")


def limits(soft: int, hard: int) -> Iterator[Finding]:
    """``soft``, ``hard``: of open files; the server raises the first to the second (-1: no limit)."""
    if hard != -1 and hard < LEAST_FILES:
        what = f"a process may have {hard} open files"
        yield note("open_files", what, "each client is one", "ulimit -Hn 65536 as root, or LimitNOFILE=65536 in the unit")
