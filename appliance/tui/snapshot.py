"""The dashboard once, as plain text: for pipes, logs and terminals that cannot do more."""

from __future__ import annotations

from textual.content import Content

from appliance.tui.feed import Feed
from appliance.tui.widgets.blocks import block_map, cached
from appliance.tui.widgets.header import header
from appliance.tui.widgets.memory import memory, totals
from appliance.tui.widgets.requests import counters, table_head, table_rows

MAP_LINES = 6


def snapshot(feed: Feed, width: int) -> str:
    """Lines of at most ``width`` columns (the header's may be longer). The feed must have a view."""
    if feed.view is None:
        raise ValueError("nothing was polled yet")
    stats = feed.view.stats
    tokens = f"{stats.prompt_tokens:,} prompt and {stats.generation_tokens:,} generated tokens in {stats.steps:,} steps"
    parts = [
        header(feed),
        Content(totals(feed.view)),
        memory(feed.view, width),
        block_map(stats, width, MAP_LINES),
        Content(tokens),
        *[Content(words) for words in cached(stats)[:1]],
        counters(stats, width),
    ]
    if stats.requests_now:
        parts += [table_head(stats, width), table_rows(stats, width)]
    return "\n".join(line.rstrip() for part in parts for line in part.plain.split("\n"))
