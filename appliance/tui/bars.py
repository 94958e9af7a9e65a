"""Lines of the screen that belong to no server: the tabs, and where a replay is."""

from __future__ import annotations

import time
from collections.abc import Sequence

from textual.content import Content
from textual.markup import escape

from appliance.tui.feed import Feed
from appliance.tui.recording import Replay
from appliance.tui.text import MUTED, duration
from appliance.tui.widgets.header import state_of


def tabs(feeds: Sequence[Feed], at: int) -> Content:
    """A tab a server: its number, where it is, the sign of its state. A click goes there."""
    parts = []
    for number, feed in enumerate(feeds):
        sign, style = state_of(feed)
        name = escape(feed.url.partition("://")[2])
        label = f"[@click=app.server({number})] {number + 1} {name} [/][{style}]{sign.split(' ')[0]}[/] "
        parts.append(Content.from_markup(f"[reverse]{label}[/]" if number == at else label))
    return Content("│").join(parts)


def replay_bar(replay: Replay, width: int) -> Content:
    """``▶ ×4  12:03:10  ━━━━●────  1m 20s of 5m 00s``."""
    sign = "▶" if replay.playing else "■" if replay.ended else "‖"
    clock = time.strftime("%H:%M:%S", time.localtime(replay.begun + replay.position))
    head = f"{sign} replay ×{replay.speed:g}  {clock}  "
    tail = f"  {duration(replay.position)} of {duration(replay.length)}"
    room = max(width - len(head) - len(tail) - 1, 0)
    done = round(room * replay.position / replay.length) if replay.length else 0
    return Content.assemble((head, "bold $text-accent"), ("━" * done, "$text-accent"), "●", ("─" * (room - done), MUTED), tail)
