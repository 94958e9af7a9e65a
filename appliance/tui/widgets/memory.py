"""The memory plan as one bar, and what the process really takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from textual.content import Content
from textual.widget import Widget

from appliance.core.messages import Stats, plan_bytes
from appliance.tui.feed import View
from appliance.tui.text import percent, segments, size

GLYPHS = {"weights": ("█", "$primary-lighten-1"), "KV": ("▓", "$text-success"), "workspace": ("▒", "$text-warning"),
          "swap": ("▚", "$primary"), "graphs": ("▒", "$text-accent"), "runtime": ("░", "$text-error")}  # fmt: skip
NAMES = {"kv_cache": "KV"}  # where the plan's own would be too long


@dataclass(frozen=True, slots=True)
class Parts:
    """The plan's bytes by part, and the budget they must stay in."""

    sizes: dict[str, int]
    budget: int


def plan_parts(plan: Mapping[str, Any]) -> Parts | None:
    """Out of MemoryPlan.to_dict(); None where the plan does not say. On a CPU the swap space is in the same memory."""
    found = {NAMES.get(category, category): size for category, size in plan_bytes(plan).items()}
    if plan.get("device", {}).get("kind") != "cpu":
        found.pop("swap", None)
    sizes = {name: found[name] for name in GLYPHS if name in found and (found[name] or name not in ("graphs", "swap"))}
    if not {"weights", "KV", "workspace", "runtime", "budget"} <= found.keys():
        return None
    return Parts(sizes, max(found["budget"], sum(sizes.values())))


def totals(view: View | None) -> str:
    """What is planned and what is taken, in words."""
    parts = _parts(view)
    words = ["Memory"]
    if parts:
        words.append(f"plan {size(sum(parts.sizes.values()))} of {size(parts.budget)}")
    if view and view.stats.rss_bytes:
        words.append(f"process {size(view.stats.rss_bytes)}")
    return " · ".join(words)


def _parts(view: View | None) -> Parts | None:
    return plan_parts(view.info.plan) if view and view.info else None


def memory(view: View | None, width: int) -> Content:
    """The bar, then its legend; a line for the swap space where there is one."""
    parts = _parts(view)
    if view is None or parts is None:
        return Content("no plan yet")
    widths = segments(list(parts.sizes.values()), width, parts.budget)
    bar = [(GLYPHS[name][0] * n, GLYPHS[name][1]) for name, n in zip(parts.sizes, widths, strict=True)]
    free = ("·" * (width - sum(widths)), "$text-muted")
    lines = [Content.assemble(*bar, free), _legend(parts, view.stats, width)]
    if view.stats.swap_total:
        lines.append(swap(view.stats, parts_of_swap(view), width))
    return Content("\n").join(lines)


def parts_of_swap(view: View) -> int:
    """Bytes of the swap space, as the plan has it."""
    return plan_bytes(view.info.plan).get("swap", 0) if view.info else 0


def swap(stats: Stats, nbytes: int, width: int) -> Content:
    """Host memory: a bar of what requests and cached prefixes have there, and the numbers."""
    total, used, kept = stats.swap_total, stats.swap_used, stats.swap_kept
    long = f" {size(nbytes)}: {used:,} of {total:,} blocks used, {kept:,} kept" if nbytes else f" {used:,} of {total:,} used"
    words = next((text for text in (long, f" {percent(used, total)} used", "") if len(text) + 15 <= width), "")
    room = max(width - len(words) - 5, 0)
    widths = segments([used, kept], room, total)
    return Content.assemble(
        "swap ", ("▓" * widths[0], "$text-success"), ("□" * widths[1], "$text-primary"),
        ("·" * (room - sum(widths)), "$text-muted"), words,
    )  # fmt: skip


def _legend(parts: Parts, stats: Stats, width: int) -> Content:
    used = f" ({percent(stats.blocks_used, stats.blocks_total)} used)"
    items = []
    for name, amount in parts.sizes.items():
        glyph, style = GLYPHS[name]
        items.append(Content.assemble((glyph, style), f" {name} {size(amount)}"))
    with_used = [Content.assemble(item, used) if "KV" in item.plain else item for item in items]
    lines = [Content("   ").join(with_used), Content("  ").join(with_used), Content("  ").join(items)]
    return next((line for line in lines if line.cell_length <= width), lines[-1])


class Memory(Widget):
    view: View | None = None

    def show(self, view: View | None) -> None:
        self.view = view
        self.border_title = totals(view)
        self.refresh()

    def render(self) -> Content:
        return memory(self.view, self.content_size.width)
