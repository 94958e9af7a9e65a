"""What the machine is doing: against psutil, and against a stand-in of NVIDIA's library."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from appliance.server import hardware
from appliance.server.hardware import Cards, Hardware
from tests.server.conftest import Served
from tests.server.test_lifecycle import eventually


@pytest.fixture
def busy() -> Iterator[int]:
    """A process that uses a core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield process.pid
    process.kill()
    process.wait()


def _used(pid: int) -> float:
    return sum(psutil.Process(pid).cpu_times()[:2])


def test_a_look_agrees_with_the_system(busy: int) -> None:
    begun, before = time.monotonic(), _used(busy)
    machine = Hardware(lambda: {"engine": busy})
    first, least = time.monotonic(), _used(busy)
    eventually(lambda: _used(busy) > least + 0.3)
    least, shortest, now = _used(busy) - least, time.monotonic() - first, time.time()
    seen = machine.read({"server": os.getpid(), "engine": busy})
    assert shortest <= seen["period_s"] <= time.monotonic() - begun and now <= seen["time"] <= time.time()
    used = seen["processes"]["engine"]["cpu_cores"] * seen["period_s"]
    assert 0.8 * least < used < 1.2 * (_used(busy) - before), "as the system has it"
    assert seen["processes"]["engine"]["cpu_cores"] < 1.2, "one thread cannot use more than a core"
    assert 0 < seen["cpu"]["utilization"] <= 1 and seen["cpu"]["threads"] == psutil.cpu_count()
    assert seen["cpu"]["load"] == pytest.approx(psutil.getloadavg(), abs=1)
    assert 0 < seen["memory"]["available_bytes"] < seen["memory"]["total_bytes"] <= psutil.virtual_memory().total
    rss = psutil.Process().memory_info().rss
    assert seen["processes"]["server"]["rss_bytes"] == pytest.approx(rss, rel=0.2)


def test_the_share_is_of_the_time_that_was_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = ("user", "nice", "system", "idle", "iowait", "guest")

    class Times(SimpleNamespace):
        _fields = fields

    times = iter(
        [Times(**dict.fromkeys(fields, 0.0)), Times(user=30.0, nice=10.0, system=5.0, idle=50.0, iowait=5.0, guest=20.0)]
    )
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(times))
    assert Hardware()._utilization() == pytest.approx(0.45), "time of guests is counted in the user's already"


def test_an_engine_that_is_gone_or_new_is_no_error(busy: int) -> None:
    machine = Hardware(lambda: {"engine": busy})
    psutil.Process(busy).kill()
    eventually(lambda: psutil.Process(busy).status() == psutil.STATUS_ZOMBIE)
    assert machine.read({"engine": busy})["processes"].get("engine", {}).get("cpu_cores") in (None, 0.0)
    assert machine.read({"engine": 2**22 + 1})["processes"] == {}
    assert machine.read({"engine": os.getpid()})["processes"]["engine"]["rss_bytes"] > 0


def test_looks_are_a_second_apart_and_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "PATIENCE_S", 30.0)
    machine, threads = Hardware(), []
    real = machine.read

    def read(pids: dict[str, int]) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return real(pids)

    monkeypatch.setattr(machine, "read", read)

    async def many() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(machine.latest() for _ in range(50))))

    looks = asyncio.run(many())
    assert len(threads) == 1 and threads[0] is not threading.main_thread()
    assert all(look is looks[0] and look["cpu"] for look in looks)
    monkeypatch.setattr(machine, "_at", time.monotonic() - 1.1)
    assert asyncio.run(machine.latest())["time"] > looks[0]["time"] and len(threads) == 2


def test_a_driver_that_hangs_delays_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, release = Hardware(), threading.Event()
    monkeypatch.setattr(machine._cards, "read", lambda pids: release.wait(20) and [])
    begun = time.monotonic()
    try:
        assert asyncio.run(machine.latest()) == {}
        assert time.monotonic() - begun < 15
    finally:
        release.set()


