from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from textual.pilot import Pilot

from appliance.tui.app import Dashboard
from appliance.tui.feed import Feed, FeedError
from appliance.tui.widgets.help import Help
from tests.tui.fake_server import FakeServer


def lines(app: Dashboard) -> list[str]:
    """The screen as it stands, as text."""
    return ["".join(segment.text for segment in strip).rstrip() for strip in app.screen._compositor.render_strips()]


class Stage:
    def __init__(self, app: Dashboard, server: FakeServer, pilot: Pilot[None]) -> None:
        self.app, self.server, self.pilot = app, server, pilot

    async def text(self) -> str:
        await self.pilot.pause()
        return "\n".join(lines(self.app))

    async def until(self, words: str) -> str:
        """The screen's text once it holds ``words``."""
        for _ in range(200):
            if words in (text := await self.text()):
                return text
            await asyncio.sleep(0.02)
        pytest.fail(f"{words!r} never came:\n{text}")


@asynccontextmanager
async def showing(server: FakeServer, size: tuple[int, int] = (120, 40), polled: int = 60) -> AsyncIterator[Stage]:
    feed = Feed("http://127.0.0.1:8000", source=server, clock=lambda: server.clock)
    for _ in range(polled):
        feed.poll()
    app = Dashboard(feed, interval=0.1)
    async with app.run_test(size=size) as pilot:
        yield Stage(app, server, pilot)


async def test_shows_everything_on_a_large_screen() -> None:
    async with showing(FakeServer()) as stage:
        text = await stage.until("serving")
        await stage.pilot.press("p")
        text = await stage.until("paused")
        stats = stage.server.stats()
        assert "Llama-3.2-1B-Instruct-AWQ" in text and "awq 4-bit, group 128 · bfloat16 · cpu · context 8,192" in text
        assert f"{stats.blocks_used:,} of 1,536 used" in text and "room for 24,576 tokens" in text and "█" in text
        assert (
            f"{stats.running} running · {stats.waiting - 1} waiting · 1 swapped · 2 preempted · {stats.requests} arrived" in text
        )
        assert f"KV blocks · {stats.blocks_kept:,} kept · prefix hits 40 %" in text and "□" in text
        assert "256 MiB: 60 of 512 blocks used, 130 kept" in text and "swapped " in text
        assert "generation" in text and "tok/s" in text and "peak" in text
        assert "plan 2.38 GiB of 3.00 GiB · process 2.10 GiB" in text and "weights 990 MiB" in text and "KV 768 MiB" in text
        first = stats.requests_now[0]
        row = next(line for line in text.split("\n") if first.request_id in line)
        assert row.split()[1:6] == [
            first.request_id, "decode", f"{first.prompt_tokens:,}", f"{first.output_tokens:,}", f"{first.blocks:,}"
        ]  # fmt: skip


async def test_fits_a_terminal_of_80_by_24() -> None:
    async with showing(FakeServer(), size=(80, 24)) as stage:
        text = await stage.until("Quit")  # the footer comes last
        assert len(text.split("\n")) == 24 and max(map(len, text.split("\n"))) <= 80
        for words in (
            "serving",
            "KV blocks",
            "Throughput",
            "Memory",
            "runtime 300 MiB",
            "Requests",
            "preempted",
            "swap ",
            "prefix hits 40 %",
            "Quit",
            "chatcmpl-",
        ):
            assert words in text, f"{words!r} is missing:\n{text}"


@pytest.mark.parametrize("size", [(40, 12), (20, 6), (250, 90)])
async def test_survives_odd_sizes_and_resizing(size: tuple[int, int]) -> None:
    async with showing(FakeServer(), size=size) as stage:
        await stage.text()
        await stage.pilot.resize_terminal(100, 30)
        await stage.until("Llama-3.2-1B-Instruct-AWQ")


async def test_shows_a_small_pool_block_by_block() -> None:
    server = FakeServer(num_blocks=64, arrivals=0.0)
    held = server.pool.allocate(3)
    assert held
    async with showing(server, size=(160, 40)) as stage:
        text = await stage.until("3 of 64 used, 5 %")
        assert "■ ■ ■ · · ·" in text and "a cell is a block" in text and "no requests" in text


async def test_says_since_when_the_server_is_away_and_comes_back() -> None:
    async with showing(FakeServer()) as stage:
        await stage.until("● serving")
        stage.server.away = FeedError("no answer from http://127.0.0.1:8000: Connection refused")
        text = await stage.until("away since")
        assert "trying again: no answer from http://127.0.0.1:8000: Connection refused" in text
        assert "KV blocks" in text and "chatcmpl-" in text, "what was last seen stays"
        assert stage.app.screen.has_class("stale")
        stage.server.away = None
        assert "away since" not in await stage.until("awq 4-bit")
        assert not stage.app.screen.has_class("stale")


async def test_starts_without_a_server() -> None:
    server = FakeServer()
    server.away = FeedError("no answer from there: Connection refused")
    async with showing(server, polled=0) as stage:
        assert "waiting for the first answer" in await stage.until("away since")
        server.away = None
        await stage.until("● serving")


async def test_shows_how_far_loading_is() -> None:
    server = FakeServer(arrivals=0.0)
    server.state, server.loading = "loading", [512 << 20, 2 << 30]
    async with showing(server) as stage:
        text = await stage.until("◐ loading")
        assert "reading the model █████░░░░░░░░░░░░░░░ 25 % of 2.00 GiB" in text and "no pool yet" in text
        server.state, server.loading = "ok", None
        await stage.until("ready in 3.2 s")
        server.state = "dead"
        await stage.until("✖ engine dead")


async def test_pause_stops_asking() -> None:
    async with showing(FakeServer()) as stage:
        await stage.until("serving")
        await stage.pilot.press("p")
        await stage.until("‖ paused")
        await asyncio.sleep(0.2)  # a look that was under way when the key came
        asked = stage.server.clock
        await asyncio.sleep(0.3)
        assert stage.server.clock == asked
        await stage.pilot.press("p")
        for _ in range(200):
            await asyncio.sleep(0.02)
            if stage.server.clock > asked:
                break
        assert stage.server.clock > asked and "paused" not in await stage.text()


async def test_sort_help_and_quit() -> None:
    async with showing(FakeServer()) as stage:
        await stage.until("Requests, oldest first")
        await stage.pilot.press("s")
        text = await stage.until("Requests, newest first")
        shown = [line for line in text.split("\n") if "chatcmpl-" in line]
        assert "waiting" in shown[0] or "prefill" in shown[0]
        await stage.pilot.press("question_mark")
        await stage.until("any key closes this")
        await asyncio.sleep(0.1)  # the feed goes on below it
        await stage.pilot.press("x")
        await stage.pilot.pause()
        assert not isinstance(stage.app.screen, Help)
        await stage.pilot.press("q")
    assert stage.app.return_code == 0


async def test_a_late_look_at_a_screen_that_is_gone_is_no_error() -> None:
    async with showing(FakeServer()) as stage:
        await stage.until("serving")
        await stage.app.screen.query("*").remove()
        stage.app.show()
        assert not stage.app.screen.query("Header")


async def test_works_without_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with showing(FakeServer()) as stage:
        text = await stage.until("serving")
        assert "█" in text and "·" in text and "▓" in text, "the signs differ where the colours cannot"
