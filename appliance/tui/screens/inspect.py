"""All that is known of one request, while it runs and when it has ended."""

from __future__ import annotations

from collections.abc import Callable

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from appliance.tui.feed import Feed
from appliance.tui.text import MUTED, chart, duration, percent, rate, seconds, segments
from appliance.tui.view import Row

TOLD = {  # of what the server says, what the lines above have already
    "request_id", "index", "state", "prompt_tokens", "output_tokens", "computed_tokens", "blocks", "age_s", "preemptions",
    "cached_tokens", "host_blocks", "adapter", "id", "key", "model", "prompt", "ttft_s", "n", "max_tokens", "priority",
}  # fmt: skip
Line = tuple[str, str]


def lines_of(row: Row, block_size: int) -> list[Line]:
    """What is known, as (name, value)."""
    one, facts = row.stat, row.facts
    lines = [("request", row.name), ("in the engine", f"{one.request_id} / {one.index}"), ("key", row.key or "none")]
    if facts.get("model"):
        lines.append(("model", str(facts["model"])))
    lines += [("state", row.state), ("age", duration(one.age_s)), ("first token after", seconds(row.ttft_s))]
    cached = f", {one.cached_tokens:,} of them found in the cache" if one.cached_tokens else ""
    lines.append(("prompt", f"{one.prompt_tokens:,} tokens{cached}"))
    limit = facts.get("max_tokens")
    lines.append(("answer", f"{one.output_tokens:,} tokens" + (f" of at most {limit:,}" if limit else "")))
    lines.append(("computed", f"{one.computed_tokens:,} of {one.prompt_tokens + one.output_tokens:,} tokens"))
    held = f"{one.blocks:,} of {block_size} tokens each"
    lines.append(("blocks", f"{held}, {one.host_blocks:,} in host memory" if one.host_blocks else held))
    lines.append(("given way", f"{one.preemptions} times" if one.preemptions else "never"))
    if facts.get("n", 1) and (facts.get("n") or 1) > 1:
        lines.append(("completions", f"{facts['n']} of this prompt"))
    if facts.get("priority"):
        lines.append(("priority", str(facts["priority"])))
    lines += [(name.replace("_", " "), _plain(value)) for name, value in facts.items() if name not in TOLD and value is not None]
    return lines


def _plain(value: object) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


class Inspect(ModalScreen[None]):
    BINDINGS = [  # noqa: RUF012
        ("escape", "dismiss", "Close"),
        ("enter", "dismiss"),
        ("i", "dismiss"),
        ("q", "dismiss"),
        ("x", "cancel", "Cancel the request"),
    ]

    def __init__(self, feed: Feed, row: Row, cancel: Callable[[Feed, Row], None]) -> None:
        super().__init__()
        self.feed, self.row, self._cancel = feed, row, cancel
        self.trail: list[float | None] = []

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="box") as box:
            box.border_title = "Request"
            yield Static(id="facts")

    def on_mount(self) -> None:
        self.show()

    def action_cancel(self) -> None:
        self._cancel(self.feed, self.row)

    def show(self) -> None:
        """As it is now; as it was at last, once it has ended."""
        view = self.feed.view
        now = next((row for row in view.rows if row.place == self.row.place), None) if view else None
        self.row = now or self.row
        self.trail = list(self.feed.trails.get(self.row.place, ())) or self.trail
        width = max(self.query_one("#box").content_size.width - 1, 20)
        block_size = view.stats.block_size if view else 16
        parts = [Content.assemble((f"{name:18}", MUTED), value) for name, value in lines_of(self.row, block_size)]
        parts += [Content(""), *self._pictures(width)]
        end = "x cancels it, escape closes this" if now else "it is not among the running ones any more · escape closes this"
        parts += [Content(""), Content.assemble((end, MUTED))]
        self.query_one("#facts", Static).update(Content("\n").join(parts))

    def _pictures(self, width: int) -> list[Content]:
        one, limit = self.row.stat, self.row.facts.get("max_tokens")
        bars = []
        room = max(width - 26, 4)
        for name, done, whole in (
            ("prompt", min(one.computed_tokens, one.prompt_tokens), one.prompt_tokens),
            ("answer", one.output_tokens, limit),
        ):
            if whole:
                filled = segments([min(done, whole)], room, whole)[0]
                bar = (("█" * filled, "$text-success"), ("·" * (room - filled), MUTED))
                bars.append(Content.assemble((f"{name:18}", MUTED), *bar, f" {percent(done, whole):>5}"))
        top = max((value for value in self.trail[-room:] if value), default=0.0)
        speed = "-" if self.row.speed is None else f"{rate(self.row.speed)} tok/s"
        rows = chart(self.trail, room, 3, top)
        labels = ["speed", f"now  {speed}", f"mean {rate(mean)} tok/s" if (mean := self.row.mean_speed) is not None else ""]
        bars += [Content.assemble((f"{a:18}", MUTED), (b, "$text-success")) for a, b in zip(labels, rows, strict=True)]
        return bars