def test_stats_have_it(served: Served) -> None:
    served.client.pid = os.getpid()
    with served.http as http:
        told = http.get("/stats").json()["hardware"]
    assert told["memory"]["total_bytes"] > 0 and told["processes"]["server"]["pid"] == os.getpid()
    assert isinstance(told["gpus"], list)


class Nvml:
    """NVIDIA's library with two cards: a full one, and one of which the driver says little."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        no = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        answers: dict[str, Any] = {
            "Init": lambda: None,
            "DeviceGetCount": lambda: 2,
            "DeviceGetHandleByIndex": lambda index: index,
            "DeviceGetName": lambda card: ["NVIDIA L4", "NVIDIA Old"][card],
            "DeviceGetUUID": lambda card: ["GPU-aa11", "GPU-bb22"][card],
            "DeviceGetUtilizationRates": [SimpleNamespace(gpu=87, memory=40), no],
            "DeviceGetMemoryInfo": [SimpleNamespace(used=7 * 2**30, total=23 * 2**30), SimpleNamespace(used=1, total=2)],
            "DeviceGetPowerUsage": [71_500, no],
            "DeviceGetEnforcedPowerLimit": [72_000, no],
            "DeviceGetComputeRunningProcesses": [
                [SimpleNamespace(pid=11, usedGpuMemory=5), SimpleNamespace(pid=12, usedGpuMemory=7)],
                [SimpleNamespace(pid=11, usedGpuMemory=None)],
            ],
            "DeviceGetTemperature": lambda card, sensor: [66, 30][card],
            "DeviceGetClockInfo": lambda card, clock: 1200 if clock == pynvml.NVML_CLOCK_SM else 6251,
            "DeviceGetMaxClockInfo": lambda card, clock: 2040 if clock == pynvml.NVML_CLOCK_SM else 6251,
            "DeviceGetCurrentClocksEventReasons": [0x1 | 0x4 | 0x20, no],
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, f"nvml{name}", answer if callable(answer) else self._by_card(answer))

    @staticmethod
    def _by_card(answers: list[Any]) -> Any:
        def ask(card: int) -> Any:
            if isinstance(answers[card], Exception):
                raise answers[card]
            return answers[card]

        return ask


def test_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    Nvml(monkeypatch)
    full, old = Cards().read({11})
    assert full == {
        "index": 0,
        "name": "NVIDIA L4",
        "uuid": "GPU-aa11",
        "utilization": 0.87,
        "memory_utilization": 0.4,
        "memory_used_bytes": 7 * 2**30,
        "memory_total_bytes": 23 * 2**30,
        "process_bytes": 5,
        "temperature_c": 66,
        "power_w": 71.5,
        "power_limit_w": 72.0,
        "sm_clock_mhz": 1200,
        "sm_clock_max_mhz": 2040,
        "memory_clock_mhz": 6251,
        "memory_clock_max_mhz": 6251,
        "throttle_reasons": ["sw_power_cap", "sw_thermal_slowdown"],
    }
    assert old["name"] == "NVIDIA Old" and old["utilization"] is old["power_w"] is old["process_bytes"] is None
    assert old["throttle_reasons"] == []


@pytest.mark.parametrize(("visible", "names"), [("1", [1]), ("", []), ("-1", []), ("GPU-aa", [0]), ("1,0", [0, 1])])
def test_cards_that_cuda_does_not_see_are_left_out(monkeypatch: pytest.MonkeyPatch, visible: str, names: list[int]) -> None:
    Nvml(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [card["index"] for card in Cards().read()] == names


def test_no_driver_means_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    assert Cards().read() == []


def test_the_processors_own_sensor_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    chips = {"nvme": [SimpleNamespace(current=90.0)], "coretemp": [SimpleNamespace(current=t) for t in (50.0, 61.0, 55.0)]}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: chips, raising=False)
    assert hardware.cpu_temperature() == 61.0
    monkeypatch.setattr(psutil, "sensors_temperatures", dict, raising=False)
    assert hardware.cpu_temperature() is None
