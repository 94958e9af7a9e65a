"""The screen, character by character, as it is stored. RENEW_SNAPSHOTS=1 python -m pytest tests/tui/test_snapshots.py stores it.

Keys are part of the scenes (``tests/tui/stage.py``); pictures of some are in docs/images.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.tui.stage import SCENES, Stage, lines, play

STORED = Path(__file__).with_name("snapshots")


@pytest.mark.parametrize("name", SCENES)
async def test_looks_as_stored(name: str) -> None:
    async def look(stage: Stage) -> None:
        seen = "\n".join(lines(stage.app)) + "\n"
        assert {len(seen.splitlines()), SCENES[name].size[1]} == {SCENES[name].size[1]}
        assert max(map(len, seen.splitlines())) <= SCENES[name].size[0]
        path = STORED / f"{name}.txt"
        if os.environ.get("RENEW_SNAPSHOTS"):
            path.write_text(seen, encoding="utf-8")
        assert seen == path.read_text(encoding="utf-8"), "if this is meant: RENEW_SNAPSHOTS=1 (see above)"

    await play(SCENES[name], look)


async def test_without_colour_nothing_depends_on_it() -> None:
    async def look(stage: Stage) -> None:
        styles = [segment.style for strip in stage.app.screen._compositor.render_strips() for segment in strip if segment.style]
        filtered = [style for strip in stage.app.screen._compositor.render_strips() for style in _styles(stage, strip)]
        assert styles and not [style for style in filtered if style.color is not None and not style.color.is_default]
        assert any(style.reverse for style in styles), "the cursor"
        text = "\n".join(lines(stage.app))
        assert all(sign in text for sign in "■◆□·░▒▓█▚"), "a sign of its own for each"

    await play(SCENES["no-colour"], look)


def _styles(stage: Stage, strip):  # type: ignore[no-untyped-def]
    """As they are sent to the terminal."""
    from textual.color import Color

    for one in stage.app._filters:
        if one.enabled:
            strip = strip.apply_filter(one, Color(0, 0, 0))
    return [segment.style for segment in strip if segment.style]
