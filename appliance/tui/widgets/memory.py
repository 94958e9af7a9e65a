"""The memory plan as one bar, and what the process really takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from textual.content import Content
from textual.widget import Widget

from appliance.core.messages import Stats
from appliance.tui.feed import View
from appliance.tui.text import percent, segments, size

GLYPHS = {"weights": ("█", "$primary-lighten-1"), "KV cache": ("▓", "$text-success"), "workspace": ("▒", "$text-warning"),
          "runtime": ("░", "$text-error")}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parts:
    """The plan's bytes by part, and the budget they must stay in."""

    sizes: dict[str, int]
    budget: int


def plan_parts(plan: Mapping[str, Any]) -> Parts | None:
    """Out of MemoryPlan.to_dict(); None where the plan does not say."""
    try:
        sizes = {
            "weights": int(plan["weights_bytes"]["total"]),
            "KV cache": int(plan["kv_cache"]["bytes"]),
            "workspace": int(plan["workspace_bytes"]["total"]),
            "runtime": int(plan["runtime_bytes"]),
        }
        return Parts(sizes, max(int(plan["budget_bytes"]), sum(sizes.values())))
    except (KeyError, TypeError):
        return None


def memory(view: View | None, width: int) -> Content:
    """The bar, then its legend."""
    stats = view.stats if view else Stats()
    parts = plan_parts(view.info.plan) if view and view.info else None
    if parts is None:
        return Content(f"process {size(stats.rss_bytes)}" if stats.rss_bytes else "no plan yet")
    widths = segments(list(parts.sizes.values()), width, parts.budget)
    bar = [(GLYPHS[name][0] * n, GLYPHS[name][1]) for name, n in zip(parts.sizes, widths, strict=True)]
    free = ("·" * (width - sum(widths)), "$text-muted")
    return Content.assemble(*bar, free, "\n", _legend(parts, stats, width))


def _legend(parts: Parts, stats: Stats, width: int) -> Content:
    used = f" ({percent(stats.blocks_used, stats.blocks_total)} used)"
    items = []
    for name, amount in parts.sizes.items():
        glyph, style = GLYPHS[name]
        items.append(Content.assemble((glyph, style), f" {name} {size(amount)}"))
    totals = [Content(f"plan {size(sum(parts.sizes.values()))} of {size(parts.budget)}"), Content(f"process {size(stats.rss_bytes)}")]
    with_used = [Content.assemble(item, used) if "KV" in item.plain else item for item in items]
    for choice in (with_used + totals, items + totals, items + totals[:1], items, items[:2]):
        line = Content("  ").join(choice)
        if line.cell_length <= width:
            break
    return line


class Memory(Widget):
    BORDER_TITLE = "Memory"
    view: View | None = None

    def show(self, view: View | None) -> None:
        self.view = view
        self.refresh()

    def render(self) -> Content:
        return memory(self.view, self.content_size.width)
