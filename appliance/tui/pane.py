"""One server on the screen."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widget import Widget

from appliance.tui.child import Child
from appliance.tui.feed import Feed
from appliance.tui.widgets.blocks import BlockMap
from appliance.tui.widgets.hardware import HardwarePanel
from appliance.tui.widgets.header import Header, Note
from appliance.tui.widgets.logview import LogView
from appliance.tui.widgets.memory import Memory
from appliance.tui.widgets.requests import Requests, Table
from appliance.tui.widgets.speed import Speed

WIDE, TALL = 110, 34  # columns, lines from which on there is room for more


class ServerPane(Vertical):
    """Shows a feed. ``child``: the server that was started here, whose output is its log."""

    def __init__(self, feed: Feed, *, id: str, child: Child | None = None) -> None:
        super().__init__(id=id)
        self.feed, self.child = feed, child

    def compose(self) -> ComposeResult:
        yield Header()
        with Horizontal(id="top"):
            yield BlockMap()
            yield Speed()
        with Horizontal(id="middle"):
            yield Memory()
            yield HardwarePanel()
        yield Requests()
        yield LogView()

    @property
    def requests(self) -> Requests:
        return self.query_one(Requests)

    @property
    def log_view(self) -> LogView:
        return self.query_one(LogView)

    @property
    def log_shown(self) -> bool:
        return self.has_class("log")

    def toggle_log(self) -> None:
        """Show the log and go there, or hide it."""
        self.toggle_class("log")
        target: Widget = self.log_view if self.log_shown else self.requests.table
        self.screen.set_focus(target)

    def show(self, notes: Sequence[Note]) -> None:
        if not all(self.query(part) for part in (Header, BlockMap, Speed, Memory, HardwarePanel, Requests, Table, LogView)):
            return  # the application begins, or ends
        feed, view = self.feed, self.feed.view
        wide = self.size.width >= WIDE
        self.set_class(not wide, "narrow")
        self.set_class(self.size.height < TALL, "short")
        self.set_class(view is not None and not view.hardware and view.info is None and view.kind != "appliance", "unplanned")
        self.set_class(feed.error is not None or feed.child is not None, "stale")
        self.query_one(Header).show(feed, notes)
        self.query_one(BlockMap).show(view)
        self.query_one(Speed).show(feed)
        self.query_one(Memory).show(view, machine=not wide)
        self.query_one(HardwarePanel).show(feed)
        self.requests.show(view)
        if self.log_shown:
            self.show_log()

    def show_log(self) -> None:
        if self.child:
            self.log_view.show(self.child.lines, self.child.total, None)
        else:
            self.log_view.show(self.feed.log, self.feed.log_total, self.feed.log_error)
