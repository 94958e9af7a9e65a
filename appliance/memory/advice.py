"""What would make a model fit, each found by planning again with it: what is advised is known to work.

Ranked by what it costs, the mildest first: memory that is free anyway; swap space; a cache in FP8 (docs/kv-cache.md has what that
does to the answers); slower prompts; fewer requests at once; slower decoding; a head in int8; a cache in int4; a shorter context;
weights that are streamed from the host; another checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from appliance.config import GIB
from appliance.memory.demand import Demand
from appliance.memory.devices import DeviceInfo
from appliance.memory.fit import fit, last
from appliance.memory.plan import SHORTEST_AUTO, KVSpec, MemoryPlan, PlanError, Remedy
from appliance.memory.settings import Settings, cache_dtype
from appliance.memory.text import size_text
from quant.errors import InputError

QUARTER = GIB // 4
SMALLEST = 16  # shorter contexts and smaller steps than this are not advised
MODEST = 256, 16
"""Tokens and sequences of a step, at least, where several things change: with fewer, much speed is lost for little memory."""


@dataclass(frozen=True)
class Option:
    """One thing that can change. Its values go from the mildest to the strongest: what fits with one fits with those after it."""

    values: Sequence[Any]
    cost: str  # in words
    change: Callable[[Any], dict[str, Any]]  # of Settings, by field; demand: another model
    flags: Callable[[Any], dict[str, Any]]  # the same as options of EngineConfig
    field: str = ""  # of Settings, where it matters which


@dataclass(frozen=True)
class Variants:
    """The same model otherwise: demands that planning made in vain may be tried with."""

    tables: Sequence[tuple[Demand, dict[str, str]]] = ()  # with head, embedding, or both in int8, by options; the mildest first
    quantized: Mapping[str, Demand] | None = None  # of other checkpoints, by what they are


@dataclass(frozen=True)
class Crowd:
    """So many sequences of so many tokens must fit at once, which is then no thing to change."""

    sequences: int
    tokens: int

    def fits(self, plan: MemoryPlan) -> bool:
        running = min(plan.max_num_seqs, plan.sequences(self.tokens))
        return plan.max_model_len >= self.tokens and running >= self.sequences


Plan = Callable[[Mapping[str, object]], MemoryPlan | None]


def advise(
    error: PlanError,
    demand: Demand,
    settings: Settings,
    device: DeviceInfo,
    variants: Variants | None = None,
    host: DeviceInfo | None = None,
    crowd: Crowd | None = None,
) -> PlanError:
    """The error, with the remedies that work; else the plain truth."""
    if found := remedies(demand, settings, device, variants, host, crowd):
        return PlanError(f"{error}. What would fit: {', or '.join(map(str, found))}", tuple(found))
    return PlanError(f"{error}. No setting makes it fit on this device: it needs one with more memory, or a smaller model")


def remedies(
    demand: Demand,
    settings: Settings,
    device: DeviceInfo,
    variants: Variants | None = None,
    host: DeviceInfo | None = None,
    crowd: Crowd | None = None,
) -> list[Remedy]:
    """What makes the model fit, with the crowd; where no single change does, one set of changes."""
    variants = variants or Variants()

    def plan(changes: Mapping[str, object]) -> MemoryPlan | None:
        changed = {name: value for name, value in changes.items() if name != "demand"}
        chosen = changes.get("demand", demand)
        assert isinstance(chosen, Demand)
        try:
            found = fit(chosen, replace(settings, **changed), device, host)  # type: ignore[arg-type]
        except InputError:  # a PlanError, or a cache that its heads do not fill
            return None
        return found if crowd is None or crowd.fits(found) else None

    def known(*least: int) -> list[Option]:
        found = options(demand, settings, device, variants, *least, crowd=crowd)
        return [option for option in found if not (crowd and option.field in ("max_seqs", "max_len"))]

    good = [remedy for option in known() if (remedy := alone(plan, option)) is not None]
    if not good:
        together = combined(plan, known(*MODEST)) or combined(plan, known())
        good = [] if together is None else [together]
    for words, smaller in (variants.quantized or {}).items():
        for option in (None, *(option for option in known() if crowd and option.field == "kv_dtype")):
            changes, flags = (option.change(option.values[0]), option.flags(option.values[0])) if option else ({}, {})
            if (found := plan({"demand": smaller, **changes})) is not None:
                effect = f"weights of {size_text(found.weight_bytes)}, at some cost in quality; {room(found)}"
                tokens, length = found.tokens, found.max_model_len
                good.append(Remedy(options=flags, effect=effect, tokens=tokens, max_model_len=length, instead=words))
                break
    return good


def alone(plan: Plan, option: Option) -> Remedy | None:
    """The mildest value of an option that, changed alone, makes the model fit."""
    index = _first(option.values, lambda value: plan(option.change(value)) is not None)
    return None if index is None else _remedy(plan, [(option, option.values[index])])


def combined(plan: Plan, known: Sequence[Option]) -> Remedy | None:
    """Several changes: the mildest that together suffice, without those that then turn out not to be needed.

    Each of the rest is at its mildest value that does, from the costliest on.
    """
    chosen: list[tuple[Option, Any]] = []
    for option in known:
        if plan(_changes(chosen)) is None and option.values:
            chosen.append((option, option.values[-1]))
    if plan(_changes(chosen)) is None:
        return None
    for place in reversed(range(len(chosen))):
        option, before, after = chosen[place][0], chosen[:place], chosen[place + 1 :]
        if plan(_changes([*before, *after])) is not None:
            chosen = [*before, *after]
            continue
        index = _first(
            option.values,
            lambda value, a=before, one=option, b=after: plan(_changes([*a, (one, value), *b])) is not None,  # type: ignore[misc]
        )
        assert index is not None
        chosen[place] = option, option.values[index]
    return _remedy(plan, chosen)


def _changes(chosen: Sequence[tuple[Option, Any]]) -> dict[str, Any]:
    return {name: value for option, choice in chosen for name, value in option.change(choice).items()}


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
        found.append(_option("gpu_memory_reserve", "reserve", [0], "no memory is kept free"))
    if settings.swap_bytes:
        quarters = range(math.ceil(settings.swap_bytes / QUARTER) - 1, -1, -1)
        cost = "more of what is preempted is computed again"
        found.append(Option(quarters, cost, lambda n: {"swap_bytes": n * QUARTER}, lambda n: {"swap_space": n * QUARTER / GIB}))
    if settings.kv_dtype is None:
        found.append(_cache("fp8", "keys and values in 8 bits"))
    found.append(_steps(settings, max(tokens, crowd.sequences), crowd))
    if settings.max_seqs is not None and device.kind == "cuda":
        fewer = range(settings.max_seqs - 1, sequences - 1, -1)
        found.append(_option("max_num_seqs", "max_seqs", fewer, "fewer requests run at once"))
    if settings.graphs:
        found.append(Option([True], "decoding is slower", lambda _: {"graphs": False}, lambda _: {"enforce_eager": True}))
    if variants.tables:
        names = [{"lm_head_dtype": "head", "embedding_dtype": "embedding"}[name] for name in variants.tables[-1][1]]
        cost = f"the {' or '.join(names)} in 8 bits"
        found.append(Option(variants.tables, cost, lambda table: {"demand": table[0]}, lambda table: table[1]))
    if settings.kv_dtype != "int4":
        found.append(_cache("int4", "keys and values in 4 bits"))
    return [*found, _context(demand, settings), *_streaming(demand, settings, device)]


def _option(name: str, field: str, values: Sequence[Any], cost: str) -> Option:
    """One whose value is the same in EngineConfig and in Settings."""
    return Option(values, cost, lambda value: {field: value}, lambda value: {name: value}, field)


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


def _context(demand: Demand, settings: Settings) -> Option:
    """Shorter sequences; where the cache's size is given, in one that holds the longest."""
    lengths, cost = range(wanted_length(demand, settings) - 1, SMALLEST - 1, -1), "a shorter context"
    if settings.kv_bytes is None:
        return _option("max_model_len", "max_len", lengths, cost)

    def cache(length: int) -> int:
        return -(-length // settings.block_size) * _block_bytes(demand, settings)

    return Option(
        lengths,
        cost,
        lambda length: {"max_len": length, "kv_bytes": cache(length)},
        lambda length: {"max_model_len": length, "kv_cache_memory_bytes": cache(length)},
        "max_len",
    )


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
    dtype = settings.kv_dtype or demand.dtype
    return KVSpec(demand.layers, demand.kv_heads, demand.head_dim, settings.block_size, dtype).block_bytes


def wanted_length(demand: Demand, settings: Settings) -> int:
    """The context that must fit: the one asked for, or the least that auto is content with."""
    return settings.max_len or min(SHORTEST_AUTO, demand.max_len)


def _remedy(plan: Plan, chosen: Sequence[tuple[Option, Any]]) -> Remedy:
    found = plan(_changes(chosen))
    assert found is not None
    flags = {name: value for option, choice in chosen for name, value in option.flags(choice).items()}
    cost = ", ".join(dict.fromkeys(option.cost for option, _ in chosen))
    return Remedy(options=flags, effect=f"{cost}; {room(found)}", tokens=found.tokens, max_model_len=found.max_model_len)


def room(plan: MemoryPlan) -> str:
    return f"room for {plan.tokens:,} tokens, {plan.max_model_len:,} in one sequence"


def _first(values: Sequence[object], good: Callable[[object], bool]) -> int | None:
    """Index of the first good value, where all those after a good one are good."""
    found = last(lambda n: good(values[len(values) - 1 - n]), 0, len(values) - 1)
    return None if found is None else len(values) - 1 - found
