"""The plan as people read it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from appliance.memory.devices import DeviceInfo
    from appliance.memory.plan import MemoryPlan

_BAR = 30
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def size_text(nbytes: int) -> str:
    """Bytes in the largest binary unit that keeps a digit before the point, when rounded."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if round(nbytes / (1 << shift - 10), 2) >= 1024:
            return f"{nbytes / (1 << shift):.2f} {unit}"
    return f"{nbytes} bytes"


@dataclass(frozen=True)
class Part:
    """Some bytes of the device, and what they are for."""

    category: str  # weights, workspace, CUDA graphs, states, runtime, grammars, swap space, KV cache
    name: str
    nbytes: int


def parts_of(plan: MemoryPlan) -> list[Part]:
    """All that the plan takes of the device, without empty parts: their sum is ``plan.total``."""
    found = [Part("weights", name, size) for name, size in plan.weights.items()]
    found += [Part("workspace", name, size) for name, size in plan.scratch.items()]
    found.append(Part("CUDA graphs", f"{len(plan.decode_sizes)} sizes", plan.graph_bytes))
    found.append(Part("states", owners(plan), plan.state_bytes))
    found.append(Part("runtime", "the process and its libraries", plan.runtime))
    if plan.device.kind == "cpu":
        found += [Part("grammars", name, size) for name, size in plan.grammars.items()]
        found.append(Part("swap space", f"{plan.swap_blocks:,} blocks", plan.swap_bytes))
        found.append(Part("swap space", "what left the cache", plan.ghost_bytes))
    found.append(Part("KV cache", f"{plan.num_blocks:,} blocks", plan.kv_bytes))
    return [part for part in found if part.nbytes]


def rest_of(plan: MemoryPlan) -> list[tuple[str, int]]:
    """What the plan does not take of the device's memory, and why: with the parts this is all of it."""
    held = plan.device.total - plan.device.available
    who = "in use by others" if plan.device.kind == "cpu" else "held by the driver and others"
    rest = [("left of the budget", plan.budget - plan.total), ("outside the budget", plan.device.total - plan.budget - held)]
    return [(name, size) for name, size in [*rest, (who, held)] if size > 0]


def plan_table(plan: MemoryPlan) -> str:
    """Where the bytes go, a bar a row (its full width is the budget), and how many sequences of which length fit."""
    cache = "" if plan.kv.dtype == plan.dtype else f", KV cache in {plan.kv.dtype}"
    both = " and KV cache" if not cache else ""
    table = "" if plan.embedding == plan.dtype or "shared" in plan.head else f", embedding in {plan.embedding}"
    lines = [
        f"Memory plan for {plan.model}",
        f"  {plan.architecture}, {plan.quantization}, activations{both} in {plan.dtype}{cache}, head in {plan.head}{table}",
        *device_lines(plan.device),
        f"  budget {size_text(plan.budget)}: {plan.budget_source}",
        "",
        "Where every byte goes (bars and shares are of the budget)",
        *_parts(plan),
        _row("total", plan.total, plan.budget),
        _row("left of the budget", max(0, plan.budget - plan.total), plan.budget),
        *measured_lines(plan),
        *host_lines(plan),
        "",
        f"KV cache: {plan.tokens:,} tokens in blocks of {plan.kv.block_size} "
        f"({size_text(plan.kv.block_bytes)} a block, {size_text(plan.kv.token_bytes)} a token)",
        *([f"  limited to {plan.limited}"] if plan.limited else []),
        *states_lines(plan),
        f"Sequences that fit at once (at most {plan.max_num_seqs:,} run together):",
        *columns(("tokens each", "sequences"), [(f"{length:,}", f"{plan.sequences(length):,.1f}") for length in plan.lengths()]),
        f"Maximum concurrency for {plan.max_model_len:,} tokens per request: {plan.sequences(plan.max_model_len):.2f}x",
    ]
    return "\n".join(lines)


def device_lines(device: DeviceInfo) -> list[str]:
    """The device, and who else is on it."""
    lines = [f"  {device.name} ({device.kind}): {size_text(device.total)}, {size_text(device.available)} available"]
    return [*lines, f"  {held_by(device)}"] if device.holders else lines


