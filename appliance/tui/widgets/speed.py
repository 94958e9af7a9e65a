"""Over time: tokens generated, tokens of prompts read, and how long first tokens took."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget

from appliance.tui.feed import Feed
from appliance.tui.text import MUTED, chart, fit, rate, seconds

Values = list[float | None]


def speed(feed: Feed, width: int, height: int) -> Content:
    """Three charts, each under a line with its numbers, each to its own scale."""
    history = list(feed.history)
    now = history[-1] if history else None
    rows = max(height - 3, 0)
    charts: list[tuple[Content, Values, str, int]] = [
        (_tokens("generation", now.generation if now else 0.0, feed.peak.generation, width),
         [one.generation for one in history], "$text-success", rows - 2 * (rows // 3)),
        (_tokens("prompts", now.prompt if now else 0.0, feed.peak.prompt, width),
         [one.prompt for one in history], "$text-primary", rows // 3),
        (_latency(feed, width), [one.ttft for one in history], "$text-warning", rows // 3),
    ]  # fmt: skip
    lines: list[Content] = []
    for numbers, values, style, of in charts:
        lines += [numbers, *_bars(values, width, of, style)]
    return Content("\n").join(lines[:height])


def _tokens(name: str, now: float, peak: float, width: int) -> Content:
    more = fit([f"  peak {rate(peak)}", ""], width - 24)
    return Content.assemble(f"{name:10} ", (f"{rate(now):>7} tok/s", "bold"), (more, MUTED))


def _latency(feed: Feed, width: int) -> Content:
    """The median of the last minute; beside it the slow ones, and the time between two tokens."""
    if feed.view is None:
        return Content("1st token")
    ttft, itl = feed.view.ttft, feed.view.itl
    slow = f"  p95 {seconds(ttft.p95_s)}" if ttft.p95_s is not None else ""
    between = f"  between tokens {seconds(itl.p50_s)}" if itl.p50_s is not None else ""
    slower = f"{slow}  p99 {seconds(ttft.p99_s)}" if slow else ""
    more = fit([slower + between, slow + between, slow, ""], width - 24)
    return Content.assemble(f"{'1st token':10} ", (f"{seconds(ttft.p50_s):>13}", "bold"), (more, MUTED))


def _bars(values: Values, width: int, rows: int, style: str) -> list[Content]:
    top = max((value for value in values[-width:] if value), default=0.0) if width > 0 else 0.0
    return [Content.assemble((line, style)) for line in chart(values, width, rows, top)]


class Speed(Widget):
    BORDER_TITLE = "Tokens a second, time to the first"
    feed: Feed | None = None

    def show(self, feed: Feed) -> None:
        self.feed = feed
        self.refresh()

    def render(self) -> Content:
        return speed(self.feed, *self.content_size) if self.feed else Content("")
