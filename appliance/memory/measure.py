"""What a card says of its memory once it has worked, held against the plan: pure arithmetic, no torch.

A plan for a card contains estimates: what the driver and the allocator take. So weights are loaded, steps of every kind run over
a cache of almost nothing, and what is then held takes the place of what was planned for it. The cache gets what that leaves::

    budget | weights, workspace, runtime: as planned | CUDA graphs | KV cache: as planned                  |
           | held, as measured                            | CUDA graphs | KV cache: no more than was planned |

What recorded steps take is known when they are: where that is too much, they and a smaller cache are made once more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from appliance.memory.plan import SHORTEST_AUTO, Measured, MemoryPlan, PlanError, Remedy
from appliance.memory.text import size_text


@dataclass(frozen=True)
class Reading:
    """Bytes of a card at one moment."""

    free: int  # of the card, for all programs
    reserved: int  # by this process's allocator
    peak: int  # by this process's allocator at most, since work began

    def held(self, available: int) -> int:
        """What this process needs of ``available``, which was free before it began.

        What is missing there is in its hands (or in those of another program, which came since), and what it had for a while it
        will want again. When another program has left, at least what the allocator has is held.
        """
        return max(available - self.free, self.reserved) + max(0, self.peak - self.reserved)


def measured(plan: MemoryPlan, reading: Reading, *, auto_length: bool) -> MemoryPlan:
    """The plan with as many blocks as the measurement leaves, and never more.

    Where they are fewer than one sequence of the longest length needs, ``auto_length`` makes that shorter; else, or where too few
    are left for any use, PlanError with what would fit.
    """
    held, kv = reading.held(plan.device.available) + plan.weights.get("adapters", 0), plan.kv  # these come later
    left = plan.budget - held - plan.graph_bytes
    blocks = min(plan.num_blocks, max(0, left) // kv.block_bytes)
    length = plan.max_model_len
    if auto_length and blocks < kv.blocks(length):
        length = max(blocks * kv.block_size, min(SHORTEST_AUTO, length))
    if blocks < kv.blocks(length):
        raise _too_little(plan, held, length, blocks)
    planned = plan.weight_bytes + plan.workspace + plan.state_bytes + plan.runtime
    found = Measured(held=held, planned=planned, planned_blocks=plan.num_blocks, planned_len=plan.max_model_len)
    return replace(plan, num_blocks=blocks, max_model_len=length, measured=found)


def recorded(plan: MemoryPlan, found: MemoryPlan) -> MemoryPlan | None:
    """``plan`` with what recorded steps took, where that is more than it had for them and all is more than the budget.

    ``found``: the same plan, measured, with its cache in place and its steps recorded. None where it is within the budget.
    """
    measured, spare = found.measured, plan.graphs.get("spare_block", 0)
    if measured is None or measured.graphs is None:
        return None
    taken = measured.graphs + spare
    if measured.held + found.kv_bytes + taken <= plan.budget:
        return None
    return replace(plan, graphs={**plan.graphs, "steps": plan.graphs.get("steps", 0) + taken - plan.graph_bytes})


def _too_little(plan: MemoryPlan, held: int, length: int, blocks: int) -> PlanError:
    need, size = plan.kv.blocks(length) * plan.kv.block_bytes, plan.kv.block_size
    tokens, remedies = plan.kv.blocks(length) * size, []
    share = math.ceil(100 * (held + plan.graph_bytes + need) / plan.device.total) / 100
    if held + plan.graph_bytes + need <= plan.free and plan.budget < plan.free and share <= 1:
        remedies.append(_remedy("gpu_memory_utilization", share, "less memory is left to others", tokens, length))
    if plan.graphs and held + need <= plan.budget:
        remedies.append(_remedy("enforce_eager", True, "decoding is slower", tokens, length))
    if blocks * size >= 2:
        remedies.append(_remedy("max_model_len", blocks * size, "a shorter context", blocks * size, blocks * size))
    graphs = f", CUDA graphs will need {size_text(plan.graph_bytes)}" if plan.graphs else ""
    message = (
        f"{plan.model} does not fit on {plan.device.name}: {size_text(held)} are held with weights loaded and a step of "
        f"{plan.max_num_batched_tokens} tokens computed{graphs}, and of the budget of {size_text(plan.budget)} "
        f"({plan.budget_source}) room for {blocks} KV blocks is left; one sequence of {length} tokens needs "
        f"{plan.kv.blocks(length)} ({size_text(need)})"
    )
    if remedies:
        return PlanError(f"{message}. What would fit: {', or '.join(map(str, remedies))}", tuple(remedies))
    return PlanError(f"{message}. A smaller --max-num-batched-tokens takes less, and so does a smaller model")


def _remedy(option: str, value: object, cost: str, tokens: int, length: int) -> Remedy:
    effect = f"{cost}; room for {tokens:,} tokens at least, {length:,} in one sequence"
    return Remedy(options={option: value}, effect=effect, tokens=tokens, max_model_len=length)


def categories(plan: MemoryPlan) -> dict[str, int]:
    """Planned bytes of what can be held against a measurement when the engine is ready."""
    found = {"weights": plan.weight_bytes, "rotary table": plan.scratch["positions"], "KV cache": plan.kv_bytes}
    found |= {"states": plan.state_bytes} if plan.sequence_bytes else {}
    found |= {"swap space": plan.swap_bytes} if plan.swap_blocks else {}
    found |= {"CUDA graphs": plan.graph_bytes} if plan.graphs else {}
    return found | {"runtime": plan.runtime}


def comparison(planned: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """A line for each category that was measured: planned, measured, and the difference."""
    lines = [f"{'':<16}{'planned':>13}{'measured':>13}{'difference':>13}"]
    for name, size in found.items():
        off = size - planned[name]
        difference = f"{'-' if off < 0 else '+'}{size_text(abs(off))}" if off else "none"
        lines.append(f"{name:<16}{size_text(planned[name]):>13}{size_text(size):>13}{difference:>13}")
    return lines
