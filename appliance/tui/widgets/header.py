"""Who is served, how, and whether the server answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import PurePath

from textual.content import Content
from textual.widgets import Static

from appliance.tui.feed import Feed, View
from appliance.tui.text import MUTED, duration, percent, size

GOOD, BUSY, BAD = "bold $text-success", "bold $text-warning", "bold $text-error"
STATES = {
    "ok": ("● serving", GOOD),
    "unloading": ("◌ unloading", BUSY),
    "loading": ("◐ loading", BUSY),
    "unloaded": ("○ unloaded", BUSY),
    "draining": ("◌ shutting down", BUSY),
    "stuck": ("✖ stuck", BAD),
    "dead": ("✖ engine dead", BAD),
}
KINDS = {"appliance": "appliance", "vllm": "vLLM"}
Note = tuple[str, str]  # what the dashboard itself is doing, and a style


def state_of(feed: Feed) -> Note:
    """In two words, as also the tabs show it."""
    if feed.child or (feed.view is None and feed.error and not feed.starting):
        return ("✖ ended" if feed.child else "✖ away", BAD)
    if feed.view is None:
        return ("◐ starting" if feed.starting else "… asking", MUTED)
    if feed.error:
        return ("✖ away", BAD)
    return STATES.get(feed.view.state, (f"? {feed.view.state}", BUSY))


def header(feed: Feed, notes: Sequence[Note] = ()) -> Content:
    """Two lines."""
    view, extra = feed.view, [Content.assemble(note) for note in notes]
    if view is None:
        first = [Content.assemble(("appliance tui", "bold")), Content(feed.url), *extra]
        return Content.assemble(Content(" │ ").join(first), "\n", _connection(feed))
    label, style = STATES.get(view.state, (f"? {view.state}", BUSY))
    name = f"{KINDS.get(view.kind, view.kind)} {view.version}".strip()
    parts = [Content.assemble((name, "bold")), Content.assemble((label, style)), *extra]
    parts.append(Content.assemble((short(view.model), "bold $text-primary")))
    if view.uptime_s is not None:
        parts.append(Content(f"up {duration(view.uptime_s)}"))
    second = _connection(feed) if feed.error or feed.child else _details(view)
    return Content.assemble(Content(" │ ").join(parts), "\n", second)


def short(model: str) -> str:
    """A name as it is; of a path the last part."""
    return PurePath(model).name if model.startswith(("/", ".", "~")) else model


def _connection(feed: Feed) -> Content:
    if feed.child:
        return Content.assemble((f"✖ {feed.child}", BAD))
    if feed.starting:
        return Content.assemble(("◐ the server is starting", BUSY), f" at {feed.url}")
    if feed.error is None or feed.away_since is None:
        return Content(f"asking {feed.url}")
    since = time.strftime("%H:%M:%S", time.localtime(feed.away_since))
    away = duration(feed.wall() - feed.away_since)
    why = feed.error.removeprefix(f"no answer from {feed.url}: ")
    return Content.assemble((f"✖ away since {since} ({away}), trying again", BAD), f": {why}")


def _details(view: View) -> Content:
    if len(view.models) > 1:
        return Content.assemble(_models(view), " │ ", _one_model(view))
    return _one_model(view)


def _one_model(view: View) -> Content:
    if view.info is None:
        return Content(view.about or (_loading(view) if view.state == "loading" else "no model is loaded"))
    info = view.info
    facts = [info.quantization, info.dtype, info.device, f"context {info.max_model_len:,}", info.architecture]
    return Content(
        " · ".join([*(fact for fact in facts if fact), f"ready in {duration(info.startup.get('ready', info.ready_s))}"])
    )


def _models(view: View) -> Content:
    """Of a server with several: each with the sign of its state."""
    parts = []
    for model in view.models:
        label, style = STATES.get(str(model.get("state")), (f"? {model.get('state')}", BUSY))
        name = (f" {short(str(model.get('name')))}", "reverse" if model.get("name") == view.model else "")
        waiting = f" ({model['waiting']} waiting)" if model.get("waiting") else ""
        parts.append(Content.assemble((label.split(" ")[0], style), name, (waiting, BUSY)))
    return Content("  ").join([Content(f"{len(parts)} models (m):"), *parts])


def _loading(view: View) -> str:
    if view.loading is None or view.loading[1] <= 0:
        return "reading the model"
    done, total = view.loading
    filled = round(20 * min(done / total, 1))
    return f"reading the model {'█' * filled}{'░' * (20 - filled)} {percent(done, total)} of {size(total)}"


class Header(Static):
    def show(self, feed: Feed, notes: Sequence[Note]) -> None:
        self.update(header(feed, notes), layout=False)
