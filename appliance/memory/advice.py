"""Flags that would make a model fit, each found by planning again with it: what is advised is known to work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from appliance.memory.demand import Demand
from appliance.memory.devices import DeviceInfo
from appliance.memory.plan import SHORTEST_AUTO, KVSpec, MemoryPlan, PlanError, fit
from appliance.memory.settings import Settings

SMALLEST = 16  # shorter contexts and smaller steps than this are not advised


def advise(error: PlanError, demand: Demand, settings: Settings, device: DeviceInfo) -> PlanError:
    """The error, with the remedies that work; where no single flag helps, one set of flags; else the plain truth."""

    def plan(**changes: float | int | None) -> MemoryPlan | None:
        try:
            return fit(demand, replace(settings, **changes), device)  # type: ignore[arg-type]
        except PlanError:
            return None

    remedies = tuple(single_flags(plan, demand, settings))
    if not remedies:
        remedies = tuple(flag_sets(plan, demand, settings))
    if remedies:
        return PlanError(f"{error}. What would fit: {', or '.join(remedies)}", remedies)
    return PlanError(f"{error}. No setting makes it fit on this device: it needs one with more memory, or a smaller model")


Plan = Callable[..., MemoryPlan | None]


def single_flags(plan: Plan, demand: Demand, settings: Settings) -> list[str]:
    """The mildest value of each flag that, changed alone, makes the model fit."""
    sized = None if settings.kv_bytes is None else _cache_size(plan, demand, settings, settings.kv_bytes)
    if sized is not None:
        return [f"--kv-cache-memory-bytes {sized}"]
    found = []
    longest = _largest(lambda n: plan(max_len=n) is not None, SMALLEST, wanted_length(demand, settings) - 1)
    if longest is not None:
        found.append(f"--max-model-len {longest}")
    spare = _largest(lambda n: plan(utilization=(100 - n) / 100) is not None, 0, 99)  # hundredths that may stay free
    if spare is not None:
        found.append(f"--gpu-memory-utilization {(100 - spare) / 100:g}")
    step = _largest(lambda n: plan(max_tokens=n) is not None, SMALLEST, settings.max_tokens - 1)
    if step is not None:
        found.append(f"--max-num-batched-tokens {step}")
    if settings.graphs:
        sequences = _largest(lambda n: plan(max_seqs=n) is not None, 1, settings.max_seqs - 1)
        if sequences is not None:
            found.append(f"--max-num-seqs {sequences}")
        if plan(graphs=False) is not None:
            found.append("--enforce-eager")
    return found


def wanted_length(demand: Demand, settings: Settings) -> int:
    """The context that must fit: the one asked for, or the least that auto is content with."""
    return settings.max_len or min(SHORTEST_AUTO, demand.max_len)


def _block_bytes(demand: Demand, settings: Settings) -> int:
    dtype = settings.kv_dtype or demand.dtype
    return KVSpec(demand.layers, demand.kv_heads, demand.head_dim, settings.block_size, dtype).block_bytes


def _cache_size(plan: Plan, demand: Demand, settings: Settings, given: int) -> int | None:
    """A --kv-cache-memory-bytes that fits: one sequence where too little was given, all that there is where it was too much."""
    block = _block_bytes(demand, settings)
    one = -(-wanted_length(demand, settings) // settings.block_size)
    blocks = _largest(lambda n: plan(kv_bytes=n * block) is not None, one, max(one, given // block))
    return None if blocks is None else blocks * block


def flag_sets(plan: Plan, demand: Demand, settings: Settings) -> list[str]:
    """All the memory there is, small steps, and the longest context that they leave; without recorded steps if it must be."""
    step, block = min(settings.max_tokens, 256), _block_bytes(demand, settings)

    def memory(length: int) -> tuple[str, dict[str, float]]:
        if settings.kv_bytes is None:
            return "--gpu-memory-utilization 1", {"utilization": 1.0}
        cache = -(-length // settings.block_size) * block
        return f"--kv-cache-memory-bytes {cache}", {"kv_bytes": cache}

    longest = wanted_length(demand, settings)
    for eager in ({}, {"graphs": False}) if settings.graphs else ({},):
        fits = partial(plan, max_tokens=step, **eager)
        length = _largest(lambda n, fits=fits: fits(max_len=n, **memory(n)[1]) is not None, SMALLEST, longest)  # type: ignore[misc]
        if length is not None:
            flags = f"{memory(length)[0]} --max-num-batched-tokens {step} --max-model-len {length}"
            return [f"{flags} --enforce-eager" if eager else flags]
    return []


def _largest(good: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest n in low .. high with good(n), where good holds up to some n and no further; None where it never does."""
    if low > high or not good(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low
