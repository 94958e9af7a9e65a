"""``appliance tui``: a client of a running server's /stats, and of nothing else."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import sys
from functools import partial

from textual.app import App, ComposeResult
from textual.containers import Horizontal
from textual.widgets import Footer

from appliance.core.messages import Stats
from appliance.tui.feed import Feed, FeedError, base_url, fetch
from appliance.tui.snapshot import snapshot
from appliance.tui.widgets.blocks import BlockMap
from appliance.tui.widgets.header import Header
from appliance.tui.widgets.help import Help
from appliance.tui.widgets.memory import Memory
from appliance.tui.widgets.requests import Requests
from appliance.tui.widgets.throughput import Throughput
from quant.errors import InputError


class Dashboard(App[None]):
    """Polls the feed every ``interval`` seconds in a thread and shows what it knows."""

    TITLE = "appliance"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS = [  # noqa: RUF012  (textual's own convention)
        ("q", "quit", "Quit"),
        ("p", "pause", "Pause"),
        ("s", "sort", "Sort"),
        ("question_mark", "help", "Help"),
        ("ctrl+c", "quit"),
    ]
    CSS = """
    Header { height: 2; padding: 0 1; background: $panel; text-wrap: nowrap; text-overflow: ellipsis; }
    #top { height: 2fr; min-height: 8; max-height: 16; }
    BlockMap, Throughput { width: 1fr; }
    BlockMap, Throughput, Memory, Requests { border: round $foreground 40%; border-title-color: $text; padding: 0 1; }
    Memory { height: auto; min-height: 4; }
    Requests { height: 3fr; min-height: 5; }
    #counters, #head { height: 1; text-wrap: nowrap; }
    #rows { text-wrap: nowrap; }
    Requests VerticalScroll { scrollbar-size-vertical: 1; }
    .stale BlockMap, .stale Throughput, .stale Memory, .stale Requests { opacity: 50%; }
    Help { align: center middle; }
    #help { width: 58; height: auto; max-height: 100%; padding: 1 2; border: round $foreground 60%; background: $panel; }
    """

    def __init__(self, feed: Feed, *, interval: float = 1.0) -> None:
        super().__init__()
        self.feed, self.interval = feed, interval
        self.paused = self.newest_first = False

    def compose(self) -> ComposeResult:
        yield Header()
        with Horizontal(id="top"):
            yield BlockMap()
            yield Throughput()
        yield Memory()
        yield Requests()
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one(Requests).query_one("VerticalScroll").focus()
        self.run_worker(self.watch_feed(), exclusive=True)

    async def watch_feed(self) -> None:
        """Poll, show, sleep; a poll that waits for its time-out holds nothing up."""
        while True:
            if not self.paused:
                await asyncio.to_thread(self.feed.poll)
            self.show()
            await asyncio.sleep(self.interval)

    def on_resize(self) -> None:
        self.call_after_refresh(self.show)

    def show(self) -> None:
        view = self.feed.view
        stats = view.stats if view else Stats()
        parts = (Header, BlockMap, Throughput, Memory, Requests)
        if not self.screen_stack or not all(self.screen_stack[0].query(part) for part in parts):
            return  # the application is ending, and its screen is being taken down
        screen = self.screen_stack[0]
        screen.set_class(self.feed.error is not None, "stale")
        screen.query_one(Header).show(self.feed, paused=self.paused)
        screen.query_one(BlockMap).show(stats)
        screen.query_one(Throughput).show(self.feed)
        screen.query_one(Memory).show(view)
        screen.query_one(Requests).show(stats, newest_first=self.newest_first)

    def action_pause(self) -> None:
        self.paused = not self.paused
        self.show()

    def action_sort(self) -> None:
        self.newest_first = not self.newest_first
        self.show()

    def action_help(self) -> None:
        self.push_screen(Help())


def main(url: str, *, interval: float = 1.0, once: bool = False, json_output: bool = False, api_key: str | None = None) -> int:
    """Show the dashboard until the user quits; a plain snapshot with ``once`` or where the output is no terminal.

    ``json_output`` prints the server's own /stats instead. Returns the exit status: 1 where one look found no server.
    Raises InputError for a bad address or interval.
    """
    url = base_url(url)
    if not (math.isfinite(interval) and interval >= 0.1):
        raise InputError(f"--interval {interval:g} is not possible: give seconds, 0.1 or more")
    if json_output:
        return _print_json(url, api_key)
    feed = Feed(url, source=partial(fetch, api_key=api_key))
    if once or not sys.stdout.isatty():
        return _print_once(feed)
    Dashboard(feed, interval=interval).run()
    return 0


def _print_json(url: str, api_key: str | None) -> int:
    try:
        print(json.dumps(fetch(url, api_key), indent=2))
    except FeedError as error:
        print(f"appliance: {error}", file=sys.stderr)
        return 1
    return 0


def _print_once(feed: Feed) -> int:
    feed.poll()
    if feed.view is None:
        print(f"appliance: {feed.error}", file=sys.stderr)
        return 1
    print(snapshot(feed, shutil.get_terminal_size((100, 24)).columns))
    return 0
