"""Draw the dashboard with stand-in data: python -m tests.tui.screenshot docs/images/dashboard.svg [COLUMNS LINES [KEY ...]]"""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

from appliance.tui.app import Dashboard
from appliance.tui.feed import Feed
from tests.tui.fake_server import FakeServer


async def draw(path: Path, size: tuple[int, int], keys: list[str]) -> None:
    server = FakeServer()
    feed = Feed("http://127.0.0.1:8000", source=server, clock=lambda: server.clock)
    for _ in range(120):
        feed.poll()
    app = Dashboard(feed, interval=3600)
    async with app.run_test(size=size) as pilot:
        await pilot.pause(0.5)  # the one poll of its own
        await pilot.press(*keys)
        await pilot.pause()
        svg = app.export_screenshot(title="appliance tui")
    path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")  # no fonts from afar


if __name__ == "__main__":
    columns, lines = (int(n) for n in sys.argv[2:4]) if len(sys.argv) > 3 else (120, 34)
    asyncio.run(draw(Path(sys.argv[1]), (columns, lines), sys.argv[4:]))
