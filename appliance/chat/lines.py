"""What the user types: with readline's keys and a history that is nobody else's to read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

try:
    import readline
except ImportError:  # a Python without it: lines without keys
    readline = None  # type: ignore[assignment]

MOST_LINES = 1000
QUOTES = '"""'


def history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return base / "appliance" / "chat_history"


class Lines:
    """Reads messages. As a context it keeps the history, where that can be kept."""

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = commands

    def __enter__(self) -> Lines:
        if readline is not None:
            readline.set_completer(self._complete)
            readline.set_completer_delims(" ")
            readline.parse_and_bind("tab: complete")
            readline.set_history_length(MOST_LINES)
            try:
                self._file = history_file()
                self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                os.close(os.open(self._file, os.O_CREAT | os.O_WRONLY, 0o600))
                self._file.chmod(0o600)
                readline.read_history_file(self._file)
            except (OSError, RuntimeError):  # no home, or not writable
                pass
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if readline is not None:
            try:
                readline.write_history_file(self._file)
                self._file.chmod(0o600)
            except (OSError, AttributeError):
                pass

    def _complete(self, text: str, state: int) -> str | None:
        found = [command for command in self._commands if text.startswith("/") and command.startswith(text)]
        return found[state] if state < len(found) else None

    def read(self, style: Callable[[str], str]) -> str | None:
        """A message, perhaps of several lines; None at the end of the input. Ctrl-C takes back what is typed."""
        while True:
            try:
                return self._message(style)
            except KeyboardInterrupt:
                print("\n(ctrl-D or /quit ends)")
            except EOFError:
                print()
                return None

    def _message(self, style: Callable[[str], str]) -> str:
        line = input(style(">>> "))
        if line.lstrip().startswith(QUOTES):
            text = line.lstrip().removeprefix(QUOTES)
            while not text.rstrip().endswith(QUOTES):
                text += "\n" + input(style("... "))
            return clean(text.rstrip().removesuffix(QUOTES).strip("\n"))
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input(style("... "))
        return clean(line)


def clean(text: str) -> str:
    """Without halves of characters, which JSON has no place for: a terminal sends more bytes than the locale has characters."""
    return text.encode(sys.stdin.encoding or "utf-8", "surrogateescape").decode("utf-8", "replace") if _halves(text) else text


def _halves(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)
