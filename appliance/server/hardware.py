"""What the machine is doing: processor, memory, our processes, NVIDIA cards. Read in a thread, at most once a second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import psutil
import pynvml  # type: ignore[import-untyped]

from appliance.memory.devices import cgroup_limits

log = logging.getLogger("appliance.server")

PERIOD_S = 1.0
PATIENCE_S = 0.5  # that who asks waits for a look: drivers have been seen to hang
SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal", "acpitz")  # names of a processor's, the best first
# Bits of NVML's "clocks event reasons" and what nvidia-smi calls them; 0x1 (idle) and 0x2 (an application's setting) slow nobody.
THROTTLE = {
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}


class Hardware:
    """One per server. Shares are 0 to 1; what this machine cannot say is None.

    A look is ``{"time": s since 1970, "period_s": since the look before, "cpu": {"utilization", "cores", "threads", "load": [1,
    5, 15 minutes], "temperature_c"}, "memory": {"total_bytes", "available_bytes", "swap_total_bytes", "swap_used_bytes"},
    "processes": {name: {"pid", "cpu_cores", "rss_bytes", "threads"}}, "gpus": [as ``Cards.read`` has them]}``. Utilizations and
    ``cpu_cores`` (1.0: one core all the time) are means since the look before.
    """

    def __init__(self, pids: Callable[[], dict[str, int]] = dict) -> None:
        """``pids``: the engine processes by name; they may come and go."""
        self._pids, self._cards = pids, Cards()
        self._processes: dict[str, psutil.Process] = {}
        self._done: asyncio.Future[None] | None = None  # of the look that is being taken
        self._times, self._at = psutil.cpu_times(), time.monotonic()
        self._processes_of({"server": os.getpid(), **pids()})
        self._latest: dict[str, Any] = {}

    async def latest(self) -> dict[str, Any]:
        """The machine as it was at most a second ago, longer where looking takes long. Never raises; {} before the first look."""
        done = self._done
        if done is None and (not self._latest or time.monotonic() - self._at >= PERIOD_S):
            done = self._done = asyncio.get_running_loop().create_future()
            pids = {"server": os.getpid(), **self._pids()}
            # a thread that nobody waits for at the end, as they do for asyncio's
            threading.Thread(target=self._look, args=(pids, done), name="hardware", daemon=True).start()
        if done is not None:
            await asyncio.wait({done}, timeout=PATIENCE_S)
        return self._latest

    def _look(self, pids: dict[str, int], done: asyncio.Future[None]) -> None:
        try:
            self._latest = self.read(pids)
        except Exception:
            log.debug("the machine could not be looked at", exc_info=True)
        finally:
            self._done = None
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                done.get_loop().call_soon_threadsafe(done.set_result, None)

    def read(self, pids: dict[str, int]) -> dict[str, Any]:
        """A look, now. One thread at a time."""
        now = time.monotonic()
        period, self._at = now - self._at, now
        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        total, available = memory.total, memory.available
        for limit, free in cgroup_limits():
            total, available = min(total, limit), min(available, free)
        return {
            "time": time.time(),
            "period_s": period,
            "cpu": {
                "utilization": self._utilization(),
                "cores": psutil.cpu_count(logical=False),
                "threads": psutil.cpu_count(),
                "load": list(psutil.getloadavg()),
                "temperature_c": cpu_temperature(),
            },
            "memory": {
                "total_bytes": total,
                "available_bytes": available,
                "swap_total_bytes": swap.total,
                "swap_used_bytes": swap.used,
            },
            "processes": {name: _process(one) for name, one in self._processes_of(pids).items() if one.is_running()},
            "gpus": self._cards.read(set(pids.values())),
        }

    def _utilization(self) -> float:
        """Share of time that was not idle since the look before. psutil.cpu_percent has but one look before for all that ask."""
        before, self._times = self._times, psutil.cpu_times()
        spent = {name: getattr(self._times, name) - getattr(before, name) for name in self._times._fields}
        idle = spent["idle"] + spent.get("iowait", 0.0)
        whole = sum(spent.values()) - spent.get("guest", 0.0) - spent.get("guest_nice", 0.0)  # those are in user and nice, too
        return min(1.0, max(0.0, 1 - idle / whole)) if whole > 0 else 0.0

    def _processes_of(self, pids: dict[str, int]) -> dict[str, psutil.Process]:
        """Kept from look to look: they know their times of the look before."""
        known, self._processes = self._processes, {}
        for name, pid in pids.items():
            one = known.get(name)
            with contextlib.suppress(psutil.Error):
                if one is None or one.pid != pid:
                    one = psutil.Process(pid)
                    one.cpu_percent()
                self._processes[name] = one
        return self._processes


def _process(one: psutil.Process) -> dict[str, Any]:
    with contextlib.suppress(psutil.Error), one.oneshot():
        return {
            "pid": one.pid,
            "cpu_cores": one.cpu_percent() / 100,
            "rss_bytes": one.memory_info().rss,
            "threads": one.num_threads(),
        }
    return {"pid": one.pid, "cpu_cores": None, "rss_bytes": None, "threads": None}


def cpu_temperature() -> float | None:
    """The hottest part of the processor in degrees Celsius, where the system says."""
    try:
        chips = psutil.sensors_temperatures()
    except (AttributeError, OSError):  # other systems than Linux; sensors that fail
        return None
    found = next((chips[name] for name in SENSORS if chips.get(name)), [])
    return max((one.current for one in found), default=None)


class Cards:
    """NVIDIA's cards, as far as CUDA_VISIBLE_DEVICES shows them. No driver: none."""

    def __init__(self) -> None:
        self._handles: list[tuple[int, Any]] | None = None  # not asked yet

    def read(self, pids: Iterable[int] = ()) -> list[dict[str, Any]]:
        """One dict a card; None for what its driver does not say. ``process_bytes``: what the processes ``pids`` hold there."""
        if self._handles is None:
            self._handles = _find()
        return [_card(index, handle, set(pids)) for index, handle in self._handles]


