"""The end of the server's log: levels in colours and words, a filter, a pause."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from rich.text import Text
from textual.markup import escape
from textual.widgets import RichLog

from appliance.tui.colours import colour
from appliance.tui.feed import LogLine

LEVELS = ("debug", "info", "warning", "error")
SIGNS = {"debug": "DEBUG", "info": "INFO", "warning": "WARN", "error": "ERROR", "critical": "ERROR"}
STYLES = {"warning": "text-warning", "error": "text-error", "critical": "text-error", "info": "text-success"}


def wanted(line: LogLine, level: str, words: str) -> bool:
    """Whether a line is of this level or above (one without a level is) and has all the words."""
    name = "error" if line.level == "critical" else line.level
    if name in LEVELS and LEVELS.index(name) < LEVELS.index(level):
        return False
    text = f"{line.level} {line.logger} {line.message}".lower()
    return all(word in text for word in words.lower().split())


def clock(time: str) -> str:
    """The time of day here, of ISO 8601."""
    try:
        return datetime.fromisoformat(time).astimezone().strftime("%H:%M:%S")
    except ValueError:
        return time[-8:]


class LogView(RichLog):
    BORDER_TITLE = "Log"

    def __init__(self) -> None:
        super().__init__(wrap=True, min_width=10, max_lines=2000, markup=False)
        self.level, self.words, self.frozen = "debug", "", False
        self._seen = 0
        self._lines: Sequence[LogLine] = ()

    def show(self, lines: Sequence[LogLine], total: int, why_not: str | None) -> None:
        """``total``: how many lines came since the start; ``lines`` are the last of them."""
        self._lines = lines
        self._say(why_not)
        if self.frozen or not self.size.width:
            return
        if total < self._seen:  # another session
            self.clear()
            self._seen = 0
        fresh = min(total - self._seen, len(lines))
        self._seen = total
        for line in list(lines)[len(lines) - fresh :]:
            self._add(line)

    def again(self) -> None:
        """Write everything anew: another filter, another width."""
        self.clear()
        self._say(None)
        for line in self._lines:
            self._add(line)

    def next_level(self) -> None:
        self.level = LEVELS[(LEVELS.index(self.level) + 1) % len(LEVELS)]
        self.again()

    def _say(self, why_not: str | None) -> None:
        parts = ["Log", *(["‖ paused"] if self.frozen else []), *([escape(why_not)] if why_not else [])]
        self.border_title = " · ".join(parts)
        level = f"{self.level} and above" if self.level != "debug" else "all levels"
        self.border_subtitle = " · ".join([level, *([f"filter: {escape(self.words)}"] if self.words else [])])

    def _add(self, line: LogLine) -> None:
        if not wanted(line, self.level, self.words):
            return
        text = Text()
        if line.time:
            text.append(f"{clock(line.time)} ", "dim")
        if line.level:
            style = colour(self.app, STYLES.get(line.level, "")) or "dim"
            text.append(f"{SIGNS.get(line.level, line.level.upper()):5} ", style)
        if line.logger and self.size.width >= 100:
            text.append(f"{line.logger.removeprefix('appliance.')}: ", "dim")
        text.append(line.message)
        self.write(text, width=self.scrollable_content_region.width, scroll_end=self.is_vertical_scroll_end, animate=False)
