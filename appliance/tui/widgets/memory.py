"""The memory plan as a bar, and below it what the engine really takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from textual.content import Content
from textual.widget import Widget

from appliance.core.messages import Stats, plan_bytes
from appliance.tui.feed import View
from appliance.tui.text import MUTED, percent, segments, short_size, size
from appliance.tui.widgets.hardware import summary

GLYPHS = {"weights": ("█", "$primary-lighten-1"), "KV": ("▓", "$text-success"), "workspace": ("▒", "$text-warning"),
          "swap": ("▚", "$primary"), "graphs": ("▤", "$text-accent"), "states": ("▦", "$text-accent"),
          "runtime": ("░", "$text-error"), "grammars": ("▧", "$text-muted")}  # fmt: skip
NAMES = {"kv_cache": "KV"}  # where the plan's own would be too long


@dataclass(frozen=True, slots=True)
class Parts:
    """The plan's bytes by part, and the budget they must stay in."""

    sizes: dict[str, int]
    budget: int


def plan_parts(plan: Mapping[str, Any]) -> Parts | None:
    """Out of MemoryPlan.to_dict(); None where the plan does not say. On a CPU swap space and grammars are in the same memory."""
    found = {NAMES.get(category, category): size for category, size in plan_bytes(plan).items()}
    if plan.get("device", {}).get("kind") != "cpu":
        found = {name: nbytes for name, nbytes in found.items() if name not in ("swap", "grammars")}
    sizes = {
        name: found[name]
        for name in GLYPHS
        if name in found and (found[name] or name not in ("graphs", "states", "swap", "grammars"))
    }
    if not {"weights", "KV", "workspace", "runtime", "budget"} <= found.keys():
        return None
    return Parts(sizes, max(found["budget"], sum(sizes.values())))


def used_bytes(view: View) -> tuple[int, str]:
    """What the engine really takes of the memory that the plan is for, and whose word that is."""
    device = str((view.info.plan.get("device") or {}).get("kind", "cpu")) if view.info else "cpu"  # type: ignore[attr-defined]
    cards = view.hardware.get("gpus") or []
    if device != "cpu" and cards:
        ours = cards[0].get("process_bytes")
        return (ours, "on the card") if ours else (cards[0].get("memory_used_bytes") or 0, "on the card, all in all")
    return view.stats.rss_bytes, "resident"


def totals(view: View | None) -> str:
    """What is planned and what is taken, in words."""
    parts, words = _parts(view), ["Memory"]
    if parts:
        words.append(f"planned {size(sum(parts.sizes.values()))} of {size(parts.budget)}")
    if view and (used := used_bytes(view))[0]:
        words.append(f"used {size(used[0])} {used[1]}")
    return " · ".join(words)


def _parts(view: View | None) -> Parts | None:
    return plan_parts(view.info.plan) if view and view.info else None


def memory(view: View | None, width: int) -> Content:
    """The plan as a bar, what is used of it as another to the same scale, and the legend."""
    parts = _parts(view)
    if view is None or parts is None:
        return Content("no plan yet" if view is None or view.kind == "appliance" else "this server tells no plan")
    room = max(width - 8, 0)
    widths = segments(list(parts.sizes.values()), room, parts.budget)
    plan = [(GLYPHS[name][0] * n, GLYPHS[name][1]) for name, n in zip(parts.sizes, widths, strict=True)]
    used, _ = used_bytes(view)
    full = segments([min(used, parts.budget)], room, parts.budget)[0]
    taken = "$text-error" if used > parts.budget else "$text-success"
    lines = [
        Content.assemble("planned ", *plan, ("·" * (room - sum(widths)), MUTED)),
        Content.assemble("used    ", ("■" * full, taken), ("·" * (room - full), MUTED)),
        _legend(parts, view.stats, width),
    ]
    return Content("\n").join(lines)


def _legend(parts: Parts, stats: Stats, width: int) -> Content:
    """As wordy as there is room for."""
    used = f" ({percent(stats.blocks_used, stats.blocks_total)} used)"
    ways = ((size, used, "   ", " "), (size, "", "   ", " "), (size, "", "  ", " "), (short_size, "", "  ", " "))
    for amount_of, more, gap, space in (*ways, (short_size, "", " ", "")):
        items = [
            Content.assemble(GLYPHS[name], f"{space}{name} {amount_of(amount)}{more if name == 'KV' else ''}")
            for name, amount in parts.sizes.items()
        ]
        line = Content(gap).join(items)
        if line.cell_length <= width:
            break
    return line


class Memory(Widget):
    view: View | None = None

    def show(self, view: View | None, *, machine: bool) -> None:
        """``machine``: whether the bottom line also says what the machine does."""
        self.view = view
        self.border_title = totals(view)
        self.border_subtitle = summary(view) if machine else ""
        self.refresh()

    def render(self) -> Content:
        return memory(self.view, self.content_size.width)