def held_by(device: DeviceInfo) -> str:
    """Who holds how much of the device: five by name."""
    names = [f"{one.name} (pid {one.pid}{'' if one.nbytes is None else f', {size_text(one.nbytes)}'})" for one in device.holders]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    held = size_text(max(0, device.total - device.available))
    return f"{held} held by the driver and others: {', '.join(names[:5])}{more}"


def _parts(plan: MemoryPlan) -> list[str]:
    """Categories, with their parts below where there are several."""
    lines = []
    for category, group in groupby(parts_of(plan), key=lambda part: part.category):
        parts = list(group)
        size = sum(part.nbytes for part in parts)
        detail = (
            f", {parts[0].name}" if len(parts) == 1 and category in ("KV cache", "CUDA graphs", "states", "swap space") else ""
        )
        lines.append(_row(category + detail, size, plan.budget))
        if len(parts) > 1:
            lines += [_row(f"  {part.name}", part.nbytes, plan.budget, bar=False) for part in parts]
    return lines


def host_lines(plan: MemoryPlan) -> list[str]:
    """What a plan for a card takes of the host's memory, and what it takes at most, while weights are loaded."""
    if not plan.host:
        return []
    budget = "" if plan.host_budget is None else f" ({size_text(plan.host_budget)} available)"
    rows = [(name, size) for name, size in plan.host.items() if size] + [("total", sum(plan.host.values()))]
    lines = [f"  {name:<28}{size_text(size):>13}" for name, size in rows]
    lines.append(f"  {'while loading, at most':<28}{size_text(plan.host_peak):>13}")
    return ["", f"Host memory{budget}", *lines, *offload_lines(plan)]


def offload_lines(plan: MemoryPlan) -> list[str]:
    """Which layers are in host memory, and what that means for a step; seconds are among the predicted speeds."""
    offload = plan.offload
    if not offload.layers:
        return []
    numbers, freed = ", ".join(map(str, offload.layers[:8])), size_text(offload.saved)
    if len(offload.layers) > 8:
        numbers += f" .. {offload.layers[-1]}"
    return [
        f"  {len(offload.layers)} of {plan.kv.layers} layers are there ({numbers}): {freed} of the card are freed,",
        f"  every step brings {size_text(offload.step_bytes)} over the bus, and kernels are launched one by one (no CUDA graphs)",
    ]


def states_lines(plan: MemoryPlan) -> list[str]:
    """What a sequence costs beside its tokens, and how many of earlier prompts find theirs."""
    if not plan.sequence_bytes:
        return []
    size = size_text(plan.sequence_bytes)
    kept = f"those of {plan.kept_states} prompts are kept for others that go on there" if plan.kept_states else "none are kept"
    return [f"States: {size} of each sequence that runs, whatever its length; {kept}"]


def owners(plan: MemoryPlan) -> str:
    """Of whom the plan has states, in words."""
    return f"of {plan.max_num_seqs:,} that run" + (f", {plan.kept_states} kept" if plan.kept_states else "")


def measured_lines(plan: MemoryPlan) -> list[str]:
    """What was measured, where something was."""
    found = plan.measured
    if found is None:
        return []
    lines = [
        f"  measured: {size_text(found.held)} held before the KV cache (planned: {size_text(found.planned)}), "
        f"{plan.num_blocks:,} of {found.planned_blocks:,} planned blocks"
    ]
    if plan.max_model_len < found.planned_len:
        lines.append(f"  measured: {plan.max_model_len:,} of {found.planned_len:,} planned tokens a sequence fit")
    if found.graphs is not None:
        lines.append(f"  measured: {size_text(found.graphs)} taken by CUDA graphs (planned: {size_text(plan.graph_bytes)})")
    return lines


def columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table, right-aligned, as wide as its cells."""
    table = [list(head), *map(list, rows)]
    widths = [max(12, *(len(row[i]) for row in table)) for i in range(len(head))]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]


def _row(name: str, size: int, budget: int, *, bar: bool = True) -> str:
    share = size / budget if budget else 0.0
    return f"  {name:<28}{size_text(size):>13}{share:>7.1%}  {_bar(share) if bar and size else ''}".rstrip()


def _bar(share: float) -> str:
    """In eighths of a character where the terminal has them."""
    if not (sys.stdout.encoding or "").lower().startswith("utf"):
        return "#" * max(round(share * _BAR), 1)
    eighths = max(round(share * _BAR * 8), 1)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
