"""``appliance tui``: from what was asked for to a screen, one look as text, or JSON."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.tui.app import Dashboard
from appliance.tui.child import Child
from appliance.tui.feed import Feed
from appliance.tui.http import FeedError, Server, base_url
from appliance.tui.recording import Recording, Replay
from appliance.tui.snapshot import snapshot
from quant.errors import InputError

DEFAULT = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Asked:
    """The command line."""

    url: Sequence[str] = ()
    api_key: Sequence[str] = ()
    interval: float = 1.0
    once: bool = False
    json: bool = False
    serve: str | None = None
    flags: Sequence[str] = ()  # of the server that is started
    record: Path | None = None
    replay: Path | None = None
    ssl_ca_certs: str | None = None
    insecure: bool = False
    model: str | None = None  # of a server with several


def main(asked: Asked) -> int:
    """Show the dashboard until the user quits; plain text with ``once`` or where nothing can be drawn; JSON with ``json``.

    Returns the exit status: 1 where one look found no server, that of the server which was started here. Raises InputError.
    """
    check(asked)
    if asked.replay:
        return _replay(Replay(asked.replay), asked)
    child = Child(asked.serve, asked.flags) if asked.serve is not None else None
    urls = [*([child.url] if child else []), *(base_url(url) for url in asked.url or ([] if child else [DEFAULT]))]
    tls: dict[str, Any] = {"ca_certs": asked.ssl_ca_certs, "insecure": asked.insecure}
    servers = [Server(url, key, **tls) for url, key in zip(urls, _keys(asked, child, len(urls)), strict=True)]
    for server in servers:
        server.model = asked.model
    if child is None and (asked.once or asked.json or not _can_draw()):
        return _look(servers, asked)
    if not _can_draw():
        raise InputError(
            "--serve needs a terminal to draw on: the server ends with the dashboard; `appliance serve` runs without one"
        )
    recording = Recording(asked.record, urls) if asked.record else None
    feeds = [Feed(server, recorder=recording) for server in servers]
    try:
        if child:
            child.start()
        Dashboard(feeds, interval=asked.interval, child=child, recording=recording).run()
    finally:
        if recording:
            recording.close()
        if child and child.running:
            print("appliance: the server is ending", file=sys.stderr, flush=True)
            child.stop()
    if child and child.code:
        print(f"appliance: {child.ended}", file=sys.stderr)
    return child.code if child else 0


def check(asked: Asked) -> None:
    """Raises InputError for what does not go together, or is not possible."""
    if not (math.isfinite(asked.interval) and asked.interval >= 0.1):
        raise InputError(f"--interval {asked.interval:g} is not possible: give seconds, 0.1 or more")
    one_look = "--json" if asked.json else "--once" if asked.once else ""
    for name, given in (("--record", asked.record), ("--serve", asked.serve)):
        if one_look and given is not None:
            raise InputError(f"{name} does not go with {one_look}: that is one look at a server that runs")
    if asked.record and not _can_draw():
        raise InputError("--record needs a terminal to draw on: what is kept is what the dashboard on it sees")
    for name, value in (("--url", asked.url), ("--serve", asked.serve), ("--record", asked.record), ("--model", asked.model)):
        if asked.replay and value:
            raise InputError(f"{name} does not go with --replay: a recording is played, and no server is asked")
    if asked.flags and asked.serve is None:
        first = asked.flags[0]
        if not first.startswith("-"):
            raise InputError(f"{first!r}: the address of a server is given as --url {first}")
        raise InputError(f"there is no option {first}; what is behind -- is for a server that --serve MODEL starts")
    if asked.serve == "":
        raise InputError("--serve needs a model: a directory, a name on the hub, or demo for the embedded one")


def _keys(asked: Asked, child: Child | None, servers: int) -> list[str | None]:
    """A key a server: the k-th for the k-th, or one for all. The server that is started here has its own, unless one is given."""
    keys: list[str | None] = [key or None for key in asked.api_key]
    if len(keys) <= 1:
        keys = (keys or [None]) * servers
        if child and child.api_key and not asked.api_key:
            keys[0] = child.api_key
    if len(keys) != servers:
        raise InputError(f"--api-key was given {len(keys)} times for {servers} servers: give one for all, or one for each")
    return keys


def _look(servers: Sequence[Server], asked: Asked) -> int:
    """One look at each, on stdout. 1 where one does not answer."""
    bodies: dict[str, Any] = {}
    texts, failed = [], False
    for server in servers:
        feed = Feed(server)
        try:
            if asked.json:
                bodies[server.url] = server.stats()
                continue
        except FeedError as error:
            feed.error = str(error)
        else:
            feed.poll()
        if feed.view is None:
            failed = True
            print(f"appliance: {feed.error}", file=sys.stderr)
            continue
        texts.append(snapshot(feed, _width()))
    if bodies:
        print(json.dumps(bodies if len(servers) > 1 else next(iter(bodies.values())), indent=2))
    if texts:
        print("\n\n".join(texts))
    return int(failed)


def _replay(replay: Replay, asked: Asked) -> int:
    """On a terminal as it went; else as it was at its end."""
    if _can_draw() and not (asked.once or asked.json):
        Dashboard(replay=replay).run()
        return 0
    replay.show_until(replay.length)
    if asked.json:
        raise InputError("--json does not go with --replay: a recording is JSON lines already")
    print("\n\n".join(snapshot(feed, _width()) for feed in replay.feeds if feed.view))
    return 0


def _can_draw() -> bool:
    """Whether the output is a terminal, and one that can move its cursor."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _width() -> int:
    return shutil.get_terminal_size((100, 24)).columns
