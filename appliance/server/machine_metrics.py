"""The machine in GET /metrics: processor, memory, processes, cards. What the machine does not say is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric

# Of a card: (name, help, key of its dict, factor)
CARD: tuple[tuple[str, str, str, float], ...] = (
    ("gpu_utilization", "Share of the time in which a kernel ran, 0 to 1.", "utilization", 1),
    ("gpu_memory_utilization", "Share of the time in which its memory was read or written, 0 to 1.", "memory_utilization", 1),
    ("gpu_memory_used_bytes", "Memory in use, by anybody.", "memory_used_bytes", 1),
    ("gpu_memory_total_bytes", "Memory that it has.", "memory_total_bytes", 1),
    ("gpu_process_memory_bytes", "Memory that our engines use.", "process_bytes", 1),
    ("gpu_temperature_celsius", "Temperature.", "temperature_c", 1),
    ("gpu_power_watts", "Power drawn.", "power_w", 1),
    ("gpu_power_limit_watts", "Power that it may draw.", "power_limit_w", 1),
    ("gpu_sm_clock_hertz", "Clock of the multiprocessors.", "sm_clock_mhz", 1e6),
    ("gpu_memory_clock_hertz", "Clock of the memory.", "memory_clock_mhz", 1e6),
)
# Of the machine: (name, help, part of the look, key)
HOST = (
    ("cpu_utilization", "Share of the processors' time that was used, 0 to 1.", "cpu", "utilization"),
    ("cpu_temperature_celsius", "Temperature of the processor.", "cpu", "temperature_c"),
    ("host_memory_total_bytes", "Memory of the machine, or of the control group.", "memory", "total_bytes"),
    ("host_memory_available_bytes", "Of it, what can still be had.", "memory", "available_bytes"),
    ("host_swap_used_bytes", "Memory that the system has put on disk.", "memory", "swap_used_bytes"),
)


def machine(look: Mapping[str, Any]) -> Iterator[Metric]:
    """``look``: as Hardware.latest has it; {} before the first one."""
    if not look:
        return
    for name, text, part, key in HOST:
        if (value := look[part][key]) is not None:
            yield GaugeMetricFamily(f"appliance:{name}", text, value=value)
    load = GaugeMetricFamily("appliance:cpu_load", "Mean number of threads that ran or wanted to.", labels=("minutes",))
    for minutes, value in zip(("1", "5", "15"), look["cpu"]["load"]):
        load.add_metric((minutes,), value)
    yield load
    yield from _processes(look["processes"])
    yield from _cards(look["gpus"])


def _processes(processes: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
    for name, text, key in (
        ("cpu_cores", "Cores that a process of ours keeps busy.", "cpu_cores"),
        ("resident_memory_bytes", "Memory that a process of ours has in RAM.", "rss_bytes"),
    ):
        family = GaugeMetricFamily(f"appliance:process_{name}", text, labels=("process",))
        for process, known in processes.items():
            if known[key] is not None:
                family.add_metric((process,), known[key])
        yield family


def _cards(cards: list[Mapping[str, Any]]) -> Iterator[Metric]:
    if not cards:
        return
    labels = ("gpu", "name")
    for name, text, key, factor in CARD:
        family = GaugeMetricFamily(f"appliance:{name}", text, labels=labels)
        for card in cards:
            if card[key] is not None:
                family.add_metric((str(card["index"]), str(card["name"])), card[key] * factor)
        yield family
    slowed = GaugeMetricFamily("appliance:gpu_throttled", "1 for each reason why the clocks are low.", labels=(*labels, "reason"))
    for card in cards:
        for reason in card["throttle_reasons"]:
            slowed.add_metric((str(card["index"]), str(card["name"]), reason), 1)
    yield slowed
