"""What a ready engine takes, held against its plan by category; the process's own share is kept for the next plan."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil

from appliance.memory.graphs import measured_layer
from appliance.memory.learned import model_words, record, record_layer
from appliance.memory.measure import categories, comparison
from appliance.memory.plan import MemoryPlan
from appliance.runtime.runner import Runner

log = logging.getLogger("appliance.startup")


class Resident(NamedTuple):
    """Bytes of a process in memory: its ``own``, and ``code``, pages of files, which the system takes away and brings back."""

    own: int
    code: int = 0

    @property
    def total(self) -> int:
        return self.own + self.code


def resident() -> Resident:
    """Of this process, now."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        pairs = (line.partition(":") for line in lines)
        found = {key: int(rest.split()[0]) << 10 for key, _, rest in pairs if key.startswith("Rss")}
        return Resident(found["RssAnon"] + found["RssShmem"], found["RssFile"])
    except (OSError, KeyError):  # not Linux: nobody tells the two apart
        return Resident(psutil.Process().memory_info().rss)


def footprint(plan: MemoryPlan, runner: Runner, loaded: Resident | None) -> dict[str, int]:
    """Measured bytes, by the categories of the plan. ``loaded``: ``resident()`` with the weights in place and nothing else.

    It is None where the process has other things than this engine, a program's data or other engines: then its own share cannot
    be told from them, and is left out. A card's own share is what it held before the cache, less what was planned for weights,
    workspace and states.
    """
    decoder = runner.decoder
    found = {"weights": decoder.nbytes - decoder.streamed - decoder.table_bytes + plan.offload.staging_bytes}
    found["weights"] += plan.weights.get("adapters", 0)  # they come later, into what is set aside for them
    found["rotary table"] = decoder.table_bytes
    spare = plan.kv.block_bytes if plan.graphs else 0
    found["KV cache"] = sum(tensor.nbytes for cache in runner.caches for tensor in cache.tensors) - spare
    if runner.states:
        spare = plan.sequence_bytes if plan.graphs else 0
        found["states"] = sum(tensor.nbytes for states in runner.states for tensor in states) - spare
    if plan.swap_blocks:
        found["swap space"] = runner.swap_bytes
    if plan.measured is not None and plan.graphs and plan.measured.graphs is not None:
        found["CUDA graphs"] = plan.measured.graphs
    if loaded is None:
        return found
    measured = plan.measured
    others = plan.weight_bytes + plan.workspace + plan.state_bytes
    own = loaded.total - decoder.nbytes if measured is None else measured.held - others
    return found | {"runtime": own}


def teach_graphs(plan: MemoryPlan, runner: Runner) -> None:
    """To be called when steps have been recorded: keeps what they took for the next plan of such a model on this card."""
    if plan.measured is not None and plan.measured.graphs is not None:
        layers = plan.kv.layers
        one = measured_layer(plan.graphs, plan.measured.graphs, sizes=len(plan.decode_sizes), layers=layers)
        words = model_words(plan.architecture, plan.quantization, plan.dtype, layers)
        record_layer(plan.device, runner.decoder.ops.name, words, one)


def settle(plan: MemoryPlan, runner: Runner, loaded: Resident | None) -> MemoryPlan:
    """To be called when the engine is ready: tells the differences, keeps what the next plan on this device can use."""
    found = footprint(plan, runner, loaded)
    for line in comparison(categories(plan), found):
        log.info("memory: %s", line)
    if loaded is not None:
        code = loaded.code if plan.measured is None else 0
        record(plan.device, runner.decoder.ops.name, found["runtime"] - code, code)
    return replace(plan, found=found)
