"""Tokens a second over time: what is generated, and what is read of prompts."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget

from appliance.tui.feed import Feed
from appliance.tui.text import chart, rate


def throughput(feed: Feed, width: int, height: int) -> Content:
    """Two charts, each under a line with its numbers."""
    rates = list(feed.history)
    now = rates[-1] if rates else None
    generation = [r.generation for r in rates]
    prompt = [r.prompt for r in rates]
    rows = max(height // 2 - 1, 1)
    lines = [_numbers("generation", now.generation if now else 0.0, feed.peak.generation)]
    lines += _bars(generation, width, rows + height % 2, "$text-success")
    lines += [_numbers("prompt", now.prompt if now else 0.0, feed.peak.prompt)]
    lines += _bars(prompt, width, rows, "$text-primary")
    return Content("\n").join(lines[:height])


def _numbers(name: str, now: float, peak: float) -> Content:
    return Content.assemble(f"{name:10} ", (f"{rate(now):>7} tok/s", "bold"), (f"  peak {rate(peak)}", "$text-muted"))


def _bars(values: list[float], width: int, rows: int, style: str) -> list[Content]:
    top = max(values[-width:], default=0.0) if width > 0 else 0.0
    return [Content.assemble((line, style)) for line in chart(values, width, rows, top)]


class Throughput(Widget):
    BORDER_TITLE = "Throughput"
    feed: Feed | None = None

    def show(self, feed: Feed) -> None:
        self.feed = feed
        self.refresh()

    def render(self) -> Content:
        return throughput(self.feed, *self.content_size) if self.feed else Content("")
