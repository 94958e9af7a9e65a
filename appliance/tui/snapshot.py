"""The dashboard once, as plain text: for pipes, logs and terminals that cannot do more."""

from __future__ import annotations

from textual.content import Content

from appliance.tui.feed import Feed
from appliance.tui.text import seconds
from appliance.tui.view import View
from appliance.tui.widgets.blocks import block_map, hits
from appliance.tui.widgets.hardware import memory_line, summary
from appliance.tui.widgets.header import header
from appliance.tui.widgets.memory import memory, totals
from appliance.tui.widgets.requests import counters, table_lines, without_list

MAP_LINES = 7


def snapshot(feed: Feed, width: int) -> str:
    """Lines of at most ``width`` columns (the header's may be longer). The feed must have a view."""
    if feed.view is None:
        raise ValueError("nothing was polled yet")
    view = feed.view
    parts = [header(feed), Content(totals(view)), memory(view, width)]
    if machine := " · ".join(words for words in (summary(view), memory_line(view.hardware)) if words):
        parts.append(Content(machine))
    parts += [block_map(view, width, MAP_LINES), *(Content(words) for words in hits(view.stats)[:1] if words)]
    parts += [*map(Content, _numbers(view)), counters(view.stats, width)]
    if not view.listed:
        parts.append(without_list(view))
    elif view.rows:
        parts += map(Content, table_lines(view, width))
    return "\n".join(line.rstrip() for part in parts for line in part.plain.split("\n"))


def _numbers(view: View) -> list[str]:
    stats, ttft, itl = view.stats, view.ttft, view.itl
    steps = f" in {stats.steps:,} steps" if stats.steps else ""
    lines = [f"{stats.prompt_tokens:,} prompt and {stats.generation_tokens:,} generated tokens{steps}"]
    if ttft.p50_s is not None:
        slow = f"p95 {seconds(ttft.p95_s)}, p99 {seconds(ttft.p99_s)}"
        lines.append(f"first token after {seconds(ttft.p50_s)} in the last minute ({slow})")
    if itl.p50_s is not None:
        lines.append(f"{seconds(itl.p50_s)} between tokens (p95 {seconds(itl.p95_s)})")
    return lines
