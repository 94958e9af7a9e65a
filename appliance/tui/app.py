"""The dashboard on the screen: it asks its servers every ``interval`` seconds and shows what they say, or plays a recording."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from textual.app import App, ComposeResult
from textual.binding import BindingType
from textual.widgets import ContentSwitcher, DataTable, Footer, Input, Static

from appliance.tui.bars import replay_bar, tabs
from appliance.tui.child import Child
from appliance.tui.feed import Feed, FeedError
from appliance.tui.keys import BINDINGS, OF_THE_BASE
from appliance.tui.pane import ServerPane
from appliance.tui.recording import Recording, Replay
from appliance.tui.screens.confirm import Confirm
from appliance.tui.screens.help import Help
from appliance.tui.screens.inspect import Inspect
from appliance.tui.threads import in_thread
from appliance.tui.view import Row
from appliance.tui.widgets.header import Note
from appliance.tui.widgets.logview import LogView
from appliance.tui.widgets.requests import Requests

TICK_S = 0.1  # of a replay


class Dashboard(App[None]):
    """``child``: the server of the first feed, where it was started here. ``replay``: whose feeds are shown instead."""

    TITLE = "appliance"
    ENABLE_COMMAND_PALETTE = False
    CSS_PATH = "app.tcss"
    BINDINGS: ClassVar[list[BindingType]] = BINDINGS

    def __init__(
        self,
        feeds: Sequence[Feed] = (),
        *,
        interval: float = 1.0,
        child: Child | None = None,
        recording: Recording | None = None,
        replay: Replay | None = None,
    ) -> None:
        plain = "NO_COLOR" in os.environ  # the base class takes it away
        super().__init__(ansi_color=True if plain else None)
        self.feeds = replay.feeds if replay else list(feeds)
        self.interval, self.child, self.recording, self.replay = interval, child, recording, replay
        self.paused = False
        self.at = 0  # which server is shown

    def compose(self) -> ComposeResult:
        if len(self.feeds) > 1:
            yield Static(id="tabs")
        with ContentSwitcher(initial="server-0"):
            for number, feed in enumerate(self.feeds):
                yield ServerPane(feed, id=f"server-{number}", child=self.child if number == 0 else None)
        yield Input(id="filter", placeholder="words that must be there; enter keeps them, escape shows all again")
        if self.replay:
            yield Static(id="replay")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        if self.child or self.recording:  # what is open here must be closed, whoever ends this
            for signum in (signal.SIGTERM, signal.SIGHUP):
                with contextlib.suppress(ValueError, RuntimeError):  # no main thread
                    asyncio.get_running_loop().add_signal_handler(signum, self.exit)
        self.pane.requests.table.focus()
        if self.replay:
            self.run_worker(self.play())
        for number, feed in enumerate([] if self.replay else self.feeds):
            self.run_worker(self.follow(number, feed))
        if self.child:
            self.pane.toggle_log()
            self.run_worker(self.hide_log_when_ready(self.pane))

    @property
    def panes(self) -> list[ServerPane]:
        return list(self.screen_stack[0].query(ServerPane)) if self.screen_stack else []

    @property
    def pane(self) -> ServerPane:
        return self.panes[self.at]

    # ---------------------------------------------------------------- looking

    async def follow(self, number: int, feed: Feed) -> None:
        """Poll, show, sleep; a poll that waits for its time-out holds nothing up."""
        while True:
            if not self.paused:
                await in_thread(lambda: self.look(number, feed))
                self.show()
            await asyncio.sleep(self.interval)

    def look(self, number: int, feed: Feed) -> None:
        """In a thread."""
        child = self.child if number == 0 else None
        if child is not None:
            feed.starting, feed.child = child.running and feed.view is None, child.ended
        if feed.child is None:
            feed.poll()
        if child is None and ((number == self.at and self.panes and self.pane.log_shown) or self.recording):
            feed.poll_log()

    async def hide_log_when_ready(self, pane: ServerPane) -> None:
        """It is shown while the server is loading, and then makes room for what it does."""
        while pane.log_shown and not (pane.feed.view and pane.feed.view.state == "ok"):
            await asyncio.sleep(TICK_S)
        if pane.log_shown:
            pane.toggle_log()
            self.show()

    async def play(self) -> None:
        assert self.replay is not None
        self.replay.show_until(0.0)
        self.show()
        before = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            fresh = self.replay.advance(now - before)
            before = now
            (self.show if fresh else self.show_bars)()

    def on_resize(self) -> None:
        self.call_after_refresh(self.show)

    def show(self) -> None:
        panes = self.panes
        if len(panes) <= self.at:
            return  # the application is ending, and its screen is being taken down
        panes[self.at].show(self.notes())
        self.show_bars()
        if isinstance(self.screen, Inspect):
            self.screen.show()

    def show_bars(self) -> None:
        base = self.screen_stack[0]
        for strip in base.query("#tabs").results(Static):
            strip.update(tabs(self.feeds, self.at), layout=False)
        for bar in base.query("#replay").results(Static):
            if self.replay:
                bar.update(replay_bar(self.replay, self.size.width - 2), layout=False)

    def notes(self) -> list[Note]:
        notes = [("‖ paused", "bold $text-warning")] if self.paused else []
        if self.recording:
            stopped = self.recording.stopped
            notes.append((f"recording stopped: {stopped}" if stopped else "◉ recording", "bold $text-error"))
        return notes

    # ---------------------------------------------------------------- keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action in ("seek", "faster"):
            return self.replay is not None and not isinstance(self.focused, Input) and len(self.screen_stack) == 1
        if action == "escape":
            return isinstance(self.focused, Input)
        if action in ("filter", "log") and isinstance(self.focused, Input):
            return False
        return len(self.screen_stack) == 1 or action not in OF_THE_BASE

    async def action_quit(self) -> None:
        """At once, unless a server that was started here works on requests: then it asks."""
        view = self.feeds[0].view if self.feeds else None
        busy = view.stats.running + view.stats.waiting if view and self.child and self.child.running else 0
        if not busy or isinstance(self.screen, Confirm):
            self.exit()
            return

        def answered(yes: bool | None) -> None:
            if yes:
                self.exit()

        question = f"The server that was started here works on {busy} request{'s' if busy > 1 else ''}. End it?"
        self.push_screen(Confirm(question, "end it, after a few seconds for them", "stay"), answered)

    def action_pause(self) -> None:
        if self.replay:
            self.action_space()
            return
        self.paused = not self.paused
        self.show()

    def action_space(self) -> None:
        """Play and stop in a replay; else hold the log still, where that has the keys."""
        if self.replay:
            if self.replay.ended:
                self.replay.seek(0.0)
            self.replay.playing = not self.replay.playing
            self.show()
        elif isinstance(self.focused, LogView):
            self.focused.frozen = not self.focused.frozen
            self.pane.show_log()

    def action_faster(self, steps: int) -> None:
        assert self.replay is not None
        self.replay.faster(steps)
        self.show()

    def action_seek(self, seconds: int) -> None:
        assert self.replay is not None
        self.replay.seek(self.replay.position + seconds)
        self.show()

    def action_sort(self, steps: int) -> None:
        self.pane.requests.sort(steps)

    def action_reverse(self) -> None:
        self.pane.requests.sort_by(self.pane.requests.order)

    def action_server(self, number: int) -> None:
        if number >= len(self.panes) or number == self.at:
            return
        self.at = number
        self.query_one(ContentSwitcher).current = f"server-{number}"
        self.query_one("#filter").remove_class("open")
        self.focus_on(self.pane.log_view if self.pane.log_shown else self.pane.requests)
        self.call_after_refresh(self.show)

    def action_other(self, steps: int) -> None:
        self.action_server((self.at + steps) % len(self.panes))

    async def action_model(self) -> None:
        feed = self.pane.feed
        feed.next_model()
        if not self.replay:
            await in_thread(feed.poll)
            self.show()

    def action_log(self) -> None:
        self.pane.toggle_log()
        self.call_after_refresh(self.show)
        if not self.replay and self.pane.child is None and self.pane.log_shown:
            feed = self.pane.feed
            self.run_worker(in_thread(feed.poll_log))

    def action_level(self) -> None:
        if self.pane.log_shown:
            self.pane.log_view.next_level()

    def action_help(self) -> None:
        self.push_screen(Help(replay=self.replay is not None))

    # ---------------------------------------------------------------- filter

    @property
    def filtered(self) -> Requests | LogView:
        """What the filter is for: the part that has, or had, the keys."""
        pane = self.pane
        return pane.log_view if pane.log_shown and (pane.log_view.has_focus or pane.has_class("short")) else pane.requests

    def action_filter(self) -> None:
        field = self.query_one("#filter", Input)
        self._filtering = self.filtered
        field.add_class("open")
        field.value = self._filtering.words
        self.screen.set_focus(field)  # at once: what is typed without a pause is for it, and no command

    def on_input_changed(self, event: Input.Changed) -> None:
        if self.query_one("#filter").has_class("open"):
            self.filter_by(event.value)

    def on_input_submitted(self) -> None:
        self.close_filter()

    def action_escape(self) -> None:
        self.filter_by("")
        self.close_filter()

    def filter_by(self, words: str) -> None:
        target = self._filtering
        target.words = words
        if isinstance(target, LogView):
            target.again()
        else:
            target.show(self.pane.feed.view)

    def close_filter(self) -> None:
        self.query_one("#filter").remove_class("open")
        self.focus_on(self._filtering)

    def focus_on(self, part: Requests | LogView) -> None:
        self.screen.set_focus(part.table if isinstance(part, Requests) else part)

    # ---------------------------------------------------------------- one request

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        self.action_inspect()

    def action_inspect(self) -> None:
        if row := self.pane.requests.table.selected:
            self.push_screen(Inspect(self.pane.feed, row, self.ask_to_cancel))

    def action_cancel(self) -> None:
        if row := self.pane.requests.table.selected:
            self.ask_to_cancel(self.pane.feed, row)

    def ask_to_cancel(self, feed: Feed, row: Row) -> None:
        name = row.id
        if name is None:
            self.notify("the server does not say by which id this one can be cancelled", severity="warning")
            return
        question = f"Cancel {name}? Its client gets what there is, with finish_reason abort."

        def answered(yes: bool | None) -> None:
            if yes:
                self.run_worker(self.cancel(feed, name))

        self.push_screen(Confirm(question, "cancel it", "let it run"), answered)

    async def cancel(self, feed: Feed, name: str) -> None:
        """What the server says comes as a note: that it is done, or that the request is another key's, or gone."""
        said: list[Any] = []

        def ask() -> None:
            try:
                said.append(feed.source.cancel(name))
            except FeedError as error:
                said.append(str(error))

        await in_thread(ask)
        done = said[0] == f"{name} is cancelled"
        self.notify(str(said[0]), severity="information" if done else "error", markup=False)
