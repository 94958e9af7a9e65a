"""Who is served, how, and whether the server answers."""

from __future__ import annotations

import time
from pathlib import PurePath

from textual.content import Content
from textual.widgets import Static

from appliance.tui.feed import Feed, View
from appliance.tui.text import duration, percent, size

STATES = {
    "ok": ("● serving", "bold $text-success"),
    "loading": ("◐ loading", "bold $text-warning"),
    "draining": ("◌ shutting down", "bold $text-warning"),
    "dead": ("✖ engine dead", "bold $text-error"),
}


def header(feed: Feed, *, paused: bool = False) -> Content:
    """Two lines."""
    view = feed.view
    if view is None:
        return Content.assemble(_connection(feed), "\n", ("waiting for the first answer", "dim"))
    label, style = STATES.get(view.state, (f"? {view.state}", "bold $text-warning"))
    parts = [Content.assemble((f"appliance {view.version}", "bold")), Content.assemble((label, style))]
    if paused:
        parts.append(Content.assemble(("‖ paused", "bold $text-warning")))
    parts += [Content.assemble((_short(view.model), "bold $text-primary")), Content(f"up {duration(view.uptime_s)}")]
    second = _connection(feed) if feed.error else _details(view)
    return Content.assemble(Content(" │ ").join(parts), "\n", second)


def _short(model: str) -> str:
    """A name as it is; of a path the last part."""
    return PurePath(model).name if model.startswith(("/", ".", "~")) else model


def _connection(feed: Feed) -> Content:
    if feed.error is None or feed.away_since is None:
        return Content(f"asking {feed.url}")
    since = time.strftime("%H:%M:%S", time.localtime(feed.away_since))
    away = duration(time.time() - feed.away_since)
    return Content.assemble((f"✖ away since {since} ({away}), trying again", "bold $text-error"), f": {feed.error}")


def _details(view: View) -> Content:
    if view.info is None:
        return Content(_loading(view))
    info = view.info
    facts = [info.quantization, info.dtype, info.device, f"context {info.max_model_len:,}", info.architecture]
    return Content(" · ".join([*(fact for fact in facts if fact), f"ready in {duration(info.ready_s)}"]))


def _loading(view: View) -> str:
    if view.loading is None or view.loading[1] <= 0:
        return "reading the model"
    done, total = view.loading
    filled = round(20 * min(done / total, 1))
    return f"reading the model {'█' * filled}{'░' * (20 - filled)} {percent(done, total)} of {size(total)}"


class Header(Static):
    def show(self, feed: Feed, *, paused: bool) -> None:
        self.update(header(feed, paused=paused))
