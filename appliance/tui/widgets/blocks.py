"""The pool of KV blocks as a map: what is used, what is free, and where."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget

from appliance.core.messages import Stats
from appliance.tui.text import fill_map, percent

STYLES = {"·": "$text-muted", "□": "$text-primary"}


def cached(stats: Stats) -> list[str]:
    """What is kept of earlier prompts, and how much of later ones was found: all of it in words, then less."""
    kept = f"{stats.blocks_kept:,} kept"
    if not stats.prefix_queries:
        return [kept] if stats.blocks_kept else []
    hits = f"prefix hits {percent(stats.prefix_hits, stats.prefix_queries)}"
    host = f"{hits} ({percent(stats.prefix_host_hits, stats.prefix_queries)} in host memory)"
    return [f"{kept} · {host}", f"{kept} · {hits}", hits] if stats.prefix_host_hits else [f"{kept} · {hits}", hits]


def title(stats: Stats, width: int) -> str:
    titles = [f"KV blocks · {words}" for words in cached(stats)]
    return next((one for one in titles if len(one) <= width), "KV blocks")


def block_map(stats: Stats, width: int, height: int) -> Content:
    """A line of numbers, then the map in the remaining ``height - 1`` lines."""
    if not stats.blocks_total:
        return Content("no pool yet")
    total = stats.blocks_total
    numbers = [f"{stats.blocks_used:,} of {total:,} used, {percent(stats.blocks_used, total)}"]
    cells = max(width * (height - 1), 0)
    text = fill_map(stats.block_map, cells)
    spread = " " if 2 * len(text) <= cells and len(stats.block_map) == total else ""
    per_line = width // 2 if spread else width
    per_cell = total / len(text) if text else 1
    numbers.append(f"room for {total * stats.block_size:,} tokens")
    numbers.append(f"a cell is {per_cell:.3g} blocks" if per_cell > 1 else "a cell is a block")
    while len(numbers) > 1 and len(" · ".join(numbers)) > width:
        numbers.pop()
    lines = [Content(" · ".join(numbers))]
    lines += [_coloured(spread.join(text[i : i + per_line])) for i in range(0, len(text), per_line)]
    return Content("\n").join(lines[:height])


def _coloured(line: str) -> Content:
    """Blank cells dim, used and kept ones in a colour each; the glyphs differ too, for screens without colour."""
    parts: list[tuple[str, str]] = []
    for cell in line:
        style = STYLES.get(cell, "$text-success")
        if cell == " " and parts:
            style = parts[-1][1]
        if parts and parts[-1][1] == style:
            parts[-1] = (parts[-1][0] + cell, style)
        else:
            parts.append((cell, style))
    return Content.assemble(*parts)


class BlockMap(Widget):
    BORDER_TITLE = "KV blocks"
    stats = Stats()

    def show(self, stats: Stats) -> None:
        self.stats = stats
        self.border_title = title(stats, self.content_size.width)
        self.refresh()

    def render(self) -> Content:
        return block_map(self.stats, *self.content_size)
