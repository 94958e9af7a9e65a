"""What can change where a model does not fit, from the mildest to the strongest, and who must fit. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from appliance.config import GIB
from appliance.memory.demand import Demand
from appliance.memory.devices import DeviceInfo
from appliance.memory.plan import SHORTEST_AUTO, MemoryPlan
from appliance.memory.settings import Settings, cache_dtype

QUARTER = GIB // 4
SMALLEST = 16  # shorter contexts and smaller steps than this are not advised


@dataclass(frozen=True)
class Option:
    """One thing that can change. Its values go from the mildest to the strongest: what fits with one fits with those after it."""

    values: Sequence[Any]
    cost: str  # in words
    change: Callable[[Any], dict[str, Any]]  # of Settings, or of Machinery, by field; demand: another model
    flags: Callable[[Any], dict[str, Any]]  # the same as options of EngineConfig
    field: str = ""  # of Settings, where it matters which


@dataclass(frozen=True)
class Variants:
    """The same model otherwise: demands that planning made in vain may be tried with."""

    tables: Sequence[tuple[dict[str, int], dict[str, str]]] = ()  # in int8: fields of Machinery, options; the mildest first
    online: Sequence[str] = ()  # --quantization of an unquantized checkpoint, the mildest first
    threads: Sequence[int] = ()  # fewer, where each costs something
    made: Callable[..., Demand] | None = None  # by fields of Machinery, and quantization
    quantized: Mapping[str, Demand] | None = None  # of other checkpoints, by what they are


@dataclass(frozen=True)
class Crowd:
    """So many sequences of so many tokens must fit at once, which is then no thing to change."""

    sequences: int
    tokens: int

    def fits(self, plan: MemoryPlan) -> bool:
        running = min(plan.max_num_seqs, plan.sequences(self.tokens))
        return plan.max_model_len >= self.tokens and running >= self.sequences


def options(
    demand: Demand,
    settings: Settings,
    device: DeviceInfo,
    variants: Variants,
    tokens: int = SMALLEST,
    sequences: int = 1,
    *,
    crowd: Crowd | None = None,
) -> list[Option]:
    """What can change, the mildest first. ``tokens``, ``sequences``: of a step, at least."""
    crowd = crowd or Crowd(1, 1)
    found = [_memory(demand, settings, crowd)]
    if settings.reserve:
        sizes = [n * QUARTER for n in _quarters(settings.reserve)]
        found.append(_option("gpu_memory_reserve", "reserve", sizes, "less memory is kept free"))
    if settings.swap_bytes:
        cost, less = "more of what is preempted is computed again", _quarters(settings.swap_bytes)
        less = less[:-1] if settings.swaps else less  # there must be some
        found.append(Option(less, cost, lambda n: {"swap_bytes": n * QUARTER}, lambda n: {"swap_space": n * QUARTER / GIB}))
    if settings.kv_dtype is None:
        found.append(_cache("fp8", "keys and values in 8 bits"))
    found.append(_steps(settings, max(tokens, crowd.sequences), crowd))
    if settings.max_seqs is not None:
        fewer = range(min(settings.max_seqs, settings.max_tokens) - 1, sequences - 1, -1)
        found.append(_option("max_num_seqs", "max_seqs", fewer, "fewer requests run at once"))
    if demand.sequence_bytes and settings.prefixes:
        cost = "prompts that go on from earlier ones are computed whole"
        found.append(Option([False], cost, lambda _: {"prefixes": False}, lambda _: {"enable_prefix_caching": False}))
    if settings.graphs:
        found.append(Option([True], "decoding is slower", lambda _: {"graphs": False}, lambda _: {"enforce_eager": True}))
    if variants.tables:
        names = [{"lm_head_dtype": "head", "embedding_dtype": "embedding"}[name] for name in variants.tables[-1][1]]
        cost = f"the {' or '.join(names)} in 8 bits"
        found.append(Option(variants.tables, cost, lambda table: table[0], lambda table: table[1]))
    if variants.online:
        cost = "layers rounded while they are loaded, at some cost in quality"
        found.append(Option(variants.online, cost, lambda name: {"quantization": name}, lambda name: {"quantization": name}))
    if settings.kv_dtype != "int4":
        found.append(_cache("int4", "keys and values in 4 bits"))
    found += [*_contexts(demand, settings), *_streaming(demand, settings, device)]
    return [*found, _option("threads", "threads", variants.threads, "fewer threads compute")]


def _option(name: str, field: str, values: Sequence[Any], cost: str) -> Option:
    """One whose value is the same in EngineConfig and in Settings."""
    return Option(values, cost, lambda value: {field: value}, lambda value: {name: value}, field)


def _quarters(nbytes: int) -> range:
    """Quarters of a GiB that are less than so many bytes, down to none."""
    return range(math.ceil(nbytes / QUARTER) - 1, -1, -1)


def _cache(name: str, cost: str) -> Option:
    return Option([name], cost, lambda name: {"kv_dtype": cache_dtype(name)}, lambda name: {"kv_cache_dtype": name}, "kv_dtype")


def _memory(demand: Demand, settings: Settings, crowd: Crowd) -> Option:
    """More of the device; where the cache's size is given, another one: what must fit where too little was given."""
    if settings.kv_bytes is None:
        shares = [share / 100 for share in range(math.floor(settings.utilization * 100) + 1, 101)]
        return _option("gpu_memory_utilization", "utilization", shares, "less memory is left to others")
    block, one, each = (
        _block_bytes(demand, settings),
        -(-wanted_length(demand, settings) // settings.block_size),
        -(-crowd.tokens // settings.block_size),
    )
    least = max(one, crowd.sequences * each)
    sizes = range(max(least, settings.kv_bytes // block) * block, (least - 1) * block, -block)
    return _option("kv_cache_memory_bytes", "kv_bytes", sizes, "a cache of another size")


def _steps(settings: Settings, least: int, crowd: Crowd) -> Option:
    """Smaller steps; or one that has a token for each of a crowd, where it has not."""
    short = crowd.sequences > settings.max_tokens
    steps = [crowd.sequences] if short else range(settings.max_tokens - 1, least - 1, -1)
    cost = f"prompts are computed in {'larger' if short else 'smaller'} pieces"
    return _option("max_num_batched_tokens", "max_tokens", steps, cost)


def _contexts(demand: Demand, settings: Settings) -> list[Option]:
    """Shorter sequences; where the cache's size is given, in that one if it is too small, and in one that holds the longest."""
    wanted, cost = wanted_length(demand, settings), "a shorter context"
    lengths = range(wanted - 1, SMALLEST - 1, -1)
    shorter = _option("max_model_len", "max_len", lengths, cost)
    if settings.kv_bytes is None:
        return [shorter]

    def cache(length: int) -> int:
        return -(-length // settings.block_size) * _block_bytes(demand, settings)

    smaller = Option(
        lengths,
        cost,
        lambda length: {"max_len": length, "kv_bytes": cache(length)},
        lambda length: {"max_model_len": length, "kv_cache_memory_bytes": cache(length)},
        "max_len",
    )
    return [shorter, smaller] if settings.kv_bytes < cache(wanted) else [smaller]


def _streaming(demand: Demand, settings: Settings, device: DeviceInfo) -> list[Option]:
    """Weights in host memory, by half GiB: more of them, and, where some were asked for and the host has too little, fewer."""
    if device.kind == "cpu" or not demand.streamed:
        return []
    whole = sum(sum(parts.values()) for parts in demand.streamed)

    def change(half: int) -> dict[str, Any]:
        return {"offload_gb": half / 2, "graphs": settings.graphs and not half}

    more = Option(
        range(math.floor(settings.offload_gb * 2) + 1, math.ceil(2 * whole / GIB) + 1),
        "these weights come over the bus in every step",
        change,
        lambda half: {"cpu_offload_gb": half / 2},
    )
    fewer = range(math.ceil(settings.offload_gb * 2) - 1, -1, -1)
    return [more, replace(more, values=fewer, cost="more of the weights are on the card")]


def _block_bytes(demand: Demand, settings: Settings) -> int:
    return demand.kv(settings.block_size, settings.kv_dtype).block_bytes


def wanted_length(demand: Demand, settings: Settings) -> int:
    """The context that must fit: the one asked for, or the least that auto is content with."""
    return settings.max_len or min(SHORTEST_AUTO, demand.max_len)
