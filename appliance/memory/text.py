"""The plan as people read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from appliance.memory.plan import MemoryPlan

_BAR = 30


def size_text(nbytes: int) -> str:
    """Bytes in the largest binary unit that keeps a digit before the point."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):.2f} {unit}"
    return f"{nbytes} bytes"


def plan_table(plan: MemoryPlan) -> str:
    """Where the bytes go, a bar a row (its full width is the budget), and how many sequences of which length fit."""
    device = plan.device
    rows = [(f"weights: {part}", size) for part, size in plan.weights.items() if size]
    rows += [(f"workspace: {part}", size) for part, size in plan.scratch.items() if size]
    if plan.graphs:
        rows.append((f"CUDA graphs, {len(plan.decode_sizes)} sizes", plan.graph_bytes))
    rows += [("runtime", plan.runtime), (f"KV cache, {plan.num_blocks:,} blocks", plan.kv_bytes)]
    lines = [
        f"Memory plan for {plan.model}",
        f"  {plan.architecture}, {plan.quantization}, activations and KV cache in {plan.dtype}, head in {plan.head}",
        f"  {device.name} ({device.kind}): {size_text(device.total)}, {size_text(device.available)} available",
        f"  budget {size_text(plan.budget)}: {plan.budget_source}",
        "",
        *(_row(name, size, plan.budget) for name, size in rows),
        _row("total", plan.total, plan.budget),
        _row("left of the budget", plan.budget - plan.total, plan.budget),
        *measured_lines(plan),
        "",
        f"KV cache: {plan.tokens:,} tokens in blocks of {plan.kv.block_size} "
        f"({size_text(plan.kv.block_bytes)} a block, {size_text(plan.kv.token_bytes)} a token)",
        f"Sequences that fit at once (at most {plan.max_num_seqs:,} run together):",
        f"  {'tokens each':>12}  {'sequences':>12}",
        *(f"  {length:>12,}  {plan.sequences(length):>12,.1f}" for length in plan.lengths()),
        f"Maximum concurrency for {plan.max_model_len:,} tokens per request: {plan.sequences(plan.max_model_len):.2f}x",
    ]
    return "\n".join(lines)


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


def _row(name: str, size: int, budget: int) -> str:
    share = size / budget
    bar = "#" * max(round(share * _BAR), 1 if size else 0)
    return f"  {name:<28}{size_text(size):>13}{share:>7.1%}  {bar}".rstrip()