def _find() -> list[tuple[int, Any]]:
    try:
        pynvml.nvmlInit()
        handles = [(index, pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        log.debug("no NVIDIA cards: %s", error)
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return handles
    names = [name.strip() for name in visible.split(",")]
    return [(index, handle) for index, handle in handles if any(_is(name, index, handle) for name in names)]


def _is(name: str, index: int, handle: Any) -> bool:
    """Whether an entry of CUDA_VISIBLE_DEVICES (a number, or the beginning of an id) means this card."""
    return name == str(index) or (name.startswith("GPU-") and str(_ask(pynvml.nvmlDeviceGetUUID, handle)).startswith(name))


def _ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """None where a driver or a card has no answer."""
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


def _card(index: int, handle: Any, pids: set[int]) -> dict[str, Any]:
    busy, memory = _ask(pynvml.nvmlDeviceGetUtilizationRates, handle), _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    power, limit = _ask(pynvml.nvmlDeviceGetPowerUsage, handle), _ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    held = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()
    ours = [one.usedGpuMemory for one in held if one.pid in pids and one.usedGpuMemory is not None]
    reasons = _ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    return {
        "index": index,
        "name": _ask(pynvml.nvmlDeviceGetName, handle),
        "uuid": _ask(pynvml.nvmlDeviceGetUUID, handle),
        "utilization": None if busy is None else busy.gpu / 100,
        "memory_utilization": None if busy is None else busy.memory / 100,  # of the bandwidth's time, not of the bytes
        "memory_used_bytes": None if memory is None else memory.used,
        "memory_total_bytes": None if memory is None else memory.total,
        "process_bytes": sum(ours) if ours else None,
        "temperature_c": _ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        "power_w": None if power is None else power / 1000,
        "power_limit_w": None if limit is None else limit / 1000,
        "sm_clock_mhz": _ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        "sm_clock_max_mhz": _ask(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": _ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        "memory_clock_max_mhz": _ask(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        "throttle_reasons": [] if reasons is None else [name for bit, name in THROTTLE.items() if reasons & bit],
    }
