"""Draw the pictures of the documentation with stand-in data: python -m tests.tui.screenshot docs/images [NAME ...]"""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

from tests.tui.stage import SCENES, Stage, play


async def draw(folder: Path, name: str) -> None:
    async def save(stage: Stage) -> None:
        svg = stage.app.export_screenshot(title="appliance tui")
        svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # no fonts from afar
        (folder / ("dashboard.svg" if name == "main" else f"dashboard-{name}.svg")).write_text(svg, encoding="utf-8")

    await play(SCENES[name], save)


if __name__ == "__main__":
    for chosen in sys.argv[2:] or [name for name, scene in SCENES.items() if scene.documented]:
        asyncio.run(draw(Path(sys.argv[1]), chosen))
