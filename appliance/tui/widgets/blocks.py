"""The pool of KV blocks as a map: what is used, shared, kept and free, and where; below it the swap space."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget

from appliance.core.messages import Stats, plan_bytes
from appliance.tui.feed import View
from appliance.tui.text import MUTED, fill_map, fit, percent, segments, size

USED, SHARED, KEPT, SWAPPED, FREE = "$text-success", "#c792ea", "$text-secondary", "$text-warning", MUTED
STYLES = {"·": FREE, "□": KEPT, "◆": SHARED}
LEGENDS = (
    f"[{USED}]■[/] used [{SHARED}]◆[/] shared [{KEPT}]□[/] kept [{FREE}]·[/] free",
    f"[{USED}]■[/]used [{SHARED}]◆[/]shared [{KEPT}]□[/]kept [{FREE}]·[/]free",
    "",
)


def hits(stats: Stats) -> list[str]:
    """Which share of the prompts' tokens was found in the cache: all of it in words, then less."""
    if not stats.prefix_queries:
        return [""]
    found = f"prefix hits {percent(stats.prefix_hits, stats.prefix_queries)}"
    host = f"{found} ({percent(stats.prefix_host_hits, stats.prefix_queries)} in host memory)"
    return [host, found, ""] if stats.prefix_host_hits else [found, ""]


def title(stats: Stats, width: int) -> str:
    return fit([f"KV blocks · {words}" if words else "KV blocks" for words in hits(stats)], width)


def numbers(view: View, width: int, cells: int = 0) -> str:
    """How many blocks are what, as far as there is room; ``cells``: of the map."""
    stats, total = view.stats, view.stats.blocks_total
    if not total:
        return fit([f"{percent(view.usage, 1)} of the KV cache used", f"{percent(view.usage, 1)} used"], width)
    parts = [f"{stats.blocks_used:,} of {total:,} used, {percent(stats.blocks_used, total)}"]
    if stats.blocks_shared:
        parts.append(f"{stats.blocks_shared:,} shared")
    if stats.blocks_kept:
        parts.append(f"{stats.blocks_kept:,} kept")
    parts.append(f"room for {total * stats.block_size:,} tokens")
    if cells and stats.block_map:
        per_cell = total / cells
        parts.append(f"a cell is {per_cell:.3g} blocks" if per_cell > 1 else "a cell is a block")
    return fit([" · ".join(parts[:n]) for n in range(len(parts), 0, -1)], width)


def block_map(view: View, width: int, height: int) -> Content:
    """A line of numbers, the map, and a line for the swap space where there is one."""
    stats = view.stats
    if view.listed and not stats.blocks_total:
        return Content("no pool yet")
    swapping = [swap(view, width)] if stats.swap_total else []
    rows = max(height - 1 - len(swapping), 0)
    cells = width * rows
    text = fill_map(stats.block_map, cells)
    if not stats.block_map:  # a server that only tells the share
        filled = segments([view.usage], cells, 1.0)[0]
        text = "█" * filled + "·" * (cells - filled)
    spread = " " if 2 * len(text) <= cells and len(stats.block_map) == stats.blocks_total else ""
    per_line = max(width // 2 if spread else width, 1)
    lines = [Content(numbers(view, width, len(text)))]
    lines += [_coloured(spread.join(text[i : i + per_line])) for i in range(0, len(text), per_line)]
    return Content("\n").join([*lines[: rows + 1], *swapping])


def _coloured(line: str) -> Content:
    """A colour for each kind of cell; the signs differ too, for screens without colour."""
    parts: list[tuple[str, str]] = []
    for cell in line:
        style = STYLES.get(cell, USED)
        if cell == " " and parts:
            style = parts[-1][1]
        if parts and parts[-1][1] == style:
            parts[-1] = (parts[-1][0] + cell, style)
        else:
            parts.append((cell, style))
    return Content.assemble(*parts)


def swap(view: View, width: int) -> Content:
    """Host memory: a bar of what swapped requests and cached prefixes have there, and the numbers."""
    stats = view.stats
    total, used, kept = stats.swap_total, stats.swap_used, stats.swap_kept
    nbytes = plan_bytes(view.info.plan).get("swap", 0) if view.info else 0
    long = f" {used:,} swapped, {kept:,} kept of {total:,}"
    choices = [*([f"{long} blocks, {size(nbytes)}"] if nbytes else []), long, f" {used:,}+{kept:,} of {total:,}", ""]
    words = next((one for one in choices if len(one) <= 3 * width // 5), "")
    room = max(width - len(words) - 5, 0)
    widths = segments([used, kept], room, total)
    return Content.assemble(
        "swap ", ("▓" * widths[0], SWAPPED), ("□" * widths[1], KEPT), ("·" * (room - sum(widths)), FREE), words
    )  # fmt: skip


class BlockMap(Widget):
    BORDER_TITLE = "KV blocks"
    view: View | None = None

    def show(self, view: View | None) -> None:
        self.view, width = view, self.content_size.width
        self.border_title = title(view.stats, width) if view else "KV blocks"
        known = view is not None and bool(view.stats.block_map)
        self.border_subtitle = LEGENDS[0 if width >= 34 else 1 if width >= 29 else 2] if known else ""
        self.refresh()

    def render(self) -> Content:
        return block_map(self.view, *self.content_size) if self.view else Content("no pool yet")
