"""The dashboard on a screen that is none, with stand-ins for servers: what tests look at and documentation shows."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from appliance.tui.app import Dashboard
from appliance.tui.feed import Feed
from appliance.tui.http import FeedError, Source
from appliance.tui.vllm import VllmMetrics
from tests.tui.fake_server import BEGUN, FakeServer

VLLM_METRICS = Path(__file__).with_name("vllm_metrics.txt")


class FakeVllm:
    """A server with nothing but vLLM's /metrics: the counters of the canned text, and more of them each second."""

    def __init__(self, url: str = "http://127.0.0.1:8001") -> None:
        self.url, self.clock, self.model = url, 0.0, None
        self.frozen, self.asked = False, 0
        self._text, self._metrics = VLLM_METRICS.read_text(), VllmMetrics("0.11.0")

    def stats(self) -> dict[str, Any]:
        self.asked += 1
        self.clock += 1.0
        if not self.frozen:
            self._text = grown(self._text, int(self.clock))
        return self._metrics.body(self._text, BEGUN + self.clock)

    def log(self, after: int) -> dict[str, Any]:
        raise FeedError(f"{self.url}/logs answers 404 Not Found: is this an appliance server?")

    def cancel(self, request_id: str) -> str:
        return "the server answers 404 Not Found"


GROWTH = {"vllm:generation_tokens_total": 940, "vllm:prompt_tokens_total": 2600, "vllm:time_to_first_token_seconds_sum": 0.9}


def grown(text: str, second: int) -> str:
    """A second later: more tokens, and five more first tokens, most of them below 0.25 s."""
    lines = []
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        bare = name.partition("{")[0]
        if bare in GROWTH:
            more = GROWTH[bare] * (1 + 0.3 * ((second * 7) % 5))
            line = f"{name} {float(value) + more}"
        elif bare == "vllm:time_to_first_token_seconds_bucket":
            bound = float(name.partition('le="')[2].partition('"')[0])
            line = f"{name} {float(value) + sum(one <= bound for one in (0.07, 0.09, 0.12, 0.2, 0.4))}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def lines(app: Dashboard) -> list[str]:
    """The screen as it stands, as text."""
    return ["".join(segment.text for segment in strip).rstrip() for strip in app.screen._compositor.render_strips()]


class Stage:
    def __init__(self, app: Dashboard, servers: Sequence[Any], pilot: Pilot[None]) -> None:
        self.app, self.servers, self.pilot = app, servers, pilot

    @property
    def server(self) -> Any:
        return self.servers[0]

    async def text(self) -> str:
        await self.pilot.pause()
        return "\n".join(lines(self.app))

    async def until(self, words: str, *, gone: bool = False) -> str:
        """The screen's text once it holds ``words``, or holds them no more."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if (words in (text := await self.text())) is not gone:
                return text
            await asyncio.sleep(0.02)
        pytest.fail(f"{words!r} {'stayed' if gone else 'never came'}:\n{text}")

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)


@asynccontextmanager
async def showing(
    *servers: Source, size: tuple[int, int] = (110, 30), polled: int = 20, interval: float = 0.3, **more: Any
) -> AsyncIterator[Stage]:
    """``polled`` seconds into the life of the servers. ``interval``: so often it asks again."""
    chosen: Sequence[Any] = servers or (FakeServer(),)
    feeds = [Feed(one, clock=lambda one=one: one.clock, wall=lambda one=one: BEGUN + one.clock) for one in chosen]
    for feed in feeds:
        for _ in range(polled):
            feed.poll()
            if polled:
                feed.poll_log()
    app = Dashboard(feeds, interval=interval, **more)
    async with app.run_test(size=size, notifications=True) as pilot:
        yield Stage(app, chosen, pilot)


@dataclass(frozen=True)
class Scene:
    """What is on the screen when these keys were pressed."""

    size: tuple[int, int] = (120, 40)
    keys: tuple[str, ...] = ()
    servers: Callable[[], tuple[Any, ...]] = lambda: (FakeServer(num_blocks=2560, arrivals=1.1),)
    environment: dict[str, str] = field(default_factory=dict)
    documented: bool = False  # a picture of it is in docs/images


def tabs() -> tuple[Any, ...]:
    gone = FakeServer(url="http://10.0.0.7:8000")
    gone.away = FeedError("no answer from http://10.0.0.7:8000: Connection refused")
    return FakeServer(), FakeVllm(), gone


SCENES = {
    "main": Scene(documented=True),
    "small": Scene((80, 24), documented=True),
    "large": Scene((200, 60), servers=lambda: (FakeServer(arrivals=2.2, gpus=2),)),
    "inspect": Scene(keys=("down", "i"), documented=True),
    "log": Scene(keys=("l",), documented=True),
    "small-log": Scene((80, 24), ("l",)),
    "vllm": Scene((120, 36), servers=lambda: (FakeVllm(),), documented=True),
    "small-vllm": Scene((80, 24), servers=lambda: (FakeVllm(),)),
    "no-colour": Scene((100, 34), environment={"NO_COLOR": "1"}, documented=True),
    "tabs": Scene(keys=("2",), servers=tabs),
    "help": Scene(keys=("question_mark",)),
    "cancel": Scene((80, 24), keys=("x",)),
    "filter": Scene(keys=("slash", "a", "l", "i", "enter", "s", "s")),
}


async def play(scene: Scene, look: Callable[[Stage], Awaitable[None]]) -> None:
    """Show a scene and look at it, the same each time: one look at the servers, after a minute of theirs."""
    environment = {"TZ": "UTC", **scene.environment}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    time.tzset()
    try:
        async with showing(*scene.servers(), size=scene.size, polled=60, interval=3600.0) as stage:
            await stage.until("Quit")
            for _ in range(50):  # until the one look of its own is over
                await stage.pilot.pause(0.02)
                if all(feed.view is None or one.clock > 60 for feed, one in zip(stage.app.feeds, stage.servers, strict=True)):
                    break
            for key in scene.keys:
                await stage.press(key)
                await stage.pilot.pause(0.05)
            stage.app.show()
            await stage.pilot.pause(0.1)
            await look(stage)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        time.tzset()
