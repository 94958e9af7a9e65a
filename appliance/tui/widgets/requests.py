"""Every request of the moment: whose it is, how far, what it holds, how fast it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.coordinate import Coordinate
from textual.markup import escape
from textual.widgets import DataTable, Static

from appliance.core.messages import Stats
from appliance.tui.colours import colour
from appliance.tui.feed import View
from appliance.tui.text import duration, rate, seconds, size
from appliance.tui.view import Row

ID_WIDTHS, KEY_WIDTHS = (12, 44), (6, 18)  # least, most


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    width: int  # 0: what is left
    text: Callable[[Row], str]
    order: Callable[[Row], Any]
    words: bool = False  # to the left, and A to Z first; numbers to the right, and the largest first


def _or_less(value: float | None) -> float:
    return -1.0 if value is None else value


COLUMNS = (
    Column("request", 0, lambda r: r.name, lambda r: r.name, words=True),
    Column("key", 10, lambda r: r.key or "-", lambda r: r.key or "", words=True),
    Column("adapter", 10, lambda r: r.stat.adapter or "-", lambda r: r.stat.adapter, words=True),
    Column("state", 13, lambda r: r.state, lambda r: r.state, words=True),
    Column("prompt", 8, lambda r: f"{r.stat.prompt_tokens:,}", lambda r: r.stat.prompt_tokens),
    Column("output", 8, lambda r: f"{r.stat.output_tokens:,}", lambda r: r.stat.output_tokens),
    Column("blocks", 8, lambda r: f"{r.stat.blocks:,}", lambda r: r.stat.blocks),
    Column("tok/s", 7, lambda r: "-" if r.speed is None else rate(r.speed), lambda r: _or_less(r.speed)),
    Column("age", 8, lambda r: duration(r.stat.age_s), lambda r: r.stat.age_s),
    Column("first", 9, lambda r: seconds(r.ttft_s), lambda r: _or_less(r.ttft_s)),
    Column("cached", 8, lambda r: f"{r.stat.cached_tokens:,}", lambda r: r.stat.cached_tokens),
    Column("preempted", 11, lambda r: f"{r.stat.preemptions or '-'}", lambda r: r.stat.preemptions),
)
BY_NAME = {column.name: column for column in COLUMNS}


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


def columns(rows: Sequence[Row], width: int) -> list[tuple[Column, int]]:
    """The columns that fit, with their widths; the id is as wide as it needs and may. Keys and adapters where there are some."""
    found = {
        "key": max((len(row.key or "") for row in rows), default=0),
        "adapter": max((len(row.stat.adapter) for row in rows), default=0),
    }
    most = KEY_WIDTHS[1] if width >= 100 else 10
    wide = {name: min(max(longest + 2, KEY_WIDTHS[0]), most) for name, longest in found.items()}
    sized = [replace(one, width=wide.get(one.name, one.width)) for one in COLUMNS]
    first, *others = [column for column in sized if found.get(column.name, 1)]
    while others and width - sum(column.width for column in others) < ID_WIDTHS[0]:
        others.pop()
    longest = max((len(row.name) for row in rows), default=0) + 2
    room = min(width - sum(column.width for column in others), ID_WIDTHS[1])
    return [(first, max(min(room, max(longest, ID_WIDTHS[0])), 1)), *((column, column.width) for column in others)]


def cell(column: Column, text: str, width: int) -> str:
    """Words to the left, cut where they are too long; numbers to the right."""
    if not column.words:
        return text.rjust(width)
    return (text if len(text) < width else text[: max(width - 2, 0)] + "…").ljust(width)[:width]


def chosen_rows(rows: Sequence[Row], order: str = "age", *, backward: bool = False, words: str = "") -> list[Row]:
    """Those with all the ``words`` in id, key, state or model; by the column ``order``, in its own direction or against it."""
    wanted = words.lower().split()
    found = [row for row in rows if all(word in _haystack(row) for word in wanted)]
    column = BY_NAME[order]
    return sorted(found, key=column.order, reverse=column.words == backward)


def _haystack(row: Row) -> str:
    return " ".join([row.name, row.stat.request_id, row.key or "", row.state, str(row.facts.get("model") or "")]).lower()


def style_of(state: str) -> str:
    """A variable of the theme; "" for what goes as it should."""
    return "text-warning" if state in ("waiting", "swapped") else "text-primary" if state != "decode" else ""


def table_lines(view: View, width: int) -> list[str]:
    """The table as plain text, oldest first."""
    rows = chosen_rows(view.rows)
    chosen = columns(rows, width)
    lines = ["".join(cell(column, column.name, w) for column, w in chosen)]
    lines += ["".join(cell(column, column.text(row), w) for column, w in chosen) for row in rows]
    hidden = view.stats.running + view.stats.waiting - len(rows)
    return [*lines, f"and {hidden:,} more"] if hidden > 0 else lines


def without_list(view: View) -> Content:
    """For servers that only count."""
    stats, lines = view.stats, ["This server counts its requests, and does not list them."]
    lines.append("")
    lines += [f"{count:>12,}  ended with {reason}" for reason, count in sorted(stats.finished.items(), key=lambda i: -i[1])]
    lines.append(f"{stats.prompt_tokens:>12,}  prompt tokens")
    lines.append(f"{stats.generation_tokens:>12,}  generated tokens")
    if view.e2e and view.e2e.p50_s is not None:
        lines.append(f"{seconds(view.e2e.p50_s):>12}  for a whole answer, p95 {seconds(view.e2e.p95_s)} (last minute)")
    if stats.rss_bytes:
        lines.append(f"{size(stats.rss_bytes):>12}  resident memory of its front end")
    return Content("\n".join(lines))


class Table(DataTable[Text]):
    """Its rows keep their places while their values change; the cursor stays with its request."""

    def __init__(self) -> None:
        super().__init__(cursor_type="row", cell_padding=0, zebra_stripes=False)
        self.shown: list[Row] = []
        self._layout: list[tuple[str, int]] = []
        self._texts: list[list[tuple[str, str]]] = []

    @property
    def selected(self) -> Row | None:
        return self.shown[self.cursor_row] if 0 <= self.cursor_row < len(self.shown) else None

    def show(self, rows: list[Row], chosen: list[tuple[Column, int]], labels: list[str]) -> None:
        selected = self.selected
        layout = [(label, width) for label, (_, width) in zip(labels, chosen, strict=True)]
        if layout != self._layout:
            self.clear(columns=True)
            self._layout, self._texts = layout, []
            for label, width in layout:
                self.add_column(Text(label), width=width)
        texts = [[(cell(column, column.text(row), width), _style(column, row)) for column, width in chosen] for row in rows]
        for at, (new, old) in enumerate(zip(texts, self._texts, strict=False)):
            for x, value in enumerate(new):
                if value != old[x]:
                    self.update_cell_at(Coordinate(at, x), self._text(value))
        for new in texts[len(self._texts) :]:
            self.add_row(*map(self._text, new))
        while len(self.rows) > len(texts):
            self.remove_row(self.coordinate_to_cell_key(Coordinate(len(self.rows) - 1, 0)).row_key)
        self._texts, self.shown = texts, rows
        places = [row.place for row in rows]
        if selected and selected.place in places and (at := places.index(selected.place)) != self.cursor_row:
            self.move_cursor(row=at, animate=False)

    def _text(self, value: tuple[str, str]) -> Text:
        return Text(value[0], style=colour(self.app, value[1]), no_wrap=True, end="")


def _style(column: Column, row: Row) -> str:
    return style_of(row.state) if column.name == "state" else ""


class Requests(Vertical):
    """Counters in the title, the table, and what is sorted and filtered in the bottom line."""

    BORDER_TITLE = "Requests"

    def __init__(self) -> None:
        super().__init__()
        self.order, self.backward, self.words = "age", False, ""
        self.view: View | None = None

    def compose(self) -> ComposeResult:
        yield Table()
        yield Static(id="counted")

    @property
    def table(self) -> Table:
        return self.query_one(Table)

    def show(self, view: View | None) -> None:
        self.view, width = view, self.content_size.width
        listed = view is None or view.listed
        self.set_class(not listed, "counted")
        if view is None:
            self.border_title, self.border_subtitle = "Requests", ""
            return
        self.border_title = Content.assemble("Requests · ", counters(view.stats, width - 14))
        if not listed:
            self.query_one("#counted", Static).update(without_list(view))
            self.border_subtitle = ""
            return
        rows = chosen_rows(view.rows, self.order, backward=self.backward, words=self.words)
        chosen = columns(view.rows, width - 2)  # beside the scroll bar
        self.table.show(rows, chosen, [self._label(column, w) for column, w in chosen])
        self.border_subtitle = self._below(view, len(rows))

    def _label(self, column: Column, width: int) -> str:
        sign = ("▼" if column.words == self.backward else "▲") if column.name == self.order else ""
        return cell(column, f"{column.name}{sign}" if column.words else f"{sign}{column.name}", width)

    def _below(self, view: View, shown: int) -> str:
        words = [f"by {self.order}{', reversed' if self.backward else ''}"]
        if self.words:
            words.append(f"filter: {escape(self.words)}")
        total = view.stats.running + view.stats.waiting
        if shown < total:
            words.append(f"{shown:,} of {total:,} shown")
        return " · ".join(words)

    def sort(self, steps: int) -> None:
        """By the next column, or the one before; of those that are on the screen."""
        names = [column.name for column, _ in columns(self.view.rows if self.view else (), self.content_size.width - 2)]
        at = names.index(self.order) if self.order in names else -steps
        self.order, self.backward = names[(at + steps) % len(names)], False
        self.show(self.view)

    def sort_by(self, name: str) -> None:
        """As a click on a column's head: again turns the order round."""
        self.backward = not self.backward if name == self.order else False
        self.order = name
        self.show(self.view)

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        names = [column.name for column, _ in columns(self.view.rows if self.view else (), self.content_size.width - 2)]
        if event.column_index < len(names):
            self.sort_by(names[event.column_index])
