"""Every request of the moment: how far it is, what it holds."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Static

from appliance.core.messages import RequestStat, Stats
from appliance.tui.text import duration

COLUMNS = (("state", 14), ("prompt", 8), ("output", 8), ("blocks", 7), ("age", 8), ("preempted", 11))
ID_WIDTHS = (12, 44)  # least, most


def state(request: RequestStat) -> str:
    """waiting, swapped, prefill 45 %, or decode. A preempted request that is read again also shows how far it is."""
    if request.state != "running":
        return request.state
    tokens = request.prompt_tokens + request.output_tokens
    if request.computed_tokens < tokens - 1:  # the newest token is always still to be computed
        return f"prefill {100 * request.computed_tokens // tokens} %"
    return "decode"


def counters(stats: Stats, width: int) -> Content:
    """One line: the queue now, then what was counted since the start, as far as there is room."""
    waiting = stats.waiting - stats.swapped
    parts = [
        Content.assemble((f"{stats.running:,} running", "bold $text-success")),
        Content.assemble((f"{waiting:,} waiting", "bold $text-warning" if waiting else "")),
        *([Content.assemble((f"{stats.swapped:,} swapped", "bold $text-warning"))] if stats.swapped else []),
        Content.assemble((f"{stats.preemptions:,} preempted", "$text-warning" if stats.preemptions else "")),
        Content(f"{stats.requests:,} arrived"),
    ]
    most_first = sorted(stats.finished.items(), key=lambda item: -item[1])
    parts += [Content(f"{count:,} {reason}") for reason, count in most_first if count]
    if stats.last_step_tokens:
        parts.append(Content(f"last step {stats.last_step_tokens:,} tokens in {1000 * stats.last_step_s:,.0f} ms"))
    while sum(part.cell_length + 3 for part in parts) - 3 > width and len(parts) > 2:
        parts.pop()
    return Content(" · ").join(parts)


def columns(stats: Stats, width: int) -> list[tuple[str, int]]:
    """The columns that fit, with their widths; the id is as wide as it needs and may."""
    least, most = ID_WIDTHS
    chosen = list(COLUMNS)
    while chosen and width - sum(w for _, w in chosen) < least:
        chosen.pop()
    longest = max((len(_name(request)) for request in stats.requests_now), default=0) + 2
    room = min(width - sum(w for _, w in chosen), most)
    return [("request", max(min(room, max(longest, least)), 1)), *chosen]


def table_head(stats: Stats, width: int) -> Content:
    chosen = columns(stats, width)
    return Content.assemble(("".join(_cell(name, name, w) for name, w in chosen), "$text-muted"))


def table_rows(stats: Stats, width: int, *, newest_first: bool = False) -> Content:
    """A line a request. ``stats`` has them oldest first, and not more than it can show."""
    requests = list(reversed(stats.requests_now)) if newest_first else list(stats.requests_now)
    chosen = columns(stats, width)
    lines = [_row(request, chosen) for request in requests]
    hidden = stats.running + stats.waiting - len(requests)
    if hidden > 0:
        lines.append(Content.assemble((f"and {hidden:,} more", "$text-muted")))
    return Content("\n").join(lines) if lines else Content.assemble(("no requests", "$text-muted"))


def _name(request: RequestStat) -> str:
    return request.request_id + (f"/{request.index}" if request.index else "")


def _cell(column: str, value: str, width: int) -> str:
    """Words to the left, cut where they are too long; numbers to the right."""
    if column not in ("request", "state"):
        return value.rjust(width)
    return (value if len(value) < width else value[: width - 2] + "…").ljust(width)


def _row(request: RequestStat, chosen: list[tuple[str, int]]) -> Content:
    values = {
        "request": _name(request),
        "state": state(request),
        "prompt": f"{request.prompt_tokens:,}",
        "output": f"{request.output_tokens:,}",
        "blocks": f"{request.blocks:,}",
        "age": duration(request.age_s),
        "preempted": f"{request.preemptions}" if request.preemptions else "-",
    }
    style = (
        "$text-warning" if values["state"] in ("waiting", "swapped") else "$text-primary" if values["state"] != "decode" else ""
    )
    styles = {"state": style}
    return Content.assemble(*((_cell(column, values[column], w), styles.get(column, "")) for column, w in chosen))


class Requests(Vertical):
    BORDER_TITLE = "Requests"

    def compose(self) -> ComposeResult:
        yield Static(id="counters")
        yield Static(id="head")
        with VerticalScroll(can_focus=True):
            yield Static(id="rows")

    def show(self, stats: Stats, *, newest_first: bool) -> None:
        width = self.content_size.width
        self.border_title = f"Requests, {'newest' if newest_first else 'oldest'} first"
        self.query_one("#counters", Static).update(counters(stats, width))
        self.query_one("#head", Static).update(table_head(stats, width - 1))
        self.query_one("#rows", Static).update(table_rows(stats, width - 1, newest_first=newest_first))
